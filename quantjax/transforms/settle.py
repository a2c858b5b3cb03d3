"""What a bfloat16 model computes beside its products is rounded to bfloat16 in every program."""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend import core as jex_core

from quantjax._compat import programs_in
from quantjax.interpreter import Program, Settle
from quantjax.lean import settled


def settle_of(program: Program) -> Settle | None:
    """For :func:`quantjax.interpreter.evaluate`; None for a program without bfloat16.

    XLA computes bfloat16 in float32 on a CPU, and leaves out a rounding where what reads a result
    is fused with what makes it. Where a result is read twice, one program fuses what another does
    not: it differs in the last place, and codes made of it by one.
    """
    return settled if _has_half(program.jaxpr.jaxpr) else None


def _has_half(jaxpr: jex_core.Jaxpr) -> bool:
    made = (var.aval for eqn in jaxpr.eqns for var in eqn.outvars)
    if any(getattr(aval, "dtype", None) == jnp.bfloat16 for aval in made):
        return True
    inner = (program for eqn in jaxpr.eqns for program in programs_in(eqn.params))
    return any(_has_half(getattr(program, "jaxpr", program)) for program in inner)
