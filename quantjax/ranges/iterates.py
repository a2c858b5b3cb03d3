"""What rules that try one scale after another share: units, codes, the best of what was tried.

Such a rule moves the bounds of a range, from which scale and zero point follow as they do for every
other rule, scale rule of the format included. It sees what the forward pass will do with them, and
keeps the bounds that were best for each group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.affine import QParams, qparams_from_range
from quantjax.formats import REAL, Format, divide_by_scale, exponent_of, power_of_two
from quantjax.granularity import expand, reduce_to
from quantjax.rounding import HALF_EVEN

_LARGEST_UNIT = 126  # 2^126 has a reciprocal that is a normal float32 number


class Problem(NamedTuple):
    """A tensor to be fitted. Constants of a program: format and symmetry are no arrays.

    Attributes:
      x: the tensor over the power of two at the largest magnitude of each group, so that no square
        leaves float32. Exact, as are scales over it.
      unit: that power, the shape of the scale.
      bits: the width in use, a scalar.
      format: which levels.
      symmetric: whether the zero point is 0.
    """

    x: Float[Array, "..."]
    unit: Float[Array, "..."]
    bits: Float[Array, ""]
    format: Format
    symmetric: bool


class Bounds(NamedTuple):
    """A range in units of the problem, the shape of the scale; any scale has one.

    ``low = (q_min - zero_point) · scale``, ``high = (q_max - zero_point) · scale``; symmetric,
    ``∓steps · scale``.
    """

    low: Float[Array, "..."]
    high: Float[Array, "..."]


class Quantized(NamedTuple):
    """Values as the forward pass has them.

    Attributes:
      scale: in units of the problem, the shape of the scale.
      zero_point: an integer, the shape of the scale.
      centered: ``level - zero_point``, the shape of the values.
      residual: ``values - scale · centered``.
    """

    scale: Float[Array, "..."]
    zero_point: Float[Array, "..."]
    centered: Float[Array, "..."]
    residual: Float[Array, "..."]


class Best(NamedTuple):
    """The bounds with the smallest loss so far, group by group."""

    bounds: Bounds
    loss: Float[Array, "..."]


def problem_of(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    symmetric: bool,
) -> Problem:
    """The tensor in units in which squares and their sums are float32 numbers.

    What is fitted is constant to a gradient.
    """
    x = lax.stop_gradient(jnp.asarray(tensor, jnp.float32))
    bits = lax.stop_gradient(jnp.asarray(bits, jnp.float32))
    largest = reduce_to(jnp.abs(x), scale_shape, jnp.max, initial=0.0)
    exponent = jnp.clip(exponent_of(largest), -_LARGEST_UNIT, _LARGEST_UNIT)
    x = x * expand(power_of_two(-exponent), x.shape)
    return Problem(x, power_of_two(exponent), bits, format, symmetric)


def whole_range(problem: Problem) -> Bounds:
    """From the smallest to the largest entry; symmetric, as far as the largest magnitude."""
    x, shape = problem.x, problem.unit.shape
    if problem.symmetric:
        largest = reduce_to(jnp.abs(x), shape, jnp.max, initial=0.0)
        return Bounds(-largest, largest)
    low = reduce_to(x, shape, jnp.min, initial=0.0)
    return Bounds(low, reduce_to(x, shape, jnp.max, initial=0.0))


def bounds_of(problem: Problem, scale: jax.Array, zero_point: jax.Array) -> Bounds:
    """The range that has this scale, in units of the problem, and this zero point."""
    if problem.symmetric:
        reach = scale * problem.format.steps(problem.bits, symmetric=True)
        return Bounds(-reach, reach)
    low, high = problem.format.level_range(problem.bits)
    return Bounds((low - zero_point) * scale, (high - zero_point) * scale)


def qparams_of(problem: Problem, bounds: Bounds) -> QParams:
    """Scale and zero point of a range, in units of the tensor, as every rule has them."""
    return qparams_from_range(
        bounds.low * problem.unit,
        bounds.high * problem.unit,
        problem.bits,
        format=problem.format,
        symmetric=problem.symmetric,
        calibrated=jnp.asarray(True),
    )


def quantized(problem: Problem, bounds: Bounds, values: jax.Array) -> Quantized:
    """What becomes of ``values``, the tensor's shape and units, with the scales of a range."""
    scale, zero_point, bits, _ = qparams_of(problem, bounds)
    scale = divide_by_scale(scale, problem.unit)
    spread, zero = expand(scale, values.shape), expand(zero_point, values.shape)
    ratio = divide_by_scale(values, spread)
    centered = problem.format.snap(ratio, zero, bits, HALF_EVEN).level - zero
    return Quantized(scale, zero_point, centered, values - spread * centered)


