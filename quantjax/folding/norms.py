"""What a batch norm behind a product is: one row of a model's table of batch norms."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import overload

from quantjax.interpreter import Op
from quantjax.printing import columns, shape_text


class FoldStatus(enum.Enum):
    """Whether a batch norm can be folded into the kernel ahead of it, or what forbids it."""

    FOLDABLE = "foldable"
    PRECEDES = "precedes"
    NO_PRODUCT = "no product"
    BETWEEN = "something between"
    BATCH_STATISTICS = "batch statistics"
    OUTPUT_USED = "output used"
    KERNEL_SHARED = "kernel shared"
    KERNEL_COMPUTED = "kernel computed"
    NORM_SHARED = "norm shared"
    NO_SHIFT = "no shift"
    OTHER_FORM = "other form"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the channels of a batch norm lie in one parameter.

    Channels are numbered through: those of the first layer of stacked ones, those of the second.

    Attributes:
      path: of the parameter.
      shape: its shape, with 1 for each axis along which the channel does not change.
      channels: the channel at each place of ``shape``, flattened.
      entries: the entry of the flattened parameter that each channel has; empty for a kernel.
    """

    path: str
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    entries: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """The parameter's axes along which channels (and layers) change."""
        return tuple(axis for axis, n in enumerate(self.shape) if n > 1)


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """One row: ``y = γ (z + b - μ) / sqrt(σ² + ε) + β`` for each channel of a product ``z``.

    Attributes:
      site: name of the product, as in ``qj.sites``; empty where there is none ahead of it.
      op: its primitive.
      kernel: where the channels lie in the kernel.
      mean, variance, scale, offset, bias: μ, σ², γ, β and b; None where there is none.
      epsilon: ε, as the program has it.
      steps: lengths of the scans whose layers are stacked.
      channels: how many, of one layer.
      status, reason: whether it can be folded; what forbids it, in words.
    """

    site: str
    op: Op | None = None
    kernel: Place | None = None
    mean: Place | None = None
    variance: Place | None = None
    scale: Place | None = None
    offset: Place | None = None
    bias: Place | None = None
    epsilon: float = 0.0
    steps: tuple[int, ...] = ()
    channels: int = 0
    status: FoldStatus = FoldStatus.FOLDABLE
    reason: str = ""

    @property
    def foldable(self) -> bool:
        """Whether :func:`fold_batch_norm` folds it."""
        return self.status is FoldStatus.FOLDABLE

    @property
    def places(self) -> tuple[Place, ...]:
        """All parameters that folding changes."""
        found = (self.kernel, self.bias, self.mean, self.variance, self.scale, self.offset)
        return tuple(place for place in found if place is not None)


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorms(Sequence[BatchNorm]):
    """The batch norms of a model in program order; prints as a table; hashable.

    >>> print(BatchNorms((BatchNorm("w", status=FoldStatus.BETWEEN, reason="max lies between"),)))
    product  channels  kernel axis  epsilon  folds
    w        0         -            0        no: max lies between
    """

    rows: tuple[BatchNorm, ...]

    @overload
    def __getitem__(self, index: int) -> BatchNorm: ...
    @overload
    def __getitem__(self, index: slice) -> BatchNorms: ...
    def __getitem__(self, index: int | slice) -> BatchNorm | BatchNorms:
        return BatchNorms(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[BatchNorm]:
        return iter(self.rows)

    @property
    def foldable(self) -> BatchNorms:
        """Those that can be folded."""
        return BatchNorms(tuple(row for row in self.rows if row.foldable))

    def __repr__(self) -> str:
        if not self.rows:
            return (
                "no batch norm: its running statistics have to be among the parameters, and neither"
                " it nor its product inside shard_map, pmap or custom_vjp"
            )
        head = ["product", "channels", "kernel axis", "epsilon", "folds"]
        return columns(head, [_cells(row) for row in self.rows])


def _cells(row: BatchNorm) -> list[str]:
    channels = shape_text((*row.steps, row.channels))
    axes = "-" if row.kernel is None else ",".join(map(str, row.kernel.axes))
    folds = _parameters(row) if row.foldable else f"no: {row.reason}"
    return [row.site or "-", channels, axes, f"{row.epsilon:.3g}", folds]


def _parameters(row: BatchNorm) -> str:
    parts = [
        ("mean", row.mean),
        ("variance", row.variance),
        ("scale", row.scale),
        ("offset", row.offset),
        ("bias", row.bias),
    ]
    named = (f"{name} {_short(place.path, row.site)}" for name, place in parts if place is not None)
    return f"yes: {', '.join(named)}"


def _short(path: str, site: str) -> str:
    """The path without what it begins with as the product's, which stands in the same line."""
    parts, own = path.split("/"), site.split("/")
    same = 0
    while same < min(len(parts), len(own)) - 1 and parts[same] == own[same]:
        same += 1
    return "/".join(parts[same:])
