"""Which leaves of a parameter tree are kernels, where no model tells."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from quantjax.interpreter import Op, Operand, Role, Site
from quantjax.qtensor import is_quantized


def is_kernel(leaf: Any) -> bool:
    """Whether it is a floating-point array of rank 2 or more that is not quantized yet."""
    is_array = not is_quantized(leaf)
    return is_array and jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def as_site(name: str, leaf: Any) -> Site:
    """A kernel as selectors see it: a weight of unknown axes."""
    shape = tuple(jnp.shape(leaf))
    operand = Operand(
        key="weight",
        role=Role.WEIGHT,
        side=1,
        shape=shape,
        dtype=str(jnp.result_type(leaf)),
        free=(),
        contracted=(),
        window=(),
        paths=(name,),
        storable=True,
    )
    return Site(
        name=name,
        op=Op.DOT,
        scope="",
        operands=(operand,),
        out_shape=(),
        contraction_size=0,
        taps=1,
        multiply_adds=0,
    )
