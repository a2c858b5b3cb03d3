"""Which leaves of a parameter tree are kernels, where no model tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpreter import Op, Operand, Role, Site
from quantjax.qtensor import is_quantized

NO_KERNELS = frozenset({"bias", "bias_n", "scale", "offset", "beta", "gamma", "mean", "var"})
"""Last parts of names of what is added or scaled, whatever its rank: biases of attention have a row
for each head, those of layers stacked in a scan a row for each layer."""
AVERAGES = frozenset({"average", "hidden"})
"""The same in folders that end in ``_ema``: Haiku's running statistics, of the input's rank."""
BOX = "value"
"""What Flax's variables and boxes put behind the name of what they hold."""


def kernels_in(named: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point arrays of rank 2 or more that are not quantized yet, and by their names no
    biases and no parts of a normalization.

    Haiku's ``b`` is a bias beside a ``w`` of more axes.

    >>> list(kernels_in({"Dense_0/kernel": jnp.ones((2, 2)), "query/bias": jnp.ones((2, 2))}))
    ['Dense_0/kernel']
    """
    ranks = {name.removesuffix(f"/{BOX}"): np.ndim(leaf) for name, leaf in named.items()}
    return {
        name: leaf
        for name, leaf in named.items()
        if not is_quantized(leaf)
        and np.ndim(leaf) >= 2
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and not _is_no_kernel(name.removesuffix(f"/{BOX}"), ranks)
    }


def _is_no_kernel(name: str, ranks: Mapping[str, int]) -> bool:
    folder, slash, last = name.rpartition("/")
    if last == "b" and ranks.get(f"{folder}{slash}w", 0) > ranks[name]:
        return True
    return last in NO_KERNELS or (folder.endswith("_ema") and last in AVERAGES)


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
