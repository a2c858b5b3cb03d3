"""The granularities, and the shapes of scales that they give.

A granularity names roles, not axes. Which axes they are follows from the product that the tensor
enters (:class:`OperandAxes`), so one policy serves ``Dense``, ``Conv`` and attention alike. Scales
keep the rank of their tensor: an axis has size 1 where the scale is shared, full size where each
index has its own, and the number of groups where a group shares one.
"""

from __future__ import annotations

import dataclasses
import enum
import numbers
from collections.abc import Callable, Mapping, Sequence

from quantjax import errors
from quantjax.arguments import expect


class Remainder(enum.Enum):
    """What becomes of an axis that the size of a group does not divide."""

    REFUSE = "refuse"
    """``GranularityError``."""

    SHORTER = "shorter"
    """``⌈n / size⌉`` groups of ``⌈n / k⌉`` entries, the last one what is left.

    No group is longer than ``size``; what is missing is spread over all of them instead of leaving
    one short group: 100 entries in groups of 32 are 4 groups of 25, 70 entries groups of 24, 24 and
    22. Where hardware fixes the length (32 in the OCP MX formats) and the last group alone is
    short, pad the tensor.
    """


@dataclasses.dataclass(frozen=True)
class OperandAxes:
    """Axes of one operand of a product.

    Attributes:
      free: axes that reach the output (batch axes included), in layout order; the columns of a
        block lie along the last.
      contracted: axes that are summed over, in the order of the product's dimension numbers, not
        of the layout; groups and the rows of a block lie along the last, and never reach from one
        index of the others to the next.
      window: spatial axes of a convolution, which it slides over (activation) or sums (kernel);
        they share their scales.
    """

    free: tuple[int, ...]
    contracted: tuple[int, ...]
    window: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Base of the others, :class:`PerTensor` to :class:`PerBlock`, and of your own."""

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
            fix="use qj.PerTensor(), qj.PerToken(), qj.PerChannel(), qj.PerGroup(size) or "
            "qj.PerBlock(rows, columns)",
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

    def __post_init__(self) -> None:
        _check_axis(self.axis, "qj.PerChannel", "qj.PerChannel(axis=-1)")

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

    Other contracted axes and all free axes have a scale for each index; window axes share. Sums run
    over the contracted axes in the order of the product's dimension numbers, the last one fastest,
    and so do groups: heads and features ``(h, k)`` of a projection have groups of features within
    each head. ``axis`` names the grouped axis outright; then every other axis has a scale for each
    index. ``remainder`` says what happens where ``size`` does not divide the axis.

    >>> PerGroup(32).scale_shape((128, 10), OperandAxes((1,), (0,)), is_weight=True)
    (4, 10)
    >>> shorter = PerGroup(32, remainder=Remainder.SHORTER)
    >>> shorter.scale_shape((70, 10), OperandAxes((1,), (0,)), is_weight=True)
    (3, 10)

    Raises:
      GranularityError: when made, a size that is no whole number from 1 on; then, one that does not
        divide the axis, where nothing is said about the remainder.
    """

    size: int
    axis: int | None = None
    remainder: Remainder = Remainder.REFUSE

    def __post_init__(self) -> None:
        if not _is_whole(self.size) or self.size < 1:
            raise errors.GranularityError(
                f"groups of {self.size!r} entries", where="qj.PerGroup", fix="qj.PerGroup(32)"
            )
        _check_axis(self.axis, "qj.PerGroup", f"qj.PerGroup({self.size}, axis=-1)")
        _check_remainder(self.remainder, "qj.PerGroup")

    @property
    def name(self) -> str:
        """``group32``."""
        return f"group{self.size}"

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """The number of groups along the grouped axis."""
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
        stated = "" if self.axis is None else f", axis={self.axis}"
        return _grouped(
            shape,
            kept,
            {grouped: self.size},
            self.remainder,
            lambda sizes: f"qj.PerGroup({sizes[grouped]}{stated}",
        )


