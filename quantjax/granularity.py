"""Who shares a scale: the tensor, a token, a channel or a group.

A granularity names roles, not axes. Which axes they are follows from the product that the tensor
enters (:class:`OperandAxes`), so one policy serves ``Dense``, ``Conv`` and attention alike. Scales
keep the rank of their tensor: an axis has size 1 where the scale is shared, full size where each
index has its own, and the number of groups where a group shares one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from quantjax import errors

Reduce = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class OperandAxes:
    """Axes of one operand of a product.

    Attributes:
      free: axes that reach the output (batch axes included), in layout order.
      contracted: axes that are summed over, in the order of the product's dimension numbers;
        groups lie along the last.
      window: spatial axes of a convolution, which it slides over (activation) or sums (kernel).
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]
    window: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Base of :class:`PerTensor`, :class:`PerToken`, :class:`PerChannel`, :class:`PerGroup`."""

    @property
    def name(self) -> str:
        """How it prints in a policy."""
        return type(self).__name__.removeprefix("Per").lower()

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """Shape of the scale of a tensor of ``shape``; raises ``GranularityError``."""
        raise errors.GranularityError(
            f"{type(self).__name__} is no granularity of its own",
            fix="use qj.PerTensor(), qj.PerToken(), qj.PerChannel() or qj.PerGroup(size)",
        )


@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor.

    >>> PerTensor().scale_shape((64, 10), OperandAxes((1,), (0,)), is_weight=True)
    (1, 1)
    """

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """All ones."""
        del axes, is_weight
        return (1,) * len(shape)


@dataclasses.dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each row of an activation: each index of its free axes.

    >>> PerToken().scale_shape((32, 128, 64), OperandAxes((0, 1), (2,)), is_weight=False)
    (32, 128, 1)
    """

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """Full size along the free axes."""
        if is_weight:
            raise errors.GranularityError(
                "a weight has no tokens", fix="use qj.PerChannel() for weights"
            )
        return _keep(shape, axes.free)


@dataclasses.dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each channel: output channels of a weight, features of an activation.

    ``axis`` names the channel axis outright; without a model (``qj.quantize_params``) it must.

    >>> PerChannel().scale_shape((3, 3, 16, 32), OperandAxes((3,), (2,), (0, 1)), is_weight=True)
    (1, 1, 1, 32)
    """

    axis: int | None = None

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """Full size along the channel axes."""
        if self.axis is not None:
            return _keep(shape, (_axis(self.axis, shape),))
        return _keep(shape, axes.free if is_weight else axes.contracted)


@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each run of ``size`` consecutive entries along the last contracted axis.

    Other contracted axes and all free axes have a scale for each index; window axes share. ``axis``
    names the grouped axis outright; then every other axis has a scale for each index.

    >>> PerGroup(32).scale_shape((128, 10), OperandAxes((1,), (0,)), is_weight=True)
    (4, 10)

    Raises:
      GranularityError: ``size`` does not divide the axis.
    """

    size: int
    axis: int | None = None

    @property
    def name(self) -> str:
        """``group32``."""
        return f"group{self.size}"

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """``n / size`` along the grouped axis."""
        del is_weight
        if self.axis is not None:
            grouped = _axis(self.axis, shape)
            kept: tuple[int, ...] = tuple(range(len(shape)))
        elif axes.contracted:
            grouped = axes.contracted[-1]
            kept = axes.free + axes.contracted
        else:
            raise errors.GranularityError(
                "the product contracts no axis, so there is nothing to group",
                where=f"operand of shape {tuple(shape)}",
                fix="use qj.PerChannel()",
            )
        if self.size < 1 or shape[grouped] % self.size:
            divisors = [d for d in range(1, shape[grouped] + 1) if shape[grouped] % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.size), default=1)
            stated = "" if self.axis is None else f", axis={self.axis}"
            raise errors.GranularityError(
                f"groups of {self.size} do not divide axis {grouped} of size {shape[grouped]}",
                where=f"operand of shape {tuple(shape)}",
                fix=f"qj.PerGroup({nearest}{stated})",
            )
        kept_shape = list(_keep(shape, kept))
        kept_shape[grouped] = shape[grouped] // self.size
        return tuple(kept_shape)


def _keep(shape: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    return tuple(n if axis in kept else 1 for axis, n in enumerate(shape))


def _axis(axis: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise errors.GranularityError(
            f"axis {axis} does not exist",
            where=f"operand of shape {tuple(shape)}",
            fix=f"an axis between {-len(shape)} and {len(shape) - 1}",
        )
    return axis % len(shape)


def check_scale_shape(shape: Sequence[int], scale_shape: Sequence[int]) -> None:
    """Raise ``GranularityError`` unless the scale's axes each divide the tensor's."""
    fits = len(shape) == len(scale_shape) and all(
        s >= 1 and n % s == 0 for n, s in zip(shape, scale_shape, strict=True)
    )
    if not fits:
        raise errors.GranularityError(
            f"a scale of shape {tuple(scale_shape)} does not fit a tensor of {tuple(shape)}",
            why="scales keep the tensor's rank; each axis has size 1, the full size, or a divisor",
            fix="reshape the scale with size-1 axes, for instance scale[None, :]",
        )


def expand(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeat grouped axes, so that the result broadcasts against a tensor of ``shape``.

    Axes of size 1 stay as they are.

    >>> expand(jnp.array([[1.0], [2.0]]), (4, 3))[:, 0].tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if scale.ndim == 0:
        return scale
    check_scale_shape(shape, scale.shape)
    for axis, (n, groups) in enumerate(zip(shape, scale.shape, strict=True)):
        if groups not in (1, n):
            scale = jnp.repeat(scale, n // groups, axis=axis)
    return scale


def reduce_to(
    x: jax.Array, scale_shape: Sequence[int], reduce: Reduce, **options: object
) -> jax.Array:
    """Reduce ``x`` to ``scale_shape`` by ``reduce`` (``jnp.min``, ``jnp.max``, ...).

    >>> reduce_to(jnp.array([[1.0, 2.0], [3.0, 0.0]]), (2, 1), jnp.max).tolist()
    [[2.0], [3.0]]
    """
    check_scale_shape(x.shape, scale_shape)
    split: list[int] = []
    reduced: list[int] = []
    for n, groups in zip(x.shape, scale_shape, strict=True):
        reduced.append(len(split) + 1)
        split += [groups, n // groups]
    where = options.pop("where", None)
    if where is not None:
        options["where"] = jnp.broadcast_to(jnp.asarray(where), x.shape).reshape(split)
    return reduce(x.reshape(split), axis=tuple(reduced), **options).reshape(tuple(scale_shape))
