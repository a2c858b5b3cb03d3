"""How a product of int8 operands reaches XLA: one table, by primitive and backend.

A form takes int8 operands and the dimension numbers, and returns int32 sums. All forms of a
primitive return the same integers; which is fastest is a matter of measurement. Those of GPUs are
exact on every backend, those of others are not exact on GPUs: where a program is traced for another
backend, both are traced, and the platform that it is lowered for decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.integers import cpu, gpu
from quantjax.integers.direct import Lowering, direct_conv, direct_dot, direct_ragged
from quantjax.integers.patches import conv_of_patches
from quantjax.interpreter import Op


def gpu_conv(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
    """A dot of all patches of int8 into int32."""
    return conv_of_patches(lhs, rhs, dot=gpu.filled_dot, **numbers)


DEFAULT: Mapping[Op, Lowering] = {
    Op.DOT: direct_dot,
    Op.CONV: direct_conv,
    Op.RAGGED: direct_ragged,
}
CPU: Mapping[Op, Lowering] = {**DEFAULT, Op.DOT: cpu.rows_dot, Op.CONV: cpu.conv}
GPU: Mapping[Op, Lowering] = {
    Op.DOT: gpu.filled_dot,
    Op.CONV: gpu_conv,
    Op.RAGGED: gpu.filled_ragged,
}
TABLE: Mapping[str, Mapping[Op, Lowering]] = {"cpu": CPU, "gpu": GPU, "tpu": DEFAULT}
"""By backend; a backend that is not listed takes the default."""
SUMS: Mapping[str, Callable[[jax.Array, Sequence[int]], jax.Array]] = {"cpu": cpu.sums_by_product}
"""By backend, where sums of codes are a product with ones rather than a reduction."""


def lowering(op: Op) -> Lowering:
    """The form of a primitive on the platform that the program will be lowered for.

    Raises:
      BackendError: the backend in use multiplies int8 wrongly.
    """
    backend = jax.default_backend()
    if backend == "gpu":
        gpu.check_products()
    own = TABLE.get(backend, DEFAULT)[op]
    if backend == "gpu" or own is GPU[op]:
        return own

    def form(lhs: jax.Array, rhs: jax.Array, **numbers: Any) -> jax.Array:
        if op is Op.CONV and not all(isinstance(size, int) for size in lhs.shape[1:]):
            return own(lhs, rhs, **numbers)  # patches of symbolic sizes cannot be cut out
        return _by_platform(GPU[op], own, lhs, rhs, **numbers)

    return form


def sums_over(codes: jax.Array, axes: Sequence[int], *, has_batch: bool) -> jax.Array:
    """``Σ codes`` over some axes, which keep size 1, in int32: what zero points are multiplied by.

    Args:
      has_batch: whether others of the axes are a batch of products; one dot has none then.
    """

    def reduced(codes: jax.Array) -> jax.Array:
        return jnp.sum(codes, axis=tuple(axes), keepdims=True, dtype=jnp.int32)

    by_product = SUMS.get(jax.default_backend())
    if by_product is None or not axes or has_batch:
        return reduced(codes)
    return _by_platform(reduced, lambda codes: by_product(codes, axes), codes)


def _by_platform(
    on_gpu: Callable[..., jax.Array],
    elsewhere: Callable[..., jax.Array],
    *codes: jax.Array,
    **numbers: Any,
) -> jax.Array:
    """One of two forms of the same sums, by the platform that they are lowered for."""
    gpu_form = functools.partial(on_gpu, **numbers)
    sums: jax.Array = lax.platform_dependent(
        *codes, cuda=gpu_form, rocm=gpu_form, default=functools.partial(elsewhere, **numbers)
    )
    return sums
