"""Which sites a rule speaks of."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch

from quantjax.interpreter import Role, Site


@dataclasses.dataclass(frozen=True)
class Selector(abc.ABC):
    """A named predicate on the rows of a site table; hashable."""

    @abc.abstractmethod
    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of ``site``."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """How it prints in a policy."""


@dataclasses.dataclass(frozen=True)
class Everything(Selector):
    """Every site, products of two activations too."""

    def matches(self, site: Site) -> bool:
        """True."""
        del site
        return True

    def __str__(self) -> str:
        return "everything"


@dataclasses.dataclass(frozen=True)
class Weighted(Selector):
    """Sites that multiply an activation with a weight."""

    def matches(self, site: Site) -> bool:
        """Whether one operand is a weight."""
        return site.weight is not None

    def __str__(self) -> str:
        return "weighted"


@dataclasses.dataclass(frozen=True)
class Backward(Selector):
    """Sites of a backward pass: one operand is a gradient."""

    def matches(self, site: Site) -> bool:
        """Whether one operand is a gradient."""
        return any(operand.role is Role.GRADIENT for operand in site.operands)

    def __str__(self) -> str:
        return "backward"


@dataclasses.dataclass(frozen=True)
class Path(Selector):
    """Sites whose name fits a shell pattern; ``*`` crosses slashes."""

    pattern: str

    def matches(self, site: Site) -> bool:
        """Whether the whole name fits, case counting."""
        return fnmatch.fnmatchcase(site.name, self.pattern)

    def __str__(self) -> str:
        return self.pattern


def everything() -> Everything:
    """Every site, products of two activations (attention) included."""
    return Everything()


def weighted() -> Weighted:
    """Every site with a weight; what :func:`quantjax.uniform_policy` quantizes."""
    return Weighted()


def backward() -> Backward:
    """Every product of a backward pass, in the program of ``jax.grad``.

    An operand is a gradient if the transposed part of the program computed it, or if it meets a
    weight there. A cotangent that comes from elsewhere (``pull(y - t)`` of ``jax.vjp``) is told
    from a saved activation only by the weight; write such a loss for ``jax.grad``.

    >>> import jax, jax.numpy as jnp, quantjax as qj
    >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)
    >>> table = qj.sites(jax.grad(loss), {"w": jnp.ones((2, 3))}, jnp.ones((4, 2)))
    >>> [(site.name, backward().matches(site)) for site in table]
    [('w', False), ('transpose(jvp())/dot_general#0', True)]
    """
    return Backward()


def path(pattern: str) -> Path:
    """Sites by name, as the site table prints it.

    Args:
      pattern: shell wildcards ``*``, ``?``, ``[...]`` over the whole name.

    >>> str(path("params/Conv_*/kernel"))
    'params/Conv_*/kernel'
    """
    return Path(pattern)
