"""What a range rule is, and what it is told."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import RECIPROCAL, QParams, qparams_from_range
from quantjax.arguments import expect
from quantjax.arithmetic import Arithmetic
from quantjax.formats import Format, Theta
from quantjax.simulation import apply, is_clipped
from quantjax.statistics import Statistics
from quantjax.statistics.extremes import seen


class Range(NamedTuple):
    """The interval that codes have to cover, at the shape of the scale.

    Attributes:
      low, high: the bounds, float32.
      calibrated: whether the rule had anything to go by.
    """

    low: Float[Array, "..."]
    high: Float[Array, "..."]
    calibrated: Bool[Array, "..."]


class Target(NamedTuple):
    """What a range is for: the codes that have to cover it.

    Attributes:
      format: which codes; static.
      symmetric: whether the zero point is 0, so that the larger bound decides; static.
      bits: the width, a scalar that may be traced.
      theta: of the format.
    """

    format: Format
    symmetric: bool
    bits: Float[Array, ""]
    theta: Theta = ()

    def qparams(self, low: jax.Array, high: jax.Array) -> QParams:
        """The QParams that cover a range."""
        return qparams_from_range(
            low,
            high,
            self.bits,
            format=self.format,
            symmetric=self.symmetric,
            calibrated=jnp.asarray(True),
            theta=self.theta,
        )

    def quantize(
        self, x: jax.Array, low: jax.Array, high: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What becomes of ``x`` under a range, rounded to the nearest, and what of it is clipped.

        ``x`` is of one group, so ``low`` and ``high`` are scalars. By the reciprocal of the scale,
        which gives another code, with the same error but for last places, only next to ties.
        """
        qparams = self.qparams(low, high)
        arithmetic = Arithmetic(self.format, scaling=RECIPROCAL, symmetric=self.symmetric)
        return apply(x, qparams, arithmetic), is_clipped(x, qparams, arithmetic)


def holds_for(shape: tuple[int, ...], groups: tuple[int, ...]) -> bool:
    """Whether what a rule returned says something of each group: sizes of 1 hold for all.

    >>> holds_for((), (1, 3)), holds_for((1, 3), (1, 3)), holds_for((3, 1), (1, 3))
    (True, True, False)
    """
    sizes = zip(shape, groups[len(groups) - len(shape) :], strict=False)
    return len(shape) <= len(groups) and all(n in (1, full) for n, full in sizes)


def where_seen(statistics: Statistics, low: jax.Array, high: jax.Array) -> Range:
    """A range of the groups of which something was seen; NaN for those that no value reached.

    For rules that would make a range out of nothing, where they take zero to be in it.
    """
    some = seen(statistics.extremes)
    low, high = (jnp.where(some, bound, jnp.nan) for bound in (low, high))
    return Range(low, high, statistics.batches > 0)


def square_root(x: jax.Array) -> jax.Array:
    """``√x`` of what is not negative, with the derivative 0 and not infinity at 0.

    What a rule does not use is multiplied by 0 all the same, and a channel of zeros had NaN for a
    gradient.

    >>> jax.grad(square_root)(0.0).item(), square_root(jnp.float32(9.0)).item()
    (0.0, 3.0)
    """
    some = x > 0.0
    root = jnp.sqrt(jnp.where(some, x, 1.0))
    # Not 0 for what is no number, which says of a group that it has no moments.
    return jnp.where(some, root, jnp.where(x == 0.0, 0.0, jnp.nan))


def within_seen(statistics: Statistics, center: jax.Array, reach: jax.Array) -> Range:
    """``[center - reach, center + reach]``, and no more than what was seen; all of that where the
    moments of very small or large values have vanished or overflown.

    >>> from quantjax import statistics
    >>> seen = statistics.of_tensor(jnp.array([1e-30, 3e-30]), (1,), with_values=False)
    >>> [float(b[0]) > 0 for b in within_seen(seen, seen.moments.mean, jnp.zeros(1))[:2]]
    [True, True]
    """
    least, most = statistics.extremes
    known = (reach > 0.0) & jnp.isfinite(reach) & jnp.isfinite(center)
    low = jnp.where(known, jnp.maximum(center - reach, least), least)
    high = jnp.where(known, jnp.minimum(center + reach, most), most)
    # Rounding may put the mean of equal values just outside of them.
    return Range(jnp.minimum(low, most), jnp.maximum(high, least), statistics.batches > 0)


