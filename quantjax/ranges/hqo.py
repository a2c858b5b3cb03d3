"""Half-quadratic optimization: scales and zero points for a loss that forgives outliers."""

from __future__ import annotations

import enum
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax import errors
from quantjax._compat import varying_like
from quantjax.affine import QParams
from quantjax.arguments import expect
from quantjax.formats import Format, divide_by_scale, power_of_two
from quantjax.granularity import expand, reduce_to
from quantjax.ranges.base import (
    Configured,
    FitRule,
    checked_iterations,
    known_number,
    valid_where,
)
from quantjax.ranges.iterates import (
    Best,
    Bounds,
    Problem,
    Quantized,
    better,
    bounds_of,
    fitted,
    fitted_scale,
    group_sums,
    nothing_yet,
    problem_of,
    quantized,
    whole_range,
    with_neighbours,
)

POWER, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20
_ABOVE_ZERO = sys.float_info.min


class Solved(enum.Enum):
    """What half-quadratic optimization has a closed form for.

    ``SCALE``: the scale; the zero point is 0, for symmetric quantizers. ``ZERO_POINT``: the zero
    point, and the scale for it, for asymmetric ones.
    """

    SCALE = "scale"
    ZERO_POINT = "zero_point"


class _Constants(NamedTuple):
    solved: Solved
    p: float | jax.Array
    beta: float | jax.Array
    kappa: float | jax.Array
    iterations: int


class _State(NamedTuple):
    bounds: Bounds
    best: Best
    beta: Float[Array, ""]


def _shrunk(error: jax.Array, beta: jax.Array, p: float | jax.Array) -> jax.Array:
    """``sign(e) · max(|e| - |e|^(p-1) / β, 0)``; 0 where the error is 0."""
    size = jnp.abs(error)
    present = size > 0.0
    threshold = jnp.where(present, size, 1.0) ** (p - 1.0) / beta
    return jnp.where(present, jnp.sign(error) * jnp.maximum(size - threshold, 0.0), 0.0)


def _solved(problem: Problem, now: Quantized, target: jax.Array) -> Bounds:
    """The range whose scale, and zero point unless symmetric, fit the codes to the target."""
    scale, zero_point, centered, _ = now
    if not problem.symmetric:
        ratio = divide_by_scale(target, expand(scale, target.shape))
        shift = reduce_to(centered - ratio, scale.shape, jnp.mean)
        low, high = problem.format.level_range(problem.bits)
        following = jnp.clip(jnp.round(zero_point + shift), low, high)
        centered = centered + expand(zero_point - following, target.shape)
        zero_point = following
    return bounds_of(problem, fitted_scale(problem, centered, target, scale), zero_point)


def _fit(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *,
    constants: _Constants,
) -> QParams:
    solved, p, beta, kappa, iterations = constants
    symmetric = solved is Solved.SCALE
    if not symmetric and not format.has_zero_point:
        raise errors.FormatError(
            f"the format {format.name} has no zero point to solve for",
            where=f"HQO_ZERO_POINT for a tensor of shape {jnp.shape(tensor)}",
            fix="HQO_SCALE, or an integer format",
        )
    problem = problem_of(tensor, scale_shape, format, bits, symmetric=symmetric)
    x, start = problem.x, whole_range(problem)
    step = (start.high - start.low) * power_of_two(-problem.bits.astype(jnp.int32))
    step = expand(jnp.where(step > 0.0, step, 1.0), x.shape)

    def loss_of(residual: jax.Array) -> jax.Array:
        return group_sums(problem, jnp.abs(residual) ** p)

    def iterate(_: jax.Array, state: _State) -> _State:
        now = quantized(problem, state.bounds, x)
        best = better(state.best, state.bounds, loss_of(now.residual))
        kept = step * _shrunk(divide_by_scale(now.residual, step), state.beta, p)
        return _State(_solved(problem, now, x - kept), best, state.beta * kappa)

    first = _State(start, nothing_yet(start), jnp.full((), beta, jnp.float32))
    # Once more than that, to try the last bounds.
    first = varying_like(first, (problem.x, problem.bits))
    found = lax.fori_loop(0, iterations + 1, iterate, first).best
    found = with_neighbours(problem, found, loss_of)
    loss = loss_of(quantized(problem, start, x).residual)
    return fitted(problem, Best(start, loss), found, power=p)


def _fit_at(
    tensor: jax.Array,
    scale_shape: tuple[int, ...],
    format: Format,
    bits: jax.Array,
    *numbers: jax.Array,
    solved: Solved,
    iterations: int,
) -> QParams:
    p, beta, kappa = (jnp.asarray(number, jnp.float32) for number in numbers)
    constants = _Constants(solved, p, beta, kappa, iterations)
    found = _fit(tensor, scale_shape, format, bits, constants=constants)
    grows = (kappa >= 1.0) & jnp.isfinite(kappa)
    return valid_where((p > 0.0) & (p <= 1.0) & (beta > 0.0) & jnp.isfinite(beta) & grows, found)


def _rule(constants: _Constants) -> FitRule:
    solved, p, beta, kappa, iterations = constants
    name = f"hqo-{solved.value}"
    if (p, beta, kappa, iterations) != (POWER, BETA, KAPPA, ITERATIONS):
        name += f"({float(p):g},{float(beta):g},{float(kappa):g},{iterations})"
    needs = solved is Solved.ZERO_POINT
    return FitRule(name, Configured.of(_fit, constants=constants), needs_zero_point=needs)


