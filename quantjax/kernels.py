"""Which leaves of a parameter tree are kernels, where no model tells."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from quantjax.interpreter import Op, Operand, Role, Site
from quantjax.qtensor import is_quantized

NO_KERNELS = frozenset({"bias", "scale", "offset", "beta", "gamma", "mean", "var"})
"""Last parts of names of what is added or scaled, whatever its rank: biases of attention have a row
for each head, those of layers stacked in a scan a row for each layer."""
AVERAGES = frozenset({"average", "hidden"})
"""The same in folders that end in ``_ema``: Haiku's running statistics, of the input's rank."""


def is_kernel(name: str, leaf: Any) -> bool:
    """Whether it is a floating-point array of rank 2 or more that is not quantized yet, and by its
    name no bias and no part of a normalization.

    >>> is_kernel("Dense_0/kernel", jnp.ones((2, 2))), is_kernel("query/bias", jnp.ones((2, 2)))
    (True, False)
    """
    folder, _, last = name.rpartition("/")
    if is_quantized(leaf) or last in NO_KERNELS or (folder.endswith("_ema") and last in AVERAGES):
        return False
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


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
