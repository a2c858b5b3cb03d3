"""The arithmetic of one quantized tensor in simulation, with an estimator's gradient.

Two forms of it: :func:`apply`, which is ``qj.fake_quant``, returns reals ``s · (q - z)``;
:func:`centered_codes` returns the levels ``q - z`` as floats, for products that multiply codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from quantjax import errors
from quantjax.affine import DIVIDED, QParams, where_bypassed
from quantjax.arithmetic import Arithmetic
from quantjax.borders import rounds_outside
from quantjax.estimators import Estimator, Parameters, Point
from quantjax.estimators.base import at_a_width
from quantjax.estimators.clipped import inside
from quantjax.estimators.gradients import by_sign, round_through
from quantjax.formats import IntegerFormat, Snapped, Theta, divide_by_scale
from quantjax.granularity import expand
from quantjax.lean import elementwise, narrowed, widened
from quantjax.rounding import HALF_AWAY, HALF_EVEN
from quantjax.symbolic import at_most
from quantjax.tangents import instantiated, moves, moving_as_product, sum_of

ENTRIES_PER_SCALE = 64


class _Given(NamedTuple):
    """The arrays beside ``x``, expanded to its shape; ``noise`` is None unless it is needed.

    Where one number holds for the whole tensor it is a scalar: less to trace and to compile. There
    is no ``zero_point`` where it is known to be 0.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    bits: jax.Array
    theta: Theta
    own: Parameters
    noise: jax.Array | None


class _Local(NamedTuple):
    slope: jax.Array
    passed: jax.Array
    point: Point


