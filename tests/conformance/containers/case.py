"""What a case is: a small model, what it is given, and what its statistics have to look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj

BATCH, WIDTH, TIMES, LAYERS = 3, 6, 4, 3


class Visits(NamedTuple):
    """What the statistics of a site have to look like.

    Attributes:
      steps: lengths of the scans of which each step is a layer of its own.
      batches: how often a layer is visited by the two calls of :meth:`Case.calibration`.
    """

    steps: tuple[int, ...] = ()
    batches: int = 2


class Case(NamedTuple):
    """A function of ``(params, *inputs)`` with arguments for it.

    Attributes:
      visits: of the sites that are no plain :class:`Visits`, by name; ``*`` is all others.
      opaque: how many sites cannot be rewritten.
      reverse: whether it has a gradient; a ``while`` has only a directional derivative.
      inlined: whether a derivative rule of its own is lost where it is rewritten.
      last_places: whether its derivative differs in them at bypass, on CPUs with vectors of 8
        floats: a library's loop over time, or a gradient differentiated again, where XLA computes
        sums of several cotangents with a few more operations beside them.
    """

    f: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    visits: Mapping[str, Visits] = {}
    opaque: int = 0
    reverse: bool = True
    inlined: bool = False
    last_places: bool = False

    def expected(self, name: str) -> Visits:
        """What the statistics of this site have to look like."""
        return self.visits.get(name, self.visits.get("*", Visits()))

    def calibration(self) -> list[tuple[Any, ...]]:
        """Two batches; the sum of the second one's floating-point inputs has the other sign."""
        flipped = tuple(-0.5 * x if is_float(x) else x for x in self.inputs)
        return [self.inputs, flipped]

    @property
    def table(self) -> qj.SiteTable:
        """Its sites."""
        return qj.sites(self.f, self.params, *self.inputs)

    def planned(self, policy: qj.Policy) -> qj.Plan:
        """The plan of a policy for it."""
        return qj.plan(policy, self.table)


def is_float(x: Any) -> bool:
    """Whether it is one array that can be differentiated by; state of a model is not."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def batch(*shape: int) -> jax.Array:
    """Normal numbers with a positive sum."""
    values = np.random.default_rng(len(shape) + sum(shape)).normal(size=shape)
    return jnp.asarray(values * np.sign(values.sum()), jnp.float32)


def derivatives(case: Case, f: Callable[..., Any]) -> Callable[..., Any]:
    """The value of ``f(params, *inputs)`` and its gradient by parameters and real inputs.

    Where there is no gradient, the directional derivative along a fixed direction.
    """

    def run(params: Any, *inputs: Any) -> Any:
        moving = tuple(x for x in inputs if is_float(x))

        def of_moving(params: Any, *moving: Any) -> Any:
            rest = iter(moving)
            return f(params, *(next(rest) if is_float(x) else x for x in inputs))

        if not case.reverse:
            return jax.jvp(of_moving, (params, *moving), waves((params, *moving)))
        value, pull = jax.vjp(of_moving, params, *moving)
        return value, pull(waves(value))

    return run


def waves(tree: Any) -> Any:
    """Arrays like those of the tree, no two entries of one alike."""
    return jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), tree)