def hqo(
    *,
    solved: Solved,
    p: float | jax.Array = POWER,
    beta: float | jax.Array = BETA,
    kappa: float | jax.Array = KAPPA,
    iterations: int = ITERATIONS,
) -> FitRule:
    """A small ``‖w - s (q - z)‖_p^p``, ``p < 1``, by half-quadratic splitting, for each group.

    With ``e`` for the errors that are let be, ``min ‖e‖_p^p + β/2 ‖w - s (q - z) - e‖²`` in turn
    over ``e`` and over scale or zero point; then ``β ← κ β``. One iteration:

        ``q = clip(round(w / s) + z)``
        ``e = shrink(w - s (q - z))``, ``shrink(x) = sign(x) max(|x| - |x|^(p-1) / β, 0)``
        ``z ← clip(round(mean(q - (w - e) / s)))``, for ``Solved.ZERO_POINT`` only
        ``s ← ⟨w - e, q - z⟩ / ⟨q - z, q - z⟩``

    It starts from ``MIN_MAX``. Of start and iterates, the one with the smallest ``‖w - y‖_p^p`` is
    kept for each group (for powers of two also of their neighbours), ``y`` being what the forward
    pass makes of ``w``, with the rounded zero point and the format's scale rule. That is never
    above that of the start; where scales depend on other groups (NVFP4), for the whole tensor.

    Differences to the published program (symmetric: to Brevitas'):

    - Errors are in units of ``(max - min) / 2^b``, about a step, so that weights of any size are
      treated alike. The program takes them as they are: weights much smaller than 1 then have
      ``e = 0``, and ``p`` only decides which iterate is kept.
    - It keeps the scale and has zero points that are real. Here they are integers, and without the
      scale nothing could be gained: that of the range clips no code, and then errors are those of
      rounding to multiples of the scale, whatever the zero point.
    - It stops at the first iterate that is no better. Later ones may be: all are tried.

    Args:
      solved: ``Solved.SCALE`` for symmetric quantizers, any format with levels of its own;
        ``Solved.ZERO_POINT`` for asymmetric ones, integers. A rule cannot see which it serves.
      p: ``p``, above 0 and at most 1. This and the next two may be traced.
      beta: ``β`` at the start; errors below ``β^(-1/(2-p))`` steps become 0.
      kappa: ``κ``, at least 1.
      iterations: how often; 0 leaves the start. Memory does not depend on it.

    Returns:
      A rule that gives ``QParams(scale, zero_point, bits)``; deterministic, the same under ``jit``
      and ``vmap``; ``bits`` may be traced. All-zero groups have scale 1.

    Raises:
      QuantizerError: parameters outside these bounds; scales are NaN where they are traced.
      FormatError, on use: ``Solved.ZERO_POINT`` for a format without a zero point; a codebook whose
        levels are to be learned.

    Sharp edges: with ``Solved.ZERO_POINT``, a quantizer that is symmetric has zero points that
    ``qj.freeze`` and ``qj.execute`` refuse; with ``Solved.SCALE``, unsigned codes clip all negative
    entries. The squared error may be above that of ``MIN_MAX``: outliers are clipped. The gain
    falls with the width, from 15 to 30 % of the loss at 2 bits to 2 % at 8.

    >>> from quantjax.formats import integer
    >>> w = jnp.array([[0.1, -0.2, 0.3, -0.4, 0.5, 4.0]])
    >>> for rule in (HQO_SCALE, HQO_ZERO_POINT):
    ...     qparams = rule.fit(w, (1, 1), integer(), jnp.float32(3))
    ...     print(round(qparams.scale.item(), 3), qparams.zero_point.item())
    1.333 0.0
    0.663 -3.0

    Source: Badri, Shaji, Half-quadratic quantization of large machine learning models, 2023, the
    section on its method.
    """
    numbers = tuple(known_number(number, "hqo") for number in (p, beta, kappa))
    for name, value, least, most, fix in (
        ("p", numbers[0], _ABOVE_ZERO, 1.0, POWER),
        ("beta", numbers[1], _ABOVE_ZERO, sys.float_info.max, BETA),
        ("kappa", numbers[2], 1.0, sys.float_info.max, KAPPA),
    ):
        if value is not None and not least <= value <= most:
            raise errors.QuantizerError(
                f"half-quadratic optimization with {name}={value:g}",
                where="the range rule hqo",
                why="0 < p <= 1, 0 < beta and 1 <= kappa make shrinking an error smaller",
                fix=f"{name}={fix}",
            )
    where, edit = "the range rule hqo", "solved=qj.ranges.Solved.SCALE"
    expect(solved, Solved, argument="solved", where=where, fix=edit)
    steps = checked_iterations(iterations, "hqo")
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        fit = Configured.of(_fit_at, solved=solved, iterations=steps)
        needs = solved is Solved.ZERO_POINT
        return FitRule(f"hqo-{solved.value}", fit, needs, parameters=(p, beta, kappa))
    return _rule(_Constants(solved, known[0], known[1], known[2], steps))


HQO_SCALE = hqo(solved=Solved.SCALE)
"""The scale for a symmetric quantizer, ``p = 0.7``; see :func:`hqo`."""

HQO_ZERO_POINT = hqo(solved=Solved.ZERO_POINT)
"""Zero point and scale for an asymmetric integer quantizer, ``p = 0.7``; see :func:`hqo`."""