def group_sums(problem: Problem, entries: jax.Array) -> jax.Array:
    """The sum over each group."""
    return reduce_to(entries, problem.unit.shape, jnp.sum)


def fitted_scale(
    problem: Problem, centered: jax.Array, target: jax.Array, otherwise: jax.Array
) -> jax.Array:
    """``⟨target, c⟩ / ⟨c, c⟩`` of each group, which minimizes ``‖target - scale · c‖²``.

    ``otherwise`` where that is no positive number: all codes are 0, or on the wrong side.
    """
    product = group_sums(problem, target * centered)
    squares = group_sums(problem, centered * centered)
    usable = (product > 0.0) & (squares > 0.0) & jnp.isfinite(product) & jnp.isfinite(squares)
    scale = divide_by_scale(product, jnp.where(usable, squares, 1.0))
    return jnp.where(usable & (scale > 0.0), scale, otherwise)


def nothing_yet(bounds: Bounds) -> Best:
    """These bounds, until some have a loss."""
    return Best(bounds, jnp.full_like(bounds.low, jnp.inf))


def better(best: Best, bounds: Bounds, loss: jax.Array) -> Best:
    """For each group the bounds with the smaller loss; those so far where they are equal or NaN."""
    wins = loss < best.loss
    low, high = (jnp.where(wins, new, old) for new, old in zip(bounds, best.bounds, strict=True))
    return Best(Bounds(low, high), jnp.where(wins, loss, best.loss))


def with_neighbours(
    problem: Problem, best: Best, loss_of: Callable[[jax.Array], jax.Array]
) -> Best:
    """The best, or the powers of two next to it where scales are such: 2, 1/2 and 1/4 times it.

    No small move of a real scale reaches them: the scale rule takes it back.

    Args:
      loss_of: residual, the shape of the tensor -> loss of each group.
    """
    if not problem.format.scale_rule.is_power_of_two:
        return best
    low, high = best.bounds
    for factor in (2.0, 0.5, 0.25):
        bounds = Bounds(factor * low, factor * high)
        best = better(best, bounds, loss_of(quantized(problem, bounds, problem.x).residual))
    return best


def moved(before: Bounds, after: Bounds) -> Bool[Array, ""]:
    """Whether any bound differs."""
    return jnp.any(before.low != after.low) | jnp.any(before.high != after.high)


def fitted(problem: Problem, start: Best, found: Best, *, power: float | jax.Array) -> QParams:
    """The QParams of what was found for each group; of the start, where together they are worse.

    They can be where the scale of a group depends on other groups, as for NVFP4: each group was
    best in the company of scales that the others did not keep.

    Args:
      start, found: the first bounds and the best ones.
      power: the loss is ``Σ |error|^power``.
    """
    if problem.format.scale_rule == REAL:
        return qparams_of(problem, found.bounds)
    residual = quantized(problem, found.bounds, problem.x).residual
    loss = group_sums(problem, jnp.abs(residual) ** power)
    weight = (problem.unit / jnp.max(problem.unit, initial=2.0**-_LARGEST_UNIT)) ** power
    worse = jnp.sum(weight * loss) > jnp.sum(weight * start.loss)
    low, high = (
        jnp.where(worse, old, new) for old, new in zip(start.bounds, found.bounds, strict=True)
    )
    return qparams_of(problem, Bounds(low, high))
