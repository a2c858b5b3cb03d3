"""int8 products as GPUs compute them exactly.

Seen with JAX 0.11.2 on an H200: XLA refuses convolutions of int8 into int32; cuDNN's own int8 ones
return float32, whose sums end at 2^24; and int8 dots come out doubled without an error where the
length of their sums is odd or 2, and where XLA does not tune. Here all sizes of a dot are filled up
with zeros, and a convolution is a dot of patches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax import errors

ROWS = 16
"""Rows and columns of a product are filled up to a multiple of this."""

TERMS = 32
"""Sums are filled up to a multiple of this: what one instruction of the tensor cores adds up."""


@functools.cache
def check_products() -> None:
    """One product of int8, once in a process: without autotuning XLA was seen to double them.

    Raises:
      BackendError: the product is wrong.
    """
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        one = jax.device_put(np.ones((1, 1), np.int8), jax.local_devices()[0])
        numbers = (((1,), (0,)), ((), ()))
        found = int(
            jax.jit(lambda a, b: filled_dot(a, b, dimension_numbers=numbers))(one, one)[0, 0]
        )
    if found != 1:
        raise errors.BackendError(
            f"a product of int8 came out as {found} instead of 1",
            where=jax.devices()[0].device_kind,
            why="XLA's int8 products are wrong here; JAX 0.11.2 doubles them without autotuning",
            fix="take --xla_gpu_autotune_level=0 out of XLA_FLAGS, or qj.fake_quantize instead",
        )


def filled_dot(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.dot_general`` of int8 into int32, as a batch of matrices filled up with zeros."""
    (left, right), (left_batch, right_batch) = numbers["dimension_numbers"]
    batch = [lhs.shape[axis] for axis in left_batch]
    x, rows = _matrices(lhs, left_batch, left)
    w, columns = _matrices(rhs, right_batch, right)
    x, w = (_filled(_filled(side, 1, ROWS), 2, TERMS) for side in (x, w))
    sums = lax.dot_general(x, w, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    sums = sums[:, : math.prod(rows), : math.prod(columns)]
    return sums.reshape(*batch, *rows, *columns)


def filled_ragged(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """``lax.ragged_dot`` of int8 into int32, all sizes filled up with zeros."""
    rows, columns = lhs.shape[0], rhs.shape[2]
    lhs = _filled(_filled(lhs, 0, ROWS), 1, TERMS)
    rhs = _filled(_filled(rhs, 1, TERMS), 2, ROWS)
    sums = lax.ragged_dot(lhs, rhs, preferred_element_type=jnp.int32, **numbers)
    return sums[:rows, :columns]


def _matrices(
    x: jax.Array, batch: Sequence[int], contracted: Sequence[int]
) -> tuple[jax.Array, list[int]]:
    """The operand as ``(batch, free, contracted)``, and the sizes of its free axes."""
    free = [axis for axis in range(x.ndim) if axis not in (*batch, *contracted)]
    sizes = [[x.shape[axis] for axis in role] for role in (batch, free, contracted)]
    return lax.transpose(x, (*batch, *free, *contracted)).reshape([*map(math.prod, sizes)]), sizes[
        1
    ]


def _filled(x: jax.Array, axis: int, step: int) -> jax.Array:
    """Zeros behind the entries of an axis, up to a multiple of ``step``."""
    missing = -x.shape[axis] % step
    if not missing:
        return x
    widths = [(0, missing if a == axis else 0, 0) for a in range(x.ndim)]
    return lax.pad(x, np.zeros((), x.dtype), widths)
