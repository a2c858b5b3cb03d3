"""One operand of an executed product: codes, what they stand for, and their forms in products."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.affine import QParams, has_codes
from quantjax.arithmetic import Arithmetic
from quantjax.formats import Format, Theta
from quantjax.granularity import expand
from quantjax.integers import IntegerOperand, int8_codes, shift_of
from quantjax.products import Coded
from quantjax.qtensor import QTensor
from quantjax.quantizer import Quantizer
from quantjax.simulation import centered_codes, prepare
from quantjax.transforms.keys import Key
from quantjax.transforms.stored import for_every_entry


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bits", "theta"], meta_fields=["format"]
)
@dataclasses.dataclass(frozen=True)
class Levels:
    """What the codes of one tensor stand for, where it is decoded at its product.

    Ahead of a scan that would be done for all layers, and for all rows of a table of which a lookup
    reads some: XLA moves no gather of levels behind another.
    """

    format: Format
    bits: jax.Array
    theta: Theta

    def of(self, codes: jax.Array) -> jax.Array:
        """The level of each code, float32."""
        return self.format.decode(codes, self.bits, self.theta)


class Codes(NamedTuple):
    """One operand of a product: ``operand ≈ (codes - zero_point) · scale``; of any dtype.

    Where codes are no integers, their levels stand for them, or ``levels`` says what they are.
    """

    codes: jax.Array
    zero_point: jax.Array
    scale: jax.Array
    levels: Levels | None = None

    def decoded(self) -> Codes:
        """With levels in place of codes that are no integers."""
        if self.levels is None:
            return self
        return self._replace(codes=self.levels.of(self.codes), levels=None)


def levels_at_product(tensor: QTensor, steps: Sequence[int]) -> Levels | None:
    """None where codes are integers, or where what decodes them differs by group.

    Args:
      steps: how many layers are stacked, for each of which there is a width.
    """
    format, (bits, theta) = tensor.format, (tensor.qparams.bits, tensor.qparams.theta)
    by_group: list[jax.Array] = []

    def noted(array: jax.Array) -> jax.Array:
        by_group.append(array)
        return array

    format.map_groups(theta, noted)
    if format.largest_centered_code(symmetric=True) is not None or by_group:
        return None
    leading = {jnp.shape(leaf)[: len(steps)] for leaf in jax.tree.leaves(theta)}
    of_layers = jnp.shape(bits) == tuple(steps) and leading <= {tuple(steps)}
    return Levels(format, bits, theta) if of_layers else None


def encoded(x: jax.Array, qparams: QParams, quantizer: Quantizer, key: Key | None) -> Codes:
    """The codes of a tensor that comes in float, as floats."""
    return _encoded(for_every_entry(quantizer).arithmetic, x, qparams, key)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _encoded(arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: Key | None) -> Codes:
    x, qparams = prepare(x, qparams, arithmetic)
    zero_point = jnp.round(jnp.asarray(qparams.zero_point, jnp.float32))
    centered = centered_codes(x, qparams, arithmetic, key)
    centered = jnp.where(jnp.isnan(centered), 0.0, centered)
    scale = jnp.where(has_codes(qparams), arithmetic.usable_scale(qparams), jnp.nan)
    return Codes(centered + expand(zero_point, x.shape), zero_point, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def not_differentiable(site: str, codes: jax.Array) -> jax.Array:
    """Codes on their way to int8, behind which every gradient would be 0 without a word."""
    del site
    return codes


@not_differentiable.defjvp
def _not_differentiable_jvp(site: str, primals: Any, tangents: Any) -> Any:
    raise errors.FreezeError(
        "integer products have no derivative",
        where=f"qj.execute, site {site}",
        why="codes are whole numbers; behind them every gradient would be 0",
        fix="qj.fake_quantize(f, plan)(qstate, qj.dequantize_params(qparams), x), which has the "
        "same codes, or jax.lax.stop_gradient(x) for what is fixed",
    )


def integer_operand(codes: Codes, quantizer: Quantizer) -> IntegerOperand:
    """Codes in int8; the scale is NaN where int8 does not hold the zero point."""
    return _in_int8(quantizer.format, codes, is_symmetric=quantizer.symmetric)


@functools.partial(jax.jit, static_argnums=0, static_argnames="is_symmetric", inline=True)
def _in_int8(format: Format, codes: Codes, *, is_symmetric: bool) -> IntegerOperand:
    shift = shift_of(format)
    values = codes.codes
    if jnp.issubdtype(values.dtype, jnp.floating):
        values = (values - float(shift)).astype(jnp.int8)
    else:
        values = int8_codes(values, format)
    zero_point = codes.zero_point - float(shift)
    if is_symmetric and not shift:
        return IntegerOperand(values, None, jnp.where(zero_point == 0, codes.scale, jnp.nan))
    usable = (zero_point >= -128) & (zero_point <= 127)
    factor = jnp.where(usable, codes.scale, jnp.nan)
    return IntegerOperand(values, zero_point.astype(jnp.int32), factor)


def in_float_codes(codes: Codes) -> Coded:
    values = codes.codes.astype(jnp.float32)
    return Coded(values - expand(codes.zero_point, values.shape), codes.scale)
