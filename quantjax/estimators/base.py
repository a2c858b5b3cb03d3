"""What a gradient estimator is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax.affine import QParams, where_bypassed
from quantjax.arguments import kind_of
from quantjax.formats import Format, Theta

Parameters = Mapping[str, jax.Array]
"""An estimator's own arrays in ``QParams.theta``: scalars, of the scale's shape, or a weight's."""


class Point(NamedTuple):
    """Where the entries of a tensor lie among the levels; float32, broadcast to its shape.

    Attributes:
      position: ``x/s + z``, not rounded.
      unclipped: the level that it is rounded to, before clipping.
      level: after clipping.
      low, high: the outermost levels at the width in use.
      zero_point: rounded.
      scale: positive.
      bits: the width in use, a scalar.
      parameters: the estimator's own.
    """

    position: jax.Array
    unclipped: jax.Array
    level: jax.Array
    low: jax.Array
    high: jax.Array
    zero_point: jax.Array
    scale: jax.Array
    bits: jax.Array
    parameters: Parameters

    @property
    def is_inside(self) -> jax.Array:
        """Where the rounded level is not outside the range, as torch has it (bool).

        NaN is not outside: its gradient passes, and is not masked.
        """
        return ~((self.unclipped < self.low) | (self.unclipped > self.high))

    @property
    def scaled(self) -> jax.Array:
        """``x/s``."""
        return self.position - self.zero_point


class Need(enum.Enum):
    """What an estimator asks of the quantizer that has it."""

    FIXED_RANGE = "a range that calibration fixes, which its parameters start from"
    INTEGERS = "integer codes, which are one apart"
    NO_ZERO_POINT = "a symmetric range: its zero point is 0"
    REAL_SCALES = "scales that are any real numbers"
    ONE_BIT = "codes of one bit"
    MORE_THAN_ONE_BIT = "signed codes of more than one bit"