def _snapped(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> tuple[jax.Array, Snapped]:
    """``x/s``, and the level that it becomes."""
    format, scaling = arithmetic.format, arithmetic.scaling
    scaled = scaling.quotient(x, given.scale)
    rounding = arithmetic.rounding.given(given.noise)
    if given.zero_point is None:
        assert isinstance(format, IntegerFormat)
        return scaled, format.snap(scaled, None, given.bits, rounding, given.theta)
    zero = _zero_point(given)
    inside, outside = (
        (scaled + zero, jnp.zeros_like(zero)) if scaling.adds_first else (scaled, zero)
    )
    return scaled, format.snap(inside, outside, given.bits, rounding, given.theta)


def _zero_point(given: _Given) -> jax.Array:
    if given.zero_point is None:
        return jnp.zeros((), jnp.float32)
    return HALF_EVEN.apply(given.zero_point)


def _local(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> _Local:
    """The estimator's slope, ``slope · x/s``, and what it judged by; all float32."""
    format, estimator = arithmetic.format, arithmetic.estimator
    zero, bits, theta = _zero_point(given), given.bits, given.theta
    scaled, snapped = _snapped(arithmetic, x, given)
    low, high = format.level_range(bits, theta)
    point = Point(
        scaled + zero,
        snapped.unclipped,
        snapped.level,
        low,
        high,
        zero,
        given.scale,
        bits,
        given.own,
    )
    slope = estimator.slope_at(point)
    # Not a plain product: where the quotient is infinite and clipped, 0 · ∞ would be NaN.
    passed = jnp.where(slope == 0.0, 0.0, slope * scaled)
    return _Local(slope, passed, point)


def _has_borders(arithmetic: Arithmetic, x: jax.Array, given: _Given, d: _Given) -> bool:
    """Whether ``x`` alone moves, and its slope is 1 between two numbers and 0 elsewhere.

    Comparing costs a fraction of dividing and rounding once more. It pays where many entries have
    a scale in common, for which the two numbers are found; of a batch of any size they are many,
    unless it has a scale for each row.
    """
    pays = at_most(given.scale.size * ENTRIES_PER_SCALE, x.size)
    if pays is None:
        pays = isinstance(given.scale.size, int)
    return (
        not moves(d)
        and isinstance(arithmetic.format, IntegerFormat)
        and arithmetic.rounding in (HALF_EVEN, HALF_AWAY)
        and arithmetic.estimator.slope is inside
        and arithmetic.scaling == DIVIDED
        and pays
    )


def _is_outside(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    """Whether the range has no level for ``x``; nowhere under bypass."""
    low, high = arithmetic.format.level_range(given.bits, given.theta)
    if given.zero_point is not None:
        low, high = low - _zero_point(given), high - _zero_point(given)
    return rounds_outside(x, given.scale, low, high, given.bits, arithmetic.rounding)


def _tangent_of_theta(
    arithmetic: Arithmetic, x: jax.Array, given: _Given, d: _Given, point: Point
) -> list[jax.Array]:
    """How the levels at hand move with ``theta``, their codes staying what they are; terms."""
    terms = []
    if arithmetic.estimator.to_parameters is not None and moves(d.own):
        terms.append(arithmetic.estimator.to_parameters(point, instantiated(d.own)))
    if not moves(d.theta):
        return terms
    format, bits, theta, dtheta = arithmetic.format, given.bits, given.theta, d.theta
    levels = _levels(arithmetic, x, given) + _zero_point(given)
    codes = format.encode(levels, bits, theta)
    decode = lambda theta: format.decode(codes, bits, theta)  # noqa: E731
    return [*terms, jax.jvp(decode, (theta,), (instantiated(dtheta),))[1]]


def _again(given: _Given) -> _Given:
    """The same for the derivative, which divides once more: a quotient that is shared with the code
    would be written out and read twice, and the code not be computed where ``x`` is."""
    return given._replace(scale=lax.optimization_barrier(given.scale))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _levels(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    """Levels minus zero point; jitted, to be traced once for the value and for its derivative."""
    level = _snapped(arithmetic, x, given)[1].level
    if given.zero_point is None:
        return level
    return elementwise(lax.sub, level, _zero_point(given))


def _moved(
    arithmetic: Arithmetic, primals: Any, tangents: Any, multiplied: jax.Array | float = 0.0
) -> jax.Array:
    """How ``s · centered`` moves, and under bypass ``x``; but for the scale that multiplies, unless
    ``multiplied`` are the centered codes."""
    (x, given), (dx, d) = primals, tangents
    unless_bypassed = functools.partial(where_bypassed, given.bits)
    if _has_borders(arithmetic, x, given, d):
        clipped = _is_outside(arithmetic, x, given)
        return lax.select(clipped, jnp.zeros_like(x), instantiated(dx))
    slope, passed, point = _local(arithmetic, x, _again(given))
    terms = []
    if moves(dx):
        terms.append(unless_bypassed(1.0, slope) * dx)
    if moves(d.scale):
        terms.append(unless_bypassed(0.0, multiplied - passed) * d.scale)
    if moves(d.zero_point):
        terms.append(unless_bypassed(0.0, (slope - 1.0) * given.scale) * d.zero_point)
    moved = _tangent_of_theta(arithmetic, x, given, d, point)
    terms += [unless_bypassed(0.0, given.scale * term) for term in moved]
    return sum_of(terms, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centered(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    return _levels(arithmetic, x, given)


@functools.partial(_centered.defjvp, symbolic_zeros=True)
def _centered_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # The function itself, not its body: else its derivative would be differentiated as rounding.
    tangent = _moved(arithmetic, primals, tangents) / primals[1].scale
    return _centered(arithmetic, *primals), tangent


def _moved_as_reals(arithmetic: Arithmetic, primals: Any, tangents: Any) -> jax.Array:
    """:func:`_moved`, with the scale that multiplies."""
    levels = _centered(arithmetic, *primals) if moves(tangents[1].scale) else 0.0
    return _moved(arithmetic, primals, tangents, levels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _codes_or_x(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    """What a product multiplies ahead of its factor; its tangent is that of :func:`_fake_quant`."""
    return where_bypassed(given.bits, x, _levels(arithmetic, x, given))


@functools.partial(_codes_or_x.defjvp, symbolic_zeros=True)
def _codes_or_x_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    tangent = _moved_as_reals(arithmetic, primals, tangents)
    return _codes_or_x(arithmetic, *primals), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quant(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    return where_bypassed(given.bits, x, _levels(arithmetic, x, given) * given.scale)


@functools.partial(_fake_quant.defjvp, symbolic_zeros=True)
def _fake_quant_jvp(arithmetic: Arithmetic, primals: Any, tangents: Any) -> tuple[Any, Any]:
    tangent = _moved_as_reals(arithmetic, primals, tangents)
    return _fake_quant(arithmetic, *primals), tangent


@functools.partial(jax.jit, static_argnums=0)
def _traced_once(
    arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: jax.Array | None
) -> jax.Array:
    """:func:`_codes_or_x`; of many operands of one shape the first is traced and lowered."""
    return _codes_or_x(arithmetic, *_given(x, qparams, arithmetic, key))


def prepare(
    x: Float[Array, "..."], qparams: QParams, arithmetic: Arithmetic
) -> tuple[Float[Array, "..."], QParams]:
    """What is rounded in place of ``x``, and the QParams in use, by the estimator.

    Most leave both as they are. ``theta`` of the result is the estimator's and the format's still.
    """
    estimator = arithmetic.estimator
    if not (estimator.parameters or estimator.resolve or estimator.transform):
        return x, qparams
    resolved = arithmetic.resolved(qparams, jnp.shape(x))
    if estimator.transform is None:
        return x, resolved
    return transformed(jnp.asarray(x), resolved, arithmetic), resolved


def transformed(
    x: Float[Array, "..."], qparams: QParams, arithmetic: Arithmetic
) -> Float[Array, "..."]:
    """What the estimator rounds in place of ``x``; of resolved QParams."""
    estimator = arithmetic.estimator
    spread = lambda array: expand(jnp.asarray(array, jnp.float32), x.shape)  # noqa: E731
    format, own = arithmetic.format, jax.tree.map(spread, estimator.own(qparams.theta))
    theta = format.map_groups(estimator.rest(qparams.theta), spread)
    wide = at_a_width(qparams._replace(scale=spread(qparams.scale), theta=theta), format)
    return estimator.transformed(widened(x), wide, own, format)


def _given(
    x: jax.Array, qparams: QParams, arithmetic: Arithmetic, key: jax.Array | None
) -> tuple[jax.Array, _Given]:
    x, estimator = jnp.asarray(x), arithmetic.estimator
    noise = arithmetic.rounding.noise(key, x.shape)

    def spread(array: jax.Array) -> jax.Array:
        array = expand(jnp.asarray(array, jnp.float32), x.shape)
        return lax.optimization_barrier(array.reshape(())) if array.size == 1 else array

    theta = arithmetic.format.map_groups(estimator.rest(qparams.theta), spread)
    own = jax.tree.map(spread, estimator.own(qparams.theta))
    bits = jnp.asarray(qparams.bits, jnp.float32)
    zero_point = None if arithmetic.has_no_zero_point else spread(qparams.zero_point)
    given = _Given(spread(qparams.scale), zero_point, bits, theta, own, noise)
    return widened(x), given


def _by_sign(arithmetic: Arithmetic, x: jax.Array, given: _Given) -> jax.Array:
    """Levels about their zero point, whose gradient depends on its own sign."""
    assert arithmetic.estimator.asymmetry is not None
    point = _local(arithmetic, *jax.lax.stop_gradient((x, given))).point
    # What was clipped has no gradient but the bound's, which stays as it is.
    factor = jnp.where(point.is_inside, arithmetic.estimator.asymmetry(point), 0.0)
    # The zero point joins behind what the gradient is scaled for.
    zero_point = 0.0 if given.zero_point is None else round_through(given.zero_point)
    levels = _centered(arithmetic, x, given) + zero_point
    return by_sign(levels, jax.lax.stop_gradient(factor)) - zero_point


def _chosen(
    x: jax.Array, qparams: QParams, estimator: Estimator, key: jax.Array | None
) -> jax.Array:
    """Which entries are quantized, by the estimator's draw."""
    assert estimator.chosen is not None
    if key is None:
        raise errors.KeyMissingError(
            f"{estimator.name} draws at random and was given no key",
            where=f"tensor of shape {x.shape}",
            why="randomness comes from explicit keys only",
            fix="key=jax.random.key(0)",
        )
    own = {name: expand(array, x.shape) for name, array in estimator.own(qparams.theta).items()}
    return estimator.chosen(own, jax.random.fold_in(key, 1), x.shape)


def centered_codes(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """``clip(round(x/s) + z, low, high) - z``: levels about their zero point, float32.

    Differentiable in ``x``, ``scale``, ``zero_point`` and ``theta`` by the estimator: the gradient
    of ``s · centered_codes(x)`` is that of :func:`fake_quant`. Bypass (``bits == 0``) is the
    caller's, and so is :func:`prepare`.
    """
    estimator = arithmetic.estimator
    x, given = _given(x, qparams, arithmetic, key)
    levels = _centered if estimator.asymmetry is None else _by_sign
    centered = levels(arithmetic, x, given)
    if estimator.chosen is None:
        return centered
    quotient = divide_by_scale(x, given.scale)
    return jnp.where(_chosen(x, qparams, estimator, key), centered, quotient)


def codes_or_values(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "..."], QParams]:
    """What a product multiplies: centered codes, at width 0 ``x``; and the QParams in use.

    Their tangent is that of ``s · codes``, the scale's part too, which no factor of a product has:
    ``Σ g q - Σ g x/s``, two sums over a batch, has few digits left, and none from 12 bits on.
    """
    estimator = arithmetic.estimator
    prepared, resolved = prepare(x, qparams, arithmetic)
    if estimator.asymmetry or estimator.chosen:
        codes = centered_codes(prepared, resolved, arithmetic, key)
        codes = moving_as_product(codes, expand(resolved.scale, codes.shape))
    else:
        codes = _traced_once(arithmetic, jnp.asarray(prepared), resolved, key)
        if estimator.transform is None:
            return codes, resolved
    return where_bypassed(resolved.bits, widened(x), codes), resolved


def is_clipped(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Bool[Array, "..."]:
    """Where the range has no level for ``x``, and the outermost one stands in."""
    raw = widened(jnp.asarray(x))
    x, given = _given(*prepare(x, qparams, arithmetic), arithmetic, key)
    low, high = arithmetic.format.level_range(given.bits, given.theta)
    unclipped = _snapped(arithmetic, x, given)[1].unclipped
    outside = (unclipped < low) | (unclipped > high)
    # A clip that is learned goes ahead of rounding, and leaves nothing outside.
    return outside | (x != raw) if "clip" in arithmetic.estimator.parameters else outside


def apply(
    x: Float[Array, "..."],
    qparams: QParams,
    arithmetic: Arithmetic,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "..."]:
    """:func:`fake_quant` for QParams and an :class:`Arithmetic`; the dtype of ``x``."""
    x = jnp.asarray(x)
    prepared, resolved = prepare(x, qparams, arithmetic)
    resolved = resolved._replace(scale=arithmetic.usable_scale(resolved))
    return _applied(arithmetic, x, prepared, resolved, key)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _applied(
    arithmetic: Arithmetic,
    x: jax.Array,
    prepared: jax.Array,
    resolved: QParams,
    key: PRNGKeyArray | None,
) -> jax.Array:
    estimator = arithmetic.estimator
    wide, given = _given(prepared, resolved, arithmetic, key)
    if estimator.asymmetry is None:
        y = narrowed(_fake_quant(arithmetic, wide, given), x.dtype)
    else:
        y = narrowed(_by_sign(arithmetic, wide, given) * given.scale, x.dtype)
    if estimator.chosen is not None:
        y = jnp.where(_chosen(x, resolved, estimator, key), y, x)
    changed = estimator.transform is not None or estimator.asymmetry is not None
    if changed or x.dtype == jnp.float64:  # float32 would round what passes through
        y = where_bypassed(given.bits, x, y)
    return y
