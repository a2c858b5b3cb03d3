"""Which sites a rule speaks of."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
from collections.abc import Sequence

from quantjax import errors
from quantjax.arguments import expect
from quantjax.interpreter import Op, Role, Site


@dataclasses.dataclass(frozen=True)
class Selector(abc.ABC):
    """A named predicate on the rows of a site table; hashable."""

    @abc.abstractmethod
    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of ``site``; of a resolved selector."""

    def resolved(self, sites: Sequence[Site]) -> Selector:
        """The selector for one table; most are the same for all."""
        del sites
        return self

    def __and__(self, other: Selector) -> Selector:
        return all_of(self, other)

    def __or__(self, other: Selector) -> Selector:
        return any_of(self, other)

    def __invert__(self) -> Selector:
        return not_(self)

    def __bool__(self) -> bool:
        """Raises: ``and``, ``or`` and ``not`` would drop one of two selectors without a word."""
        raise errors.ArgumentError(
            f"the selector '{self}' is neither true nor false",
            where="and, or, not or if",
            why="which sites it matches depends on the table",
            fix="a & b, a | b, ~a",
        )

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


@dataclasses.dataclass(frozen=True)
class OfOp(Selector):
    """Sites of some primitives."""

    ops: tuple[Op, ...]

    def matches(self, site: Site) -> bool:
        """By the primitive."""
        return site.op in self.ops

    def __str__(self) -> str:
        return "op " + "|".join(op.value for op in self.ops)


@dataclasses.dataclass(frozen=True)
class WithRole(Selector):
    """Sites one of whose operands is that to the model."""

    role: Role

    def matches(self, site: Site) -> bool:
        """By the roles of the operands, the output and the bias aside."""
        return any(operand.role is self.role for operand in site.operands)

    def __str__(self) -> str:
        return f"role {self.role.value}"


@dataclasses.dataclass(frozen=True)
class InScope(Selector):
    """Sites traced under a module path that fits a shell pattern."""

    pattern: str

    def matches(self, site: Site) -> bool:
        """Whether the whole scope fits."""
        return fnmatch.fnmatchcase(site.scope, self.pattern)

    def __str__(self) -> str:
        return f"scope {self.pattern}"


@dataclasses.dataclass(frozen=True)
class AtLeast(Selector):
    """Sites of some size."""

    multiply_adds: int
    parameters: int

    def matches(self, site: Site) -> bool:
        """Whether it reaches both."""
        return site.multiply_adds >= self.multiply_adds and site.parameters >= self.parameters

    def __str__(self) -> str:
        asked = (self.multiply_adds, "multiply-adds"), (self.parameters, "parameters")
        return "at least " + (", ".join(f"{n:,} {what}" for n, what in asked if n) or "nothing")


@dataclasses.dataclass(frozen=True)
class Combined(Selector):
    """All of some selectors, or any of them."""

    parts: tuple[Selector, ...]
    every: bool

    def matches(self, site: Site) -> bool:
        """Whether all of them match, or one does."""
        found = [part.matches(site) for part in self.parts]
        return all(found) if self.every else any(found)

    def resolved(self, sites: Sequence[Site]) -> Selector:
        """Of resolved parts."""
        return Combined(tuple(part.resolved(sites) for part in self.parts), self.every)

    def __str__(self) -> str:
        return "(" + (" & " if self.every else " | ").join(map(str, self.parts)) + ")"


@dataclasses.dataclass(frozen=True)
class Not(Selector):
    """What another selector does not match."""

    part: Selector

    def matches(self, site: Site) -> bool:
        """Whether the other one does not."""
        return not self.part.matches(site)

    def resolved(self, sites: Sequence[Site]) -> Selector:
        """Of the resolved one."""
        return Not(self.part.resolved(sites))

    def __str__(self) -> str:
        return f"~{self.part}"


@dataclasses.dataclass(frozen=True)
class Named(Selector):
    """Sites of these names: what a selector that looks at the whole table becomes."""

    names: frozenset[str]

    def matches(self, site: Site) -> bool:
        """By its name."""
        return site.name in self.names

    def __str__(self) -> str:
        return ", ".join(sorted(self.names))


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
    expect(pattern, str, argument="pattern", where="qj.path", fix='qj.path("*/Dense_0/*")')
    return Path(pattern)


def op(*ops: Op) -> Selector:
    """Sites of some primitives: ``qj.op(qj.Op.CONV)``; lookups are ``GATHER`` and ``SLICE``."""
    for each in ops:
        expect(each, Op, argument="one of the ops", where="qj.op", fix="qj.op(qj.Op.CONV)")
    return OfOp(ops)


def role(role: Role) -> Selector:
    """Sites that have an operand of a role: weight, activation or gradient."""
    expect(role, Role, argument="role", where="qj.role", fix="qj.role(qj.Role.GRADIENT)")
    return WithRole(role)


def scope(pattern: str) -> Selector:
    """Sites by the module path that they were traced under; shell wildcards, ``*`` crosses slashes.

    For products of two activations, whose names are scopes with a number behind them.
    """
    expect(pattern, str, argument="pattern", where="qj.scope", fix='qj.scope("*attention*")')
    return InScope(pattern)


def at_least(*, multiply_adds: int = 0, parameters: int = 0) -> Selector:
    """Sites of at least so many multiply-adds a call, and parameters, of all layers together.

    >>> str(at_least(multiply_adds=1_000_000))
    'at least 1,000,000 multiply-adds'
    """
    return AtLeast(multiply_adds, parameters)


def all_of(*selectors: Selector) -> Selector:
    """Sites that all of them match; ``a & b`` is short for it."""
    _expect_selectors(selectors, "all_of")
    return Combined(selectors, every=True)


def any_of(*selectors: Selector) -> Selector:
    """Sites that one of them matches; ``a | b`` is short for it."""
    _expect_selectors(selectors, "any_of")
    return Combined(selectors, every=False)


def not_(selector: Selector) -> Selector:
    """Sites that it does not match; ``~a`` is short for it.

    >>> str(weighted() & ~path("*/head/*"))
    '(weighted & ~*/head/*)'
    """
    _expect_selectors((selector,), "not_")
    return Not(selector)


def _expect_selectors(selectors: Sequence[Selector], function: str) -> None:
    fix = f"qj.{function}(*selectors)" if function != "not_" else "~qj.path('*')"
    for each in selectors:
        expect(each, Selector, argument="a selector", where=f"qj.{function}", fix=fix)
