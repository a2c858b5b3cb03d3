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
from quantjax.formats import Format
from quantjax.granularity import expand
from quantjax.integers import IntegerOperand, int8_codes, shift_of
from quantjax.layout import STEP, codes_in_product
from quantjax.packing import Packing, unpack
from quantjax.products import Coded
from quantjax.qtensor import QTensor
from quantjax.quantizer import Quantizer
from quantjax.simulation import centered_codes, prepare
from quantjax.transforms.keys import Key
from quantjax.transforms.stored import StoredWeight, for_every_entry


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters"],
    meta_fields=["packing", "format"],
)
@dataclasses.dataclass(frozen=True)
class Reading:
    """What is left to do with stored codes at their product; nothing by default.

    Ahead of a scan it would be done for all layers, and for all rows of a table of which a lookup
    reads some: XLA moves no gather of levels behind another.

    Attributes:
      packing: of codes that share bytes still.
      format: of codes that are no integers, and have to become levels.
      parameters: the width and theta by which they do.
    """

    packing: Packing | None = None
    format: Format | None = None
    parameters: tuple[Any, ...] = ()

    def of(self, stored: jax.Array) -> jax.Array:
        """The integers, or the level of each code in float32."""
        codes = stored if self.packing is None else unpack(stored, self.packing)
        return codes if self.format is None else self.format.decode(codes, *self.parameters)


class Codes(NamedTuple):
    """One operand of a product: ``operand ≈ (codes - zero_point) · scale``; of any dtype.

    Where codes are no integers, their levels stand for them; ``reading`` says how they are found.
    """

    codes: jax.Array
    zero_point: jax.Array
    scale: jax.Array
    reading: Reading = Reading()

    def read(self) -> Codes:
        """With integers or levels for what was stored."""
        return self._replace(codes=self.reading.of(self.codes), reading=Reading())


def stored_codes(
    weight: StoredWeight, tensor: QTensor, *, is_shared: bool
) -> tuple[jax.Array, Reading]:
    """A frozen weight as it lies at its product, and what has to be done there.

    Args:
      is_shared: whether the steps of a loop share it, so that all is done ahead.
    """
    site, moves = weight.entry.site, weight.moves
    are_integers = tensor.format.largest_centered_code(symmetric=True) is not None
    if is_shared or not (are_integers or _is_decoded_alike(tensor, site.steps)):
        return codes_in_product(tensor.levels(), moves), Reading()
    stays = bool(site.steps) and all(move.neutral or move.name == STEP for move in moves)
    packing = tensor.packing if stays and not site.op.is_lookup else None
    held = codes_in_product(tensor.codes if packing is None else tensor.stored, moves)
    if are_integers:
        return held, Reading(packing)
    return held, Reading(packing, tensor.format, (tensor.qparams.bits, tensor.qparams.theta))


def _is_decoded_alike(tensor: QTensor, steps: Sequence[int]) -> bool:
    """Whether a width and theta decode all codes of a layer, and no group has its own."""
    by_group: list[jax.Array] = []

    def noted(array: jax.Array) -> jax.Array:
        by_group.append(array)
        return array

    bits, theta = tensor.qparams.bits, tensor.qparams.theta
    tensor.format.map_groups(theta, noted)
    leading = {jnp.shape(leaf)[: len(steps)] for leaf in jax.tree.leaves(theta)}
    return not by_group and jnp.shape(bits) == tuple(steps) and leading <= {tuple(steps)}


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
    """Centered, as floats."""
    values = codes.codes.astype(jnp.float32)
    return Coded(values - expand(codes.zero_point, values.shape), codes.scale)
