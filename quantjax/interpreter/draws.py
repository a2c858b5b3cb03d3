"""Equations whose results no operand explains."""

from __future__ import annotations

from jax.extend import core as jex_core

from quantjax._compat import programs_in

_DRAWS = ("random_", "threefry", "rng_")
_FROM_OUTSIDE = frozenset({"pure_callback", "io_callback", "ffi_call", "infeed"})


def brings_numbers(eqn: jex_core.JaxprEqn) -> bool:
    """Whether an equation, or one inside it, draws at random or asks what is not in the program."""
    name = eqn.primitive.name
    if name.startswith(_DRAWS) or name in _FROM_OUTSIDE:
        return True
    return any(map(brings_numbers, (one for held in programs_in(eqn.params) for one in held.eqns)))


__all__ = ["brings_numbers"]