@dataclasses.dataclass(frozen=True)
class Configured:
    """A function with some of its keyword arguments: what rules that take static settings run.

    Unlike ``functools.partial``, one that was pickled or made anew is equal to another, and so is
    the rule, the quantizer and the plan that holds it.

    >>> Configured.of(round, ndigits=1) == Configured.of(round, ndigits=1)
    True
    >>> Configured.of(round, ndigits=1)(0.25)
    0.2
    """

    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, function: Callable[..., Any], **settings: Any) -> Configured:
        """The function with these settings, which can be hashed."""
        return cls(function, tuple(settings.items()))

    def __call__(self, *arguments: Any) -> Any:
        """The function's own result."""
        return self.function(*arguments, **dict(self.settings))


class RangeRule(NamedTuple):
    """A pure function from statistics to a range, the same under any trace.

    Attributes:
      name: what it prints as.
      range: ``(statistics, target, *parameters) -> Range``. Where ``reads_distribution``, it is
        called for one group at a time: statistics of shape ``()``, a sample of shape ``(n,)``.
        Otherwise for all of them, statistics at the shape of the scale.
      reads_distribution: whether it looks at ``statistics.sample`` or ``statistics.distribution``.
      parameters: numbers, or arrays where a sweep varies them.
      entries: how many numbers it makes of each group whatever the group's size, such as bins of
        its own; so many fewer groups are taken at once.
    """

    name: str
    range: Callable[..., Range]
    reads_distribution: bool = False
    parameters: tuple[Any, ...] = ()
    entries: int = 1


def checked_iterations(iterations: int, rule: str) -> int:
    """The number itself.

    Raises:
      ArgumentError: no whole number.
      QuantizerError: one below 0.
    """
    where = f"the range rule {rule}"
    expect(iterations, numbers.Integral, argument="iterations", where=where, fix="iterations=20")
    if iterations < 0:
        raise errors.QuantizerError(
            f"{iterations} iterations",
            where=where,
            why="0 leaves the start",
            fix="iterations=0",
        )
    return int(iterations)


def known_number(value: Any, family: str) -> float | None:
    """A number of a rule; None where it is traced. ``QuantizerError`` where it is no scalar."""
    known = concrete(value)
    if np.ndim(value) or (known is not None and known.dtype.kind not in "iufb"):
        raise errors.QuantizerError(
            f"{value!r:.80} is no number",
            where=f"the range rule {family}",
            fix="a number; jax.vmap or jax.lax.map over an array of them",
        )
    return None if known is None else float(known)


def rule_of(
    family: str,
    range: Callable[..., Range],
    *parameters: float | jax.Array,
    reads_distribution: bool = False,
) -> RangeRule:
    """A rule of a family, with the numbers in its name unless they are traced.

    >>> rule_of("percentile", lambda *_: None, 0.99).name
    'percentile(0.99)'
    """
    known = [concrete(number) for number in parameters]
    shown = [f"{float(np.float32(k)):.7g}" for k in known if k is not None]
    name = f"{family}({', '.join(shown)})" if len(shown) == len(parameters) else family
    # NumPy's float32 is equal to the float next to it, and has another hash.
    plain = (n.item() if isinstance(n, np.generic) else n for n in parameters)
    return RangeRule(name, range, reads_distribution, tuple(plain))


class FitRule(NamedTuple):
    """A pure function from the tensor itself to QParams: for what no range determines.

    It serves weights, which are at hand when ``qj.calibrate`` runs, and live ranges.

    Attributes:
      name: what it prints as.
      fit: ``(tensor, scale_shape, format, bits, *parameters) -> QParams``; the tensor is float32,
        the shape of its rank, ``bits`` a scalar that may be traced. Scales follow the format's
        scale rule where that has any meaning; a width of 0, a tensor that is not finite, and widths
        beyond the container are dealt with by the caller.
      needs_zero_point: whether it fits a zero point as well, which symmetric quantizers lack.
      parameters: numbers of its own that a sweep varies, as arrays.
    """

    name: str
    fit: Callable[..., QParams]
    needs_zero_point: bool = False
    parameters: tuple[Any, ...] = ()


def valid_where(valid: jax.Array, found: QParams) -> QParams:
    """What a rule found; scales are NaN where its own numbers, which are traced, make no sense."""
    return found._replace(scale=jnp.where(valid, found.scale, jnp.nan))