@dataclasses.dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of ``rows x columns`` of a weight.

    Rows are consecutive entries along the last contracted axis, columns along the last free axis
    (of a batched product with the batch axis last in layout, that one: name the axes). Other
    contracted and free axes have a scale for each index; window axes share. ``axes`` names the axes
    of rows and columns outright; then every other axis has a scale for each index. ``remainder``
    says what happens where a side does not divide its axis.

    An activation has blocks of its contracted and its last free axis, with a live range.

    >>> PerBlock(128, 128).scale_shape((512, 256), OperandAxes((1,), (0,)), is_weight=True)
    (4, 2)

    Raises:
      GranularityError: when made, a side that is no whole number from 1 on, axes that are no pair;
        then, a side that does not divide its axis, where nothing is said about the remainder, and
        an operand without a contracted or without a free axis.

    Source: DeepSeek-AI, DeepSeek-V3 technical report, 2024, section 3.3.2 (128 x 128).
    """

    rows: int
    columns: int
    axes: tuple[int, int] | None = None
    remainder: Remainder = Remainder.REFUSE

    def __post_init__(self) -> None:
        if not all(_is_whole(side) and side >= 1 for side in (self.rows, self.columns)):
            raise errors.GranularityError(
                f"blocks of {self.rows!r} x {self.columns!r} entries",
                where="qj.PerBlock",
                fix="qj.PerBlock(128, 128)",
            )
        axes = self.axes
        if axes is not None and not (
            isinstance(axes, tuple) and len(axes) == 2 and all(map(_is_whole, axes))
        ):
            raise errors.GranularityError(
                f"axes of a block are a pair of whole numbers, got {axes!r}",
                where="qj.PerBlock",
                fix=f"qj.PerBlock({self.rows}, {self.columns}, axes=(-2, -1))",
            )
        _check_remainder(self.remainder, "qj.PerBlock")

    @property
    def name(self) -> str:
        """``block128x128``."""
        return f"block{self.rows}x{self.columns}"

    def scale_shape(
        self, shape: Sequence[int], axes: OperandAxes, *, is_weight: bool
    ) -> tuple[int, ...]:
        """The number of blocks along the axes of rows and columns."""
        del is_weight
        kept = tuple(range(len(shape))) if self.axes is not None else axes.free + axes.contracted
        rows, columns = self._sides(shape, axes)
        stated = "" if self.axes is None else f", axes={self.axes}"
        return _grouped(
            shape,
            kept,
            {rows: self.rows, columns: self.columns},
            self.remainder,
            lambda sizes: f"qj.PerBlock({sizes[rows]}, {sizes[columns]}{stated}",
        )

    def _sides(self, shape: Sequence[int], axes: OperandAxes) -> tuple[int, int]:
        where = f"operand of shape {tuple(shape)}"
        if self.axes is not None:
            rows, columns = (_axis(axis, shape) for axis in self.axes)
            if rows == columns:
                raise errors.GranularityError(
                    f"rows and columns of a block both lie along axis {rows}",
                    where=where,
                    fix=f"two axes, or qj.PerGroup({self.rows}, axis={self.axes[0]})",
                )
            return rows, columns
        if not axes.contracted or not axes.free:
            missing = "contracted" if not axes.contracted else "free"
            raise errors.GranularityError(
                f"the operand has no {missing} axis, so there are no blocks of two axes",
                where=where,
                fix=f"qj.PerGroup({self.rows}), or name the axes: "
                f"qj.PerBlock({self.rows}, {self.columns}, axes=(-2, -1))",
            )
        return axes.contracted[-1], axes.free[-1]


def _grouped(
    shape: Sequence[int],
    kept: Sequence[int],
    sizes: Mapping[int, int],
    remainder: Remainder,
    call: Callable[[Mapping[int, int]], str],
) -> tuple[int, ...]:
    """Full size along ``kept``, the number of groups along the axes of ``sizes``.

    Args:
      sizes: of a group, by axis.
      call: the granularity with such sizes, for an error's fix; without the closing bracket.
    """
    found = list(_keep(shape, kept))
    for axis, size in sizes.items():
        n = shape[axis]
        if n % size and remainder is Remainder.REFUSE:
            # Sizes that divide here may divide no other operand of the same policy.
            fitting = {axis: _nearest_divisor(shape[axis], size) for axis, size in sizes.items()}
            raise errors.GranularityError(
                f"groups of {size} do not divide axis {axis} of size {n}",
                where=f"operand of shape {tuple(shape)}",
                why=f"a remainder has to be asked for; {call(fitting)}) leaves none here",
                fix=f"{call(sizes)}, remainder=qj.Remainder.SHORTER)",
            )
        # k = ⌈n / size⌉ always fits. With L = ⌈n / k⌉: k >= n / size, so n / k <= size and, size
        # being whole, L <= size; hence ⌈n / L⌉ >= k. And L >= n / k, so ⌈n / L⌉ <= k.
        found[axis] = -(-n // size)
    return tuple(found)


def _nearest_divisor(n: int, size: int) -> int:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: abs(d - size), default=1)


def _keep(shape: Sequence[int], kept: Sequence[int]) -> tuple[int, ...]:
    return tuple(n if axis in kept else 1 for axis, n in enumerate(shape))


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_axis(axis: int | None, where: str, fix: str) -> None:
    if axis is not None and not _is_whole(axis):
        raise errors.GranularityError(
            f"axis {axis!r}, where a whole number is needed", where=where, fix=fix
        )


def _check_remainder(remainder: Remainder, where: str) -> None:
    fix = "remainder=qj.Remainder.SHORTER"
    expect(remainder, Remainder, argument="remainder", where=where, fix=fix)


def _axis(axis: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise errors.GranularityError(
            f"axis {axis} does not exist",
            where=f"operand of shape {tuple(shape)}",
            fix=f"an axis between {-len(shape)} and {len(shape) - 1}",
        )
    return axis % len(shape)