class Estimator(NamedTuple):
    """What stands in for the derivative of a rounded and clipped code, and what is learned with it.

    A code is ``q = clip(round(x/s) + z, low, high)``. Its derivative with respect to ``x/s`` is
    zero almost everywhere; the estimator puts ``slope`` in its place, and all gradients follow:

    ``∂y/∂x = slope``, ``∂y/∂s = (q - z) - slope · x/s``, ``∂y/∂z = s · (slope - 1)``
    for ``y = s · (q - z)``.

    Methods that move more than that say so in the other fields; most have ``name`` and ``slope``
    alone. What ``resolve`` and ``transform`` compute is differentiated as it stands.

    Attributes:
      name: what it prints as.
      slope: ``point -> float32 array``, the derivative of the level by ``x/s``. Not a function of
        the incoming gradient, so the rule is linear, and forward and reverse mode both work.
      parameters: names of its own arrays in ``QParams.theta``.
      start: ``(qparams, format) -> parameters``, what calibration starts them from.
      resolve: ``(qparams, parameters, format, shape) -> qparams``: scale, zero point and width as
        functions of what is learned; ``shape`` is the tensor's. Of the QParams, ``theta`` is the
        format's. The width alone moves no level's gradient: let the scale or the clip depend on it,
        as :data:`ROUNDED_WIDTH` does.
      transform: ``(x, qparams, parameters, format) -> x``: what is rounded in place of ``x``; the
        QParams are resolved, scale and parameters of the shape of ``x``.
      to_parameters: ``(point, tangents) -> tangent of the level``, where the slope's parameters are
        learned as well.
      asymmetry: ``point -> a``: an incoming gradient ``g`` of a level becomes
        ``g · (1 + a · sign(g))``. Reverse mode only.
      chosen: ``(parameters, key, shape) -> bool array``: the entries that are quantized; the others
        pass as they are. Needs a key.
      needs: what a quantizer has to be for it.
      valid: ``parameters -> bool array``, where they mean something; elsewhere the scale in use is
        NaN, and ``qj.check`` says so.

    At bypass, width 0, ``start``, ``resolve`` and ``transform`` are called with the widest codes of
    the format, so that they can divide by what a width gives; the last two are not used there.
    """

    name: str
    slope: Callable[[Point], jax.Array]
    parameters: tuple[str, ...] = ()
    start: Callable[[QParams, Format], Parameters] | None = None
    resolve: Callable[[QParams, Parameters, Format, tuple[int, ...]], QParams] | None = None
    transform: Callable[[jax.Array, QParams, Parameters, Format], jax.Array] | None = None
    to_parameters: Callable[[Point, Parameters], jax.Array] | None = None
    asymmetry: Callable[[Point], jax.Array] | None = None
    chosen: Callable[[Parameters, jax.Array, tuple[int, ...]], jax.Array] | None = None
    needs: frozenset[Need] = frozenset()
    valid: Callable[[Parameters], jax.Array] | None = None

    @property
    def is_random(self) -> bool:
        """Whether values depend on a key."""
        return self.chosen is not None

    def own(self, theta: Theta) -> dict[str, jax.Array]:
        """Its parameters of ``theta``.

        Raises:
          EstimatorError: one of them is missing.
        """
        missing = [name for name in self.parameters if name not in theta]
        if missing:
            raise errors.EstimatorError(
                f"theta has no {missing[0]}, which {self.name} learns",
                where=f"theta with {', '.join(map(str, theta)) or 'nothing'}",
                why="qj.calibrate starts an estimator's parameters; QParams made by hand lack them",
                fix="qj.calibrate, or qparams = estimator.started(qparams, format)",
            )
        return {name: theta[name] for name in self.parameters}

    def rest(self, theta: Theta) -> Theta:
        """What of ``theta`` is the format's."""
        if not self.parameters or not theta:
            return theta
        return {name: array for name, array in theta.items() if name not in self.parameters} or ()

    def started(self, qparams: QParams, format: Format) -> QParams:
        """QParams with the estimator's parameters beside the format's.

        >>> from quantjax.estimators import PACT
        >>> from quantjax.formats import integer
        >>> qparams = QParams(jnp.float32(0.5), jnp.float32(0.0), jnp.float32(2.0))
        >>> float(PACT.started(qparams, integer(signed=False)).theta["clip"])
        1.5
        """
        if self.start is None and not self.parameters:
            return qparams
        if self.start is None:
            raise errors.EstimatorError(
                f"the estimator {self.name} has no start for {', '.join(self.parameters)}",
                why="qj.calibrate starts what an estimator learns",
                fix=f'start=lambda qparams, format: {{"{self.parameters[0]}": qparams.scale}}',
            )
        like = jnp.zeros_like(qparams.scale)
        usable = at_a_width(qparams, format)
        # The scale of bypass, 1, says nothing of a range: that of a range up to 1.
        scale = where_bypassed(qparams.bits, 1.0 / highest(format, usable), qparams.scale)
        begun = self.start(usable._replace(scale=scale), format)
        if not isinstance(begun, Mapping) or not {*self.parameters} <= {*begun}:
            raise self._wrong("start", begun, f"arrays by the names {', '.join(self.parameters)}")
        found = {
            name: self._made("start", value, like.shape, may_be_larger=True) + like
            for name, value in begun.items()
        }
        return qparams._replace(theta={**(qparams.theta or {}), **found})

    def slope_at(self, point: Point) -> jax.Array:
        """``slope`` of a point."""
        return self._made("slope", self.slope(point), point.position.shape)

    def transformed(
        self, x: jax.Array, qparams: QParams, own: Parameters, format: Format
    ) -> jax.Array:
        """``transform`` of a tensor, where there is one."""
        assert self.transform is not None
        return self._made("transform", self.transform(x, qparams, own, format), x.shape)

    def _made(
        self, part: str, found: Any, shape: tuple[int, ...], *, may_be_larger: bool = False
    ) -> jax.Array:
        """What one of its functions made, as floats; ``EstimatorError`` for another shape.

        What broadcasts to the shape serves. Parameters may be larger, of a weight's shape.
        """
        wanted = f"numbers that broadcast to {shape}"
        if isinstance(found, jax.Array) and found.dtype == jnp.float32:
            array = found
        else:  # a mask, a number, a list of them
            try:
                array = jnp.asarray(found, jnp.float32)
            except (TypeError, ValueError):
                raise self._wrong(part, found, wanted) from None
        own = array.shape
        pairs = zip(own[::-1], shape[::-1], strict=False)
        fits = all(a in (1, b) or (may_be_larger and b == 1) for a, b in pairs)
        if found is None or not fits or (len(own) > len(shape) and not may_be_larger):
            raise self._wrong(part, found, wanted)
        return array

    def _wrong(self, part: str, found: Any, wanted: str) -> errors.EstimatorError:
        """What to raise where one of its functions makes something else."""
        is_array = isinstance(found, jax.Array | np.ndarray | np.generic)
        made = f"{found.dtype}{[*found.shape]}" if is_array else kind_of(found)
        return errors.EstimatorError(
            f"{part} of the estimator {self.name} makes {made}, and {wanted} are needed",
            fix=f"a {part} as quantjax.estimators.Estimator describes it",
        )

    def resolved(self, qparams: QParams, format: Format, shape: tuple[int, ...]) -> QParams:
        """The scale, zero point and width in use for a tensor of a shape; ``theta`` stays.

        >>> from quantjax.estimators import PACT
        >>> from quantjax.formats import integer
        >>> qparams = QParams(*map(jnp.float32, (1, 0, 0)), {"clip": jnp.float32(4)})
        >>> float(PACT.resolved(qparams, integer(), ()).bits)
        0.0
        """
        own = self.own(qparams.theta)
        found = qparams
        if self.resolve is not None:
            usable = at_a_width(qparams._replace(theta=self.rest(qparams.theta)), format)
            found = self.resolve(usable, own, format, shape)
            if not isinstance(found, QParams):
                raise self._wrong("resolve", found, "QParams")
            bits = qparams.bits
            if found.bits is not usable.bits:
                bits = where_bypassed(bits, 0.0, found.bits)
            found = found._replace(bits=bits, theta=qparams.theta)
        if self.valid is not None:
            scale = jnp.asarray(found.scale, jnp.float32)
            found = found._replace(scale=jnp.where(self.valid(own), scale, jnp.nan))
        return found


def at_a_width(qparams: QParams, format: Format) -> QParams:
    """The same, at bypass with the widest codes.

    What an estimator computes there is not used, but differentiated, and ``α / (2^b - 1)`` at width
    0 would make the gradient of a clip NaN.
    """
    bits = where_bypassed(qparams.bits, float(format.max_bits), qparams.bits)
    return qparams._replace(bits=bits)


def highest(format: Format, qparams: QParams) -> jax.Array:
    """The highest level of the width; ``theta`` of the QParams is the format's."""
    return format.level_range(qparams.bits, qparams.theta)[1]


def reach(format: Format, qparams: QParams) -> jax.Array:
    """What a symmetric range covers, ``s · steps``; ``steps`` is the highest level where codes are
    narrow, and one more in two's complement."""
    return qparams.scale * format.steps(qparams.bits, symmetric=True, theta=qparams.theta)
