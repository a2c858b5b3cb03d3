"""The table of a model's sites: what there is to quantize, what it costs, how it prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from quantjax import errors
from quantjax.arguments import row_of
from quantjax.interpreter import Op, Operand, Origin, Role, Site, SiteStatus
from quantjax.printing import amount, columns, shape_text

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Of all parameters, by path."""

LABELS: Mapping[Op, str] = {
    Op.DOT: "dot",
    Op.CONV: "conv",
    Op.RAGGED: "ragged",
    Op.GATHER: "gather",
    Op.SLICE: "slice",
}
LETTERS: Mapping[Role, str] = {Role.WEIGHT: "w", Role.ACTIVATION: "a", Role.GRADIENT: "g"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What sites have and do, all layers and steps of loops together.

    Attributes:
      parameters: entries of their weights; what two sites share counts once.
      multiply_adds: of one call of the model.
      bytes: of the weights, in the dtype that they enter products with.
    """

    parameters: int
    multiply_adds: int
    bytes: int


def weight_bytes(site: Site) -> int:
    """Of the weight in float, of all layers; 0 without one."""
    weight = site.weight
    return 0 if weight is None else site.parameters * int(jnp.dtype(weight.dtype).itemsize)


def distinct(sites: Iterable[Site], shapes: Shapes) -> list[Site]:
    """The sites whose weights add up to the parameters of a model, each counted once.

    Later uses of the same weight are left out, and of a weight that is tied after a transposition;
    different parts of one parameter (layers indexed in a loop, a fused kernel cut in three) are all
    there, because they fit into it together.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes}
    left: dict[tuple[str, ...], int] = {}
    seen: set[tuple[Any, ...]] = set()
    found = []
    for site in sites:
        weight = site.weight
        if weight is None:
            continue
        identity = weight.paths, weight.recipe, weight.constants
        room = left.get(weight.paths)
        if room is not None and (identity in seen or site.parameters > room):
            continue
        seen.add(identity)
        whole = sum(sizes[path] for path in weight.paths)
        left[weight.paths] = (whole if room is None else room) - site.parameters
        found.append(site)
    return found


@dataclasses.dataclass(frozen=True)
class SiteTable:
    """The sites of a traced model, in program order; prints.

    Attributes:
      sites: one row a product or lookup.
      weights: how each weight is recomputed from the parameters.
      others: where a parameter goes besides the weights of sites: a primitive, by path.
      shapes: of all parameters, by path.
      biases: how each bias is recomputed, by the name of its site.
    """

    sites: tuple[Site, ...]
    weights: Mapping[str, Origin] = dataclasses.field(compare=False, repr=False)
    others: Mapping[str, str] = dataclasses.field(compare=False, repr=False)
    shapes: Shapes = dataclasses.field(repr=False)
    biases: Mapping[str, Origin] = dataclasses.field(compare=False, repr=False)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        return row_of({site.name: site for site in self.sites}, name, kind="site")

    @property
    def cost(self) -> Cost:
        """Of the whole table."""
        weights = distinct(self.sites, self.shapes)
        return Cost(
            sum(site.parameters for site in weights),
            sum(site.multiply_adds for site in self.sites),
            sum(weight_bytes(site) for site in weights),
        )

    def __str__(self) -> str:
        """At most 120 columns; ``w`` is a weight, ``a`` an activation, ``g`` a gradient, ``+b`` a
        bias behind the product; numbers have three digits, ``k`` is 1000."""
        rows = [
            [
                site.name,
                LABELS[site.op],
                *_operand_texts(site),
                shape_text(site.out_shape),
                amount(site.parameters) if site.weight is not None else "",
                amount(site.multiply_adds),
                amount(weight_bytes(site)) if site.weight is not None else "",
                " ".join(site.loops),
                site.reason or ("" if site.status is SiteStatus.REWRITABLE else site.status.value),
            ]
            for site in self.sites
        ]
        cost = self.cost
        sums = amount(cost.parameters), amount(cost.multiply_adds), amount(cost.bytes)
        total = [["total", "", "", "", "", *sums, "", ""]] if len(self.sites) > 1 else []
        head = [
            "site",
            "op",
            "left",
            "right",
            "output",
            "weights",
            "MACs",
            "bytes",
            "inside",
            "note",
        ]
        return columns(head, [*rows, *total])

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, one row a site, names as index; tuples stay tuples.

        Raises:
          MissingPackageError: pandas is not installed.
        """
        return frame([site_row(site) for site in self.sites])


def site_row(site: Site) -> dict[str, Any]:
    """All that a table knows of a site, as plain values."""
    row: dict[str, Any] = {
        "site": site.name,
        "op": site.op.value,
        "scope": site.scope,
        "status": site.status.value,
        "reason": site.reason,
    }
    for side, name in ((0, "left"), (1, "right")):
        operand = next((o for o in site.operands if o.side == side), None)
        row[f"{name}_role"] = None if operand is None else operand.role.value
        row[f"{name}_shape"] = None if operand is None else operand.shape
    weight = site.weight
    return row | {
        "output_shape": site.out_shape,
        "dtype": site.operands[0].dtype,
        "paths": () if weight is None else weight.paths,
        "bias": None if site.bias is None else site.bias.paths[0],
        "storable": weight is not None and weight.storable,
        "parameters": site.parameters,
        "multiply_adds": site.multiply_adds,
        "bytes": weight_bytes(site),
        "contraction_size": site.contraction_size,
        "loops": site.loops,
        "steps": site.steps,
    }


def frame(rows: list[dict[str, Any]]) -> Any:
    """A ``pandas.DataFrame`` with the sites' names as index."""
    try:
        import pandas
    except ImportError as error:
        raise errors.MissingPackageError(
            "to_pandas() needs pandas, which is not installed",
            fix='pip install "quantjax[pandas]"',
        ) from error
    return pandas.DataFrame(rows).set_index("site") if rows else pandas.DataFrame()


def _operand_texts(site: Site) -> list[str]:
    def text(operand: Operand) -> str:
        return f"{LETTERS[operand.role]} {shape_text(operand.shape)}"

    texts = [text(operand) for operand in site.operands]
    if site.bias is not None:
        texts[-1] += " +b"
    return texts + [""] * (2 - len(texts))


def stored_bytes(site: Site, bits: int, scale_shape: tuple[int, ...], *, zero_points: bool) -> int:
    """Of a weight as codes of ``bits``, and of its float32 scales and zero points, all layers."""
    scales = math.prod(site.steps) * math.prod(scale_shape)
    return -(-site.parameters * bits // 8) + 4 * scales * (2 if zero_points else 1)
