"""Says what one equation of a program is: its row in the table of sites."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core as jex_core

from quantjax.interpreter import provenance
from quantjax.interpreter.moves import Axes, Moves, axes_back, axes_forth
from quantjax.interpreter.product import Product, product_of, unsupported
from quantjax.interpreter.provenance import Loop, Origin, OriginKind
from quantjax.interpreter.sites import Operand, Role, Site, SiteStatus


@dataclasses.dataclass(frozen=True)
class Around:
    """What lies around a program.

    Attributes:
      scope: module path.
      labels: containers for the table.
      loops: its scans and whiles.
      opaque: why nothing in it can be rewritten.
      note: what to know of sites in it.
    """

    scope: str = ""
    labels: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = ()
    opaque: str = ""
    note: str = ""

    def within(self, scope: str, label: str, *, opaque: str = "", note: str = "") -> Around:
        """One container further in."""
        return dataclasses.replace(
            self,
            scope=scope,
            labels=(*self.labels, label) if label else self.labels,
            opaque=self.opaque or opaque,
            note=self.note or note,
        )

    def looped(self, loop: Loop) -> Around:
        """Inside one more loop."""
        return dataclasses.replace(self, loops=(*self.loops, loop))


def site_of(eqn: jex_core.JaxprEqn, origins: Sequence[Origin]) -> Product | None:
    """The product or lookup that the equation is, if it is one, given where its operands come from.

    A lookup is one if it takes parts of a parameter that the inputs choose.
    """
    product = product_of(eqn)
    if product is None or not product.op.is_lookup:
        return product
    table, *indices = origins
    known = table.kind in (OriginKind.LEAF, OriginKind.FUNCTION)
    chosen = any(index.kind is OriginKind.DATA for index in indices)
    if not (known and chosen and jnp.issubdtype(product.lhs.dtype, jnp.floating)):
        return None
    return product if product.axes(0)[0] or unsupported(product) else None


def describe(
    product: Product, origins: Sequence[Origin], scope: str, around: Around
) -> tuple[Site, Origin | None]:
    """The row of a product or lookup, and the origin of its weight."""
    sides = range(product.factors)
    weights = [side for side in sides if origins[side].kind is not OriginKind.DATA]
    avals = (product.lhs, product.rhs)[: product.factors]
    reason = around.opaque or unsupported(product)
    if len(weights) == 2:
        reason = reason or "both operands are known without the inputs: computed in float, once"
    reason = reason or _not_real([aval.dtype for aval in avals])
    if not weights and any(0 in aval.shape for aval in avals):
        reason = reason or "an empty product"  # parallel scans multiply empty halves
    weight = weights[0] if len(weights) == 1 else None
    if weight is not None and origins[weight].made and origins[weight].value is None:
        reason = reason or "the function makes one operand itself, to resize or sum: in float"
        weight = None
    origin = origins[weight] if weight is not None else None
    around_it = provenance.at_product(scope, origins, weight)
    operands = tuple(_operand(product, side, weight, around_it[side]) for side in sides)
    notes = around.note, "" if origin is None else _weight_note(origin)
    site = Site(
        name=_name(product, origin, scope),
        op=product.op,
        scope=scope,
        operands=operands,
        out_shape=tuple(product.out.shape),
        contraction_size=product.contraction_size(),
        taps=product.taps(),
        multiply_adds=product.multiply_adds()
        * math.prod(loop.length or 1 for loop in around.loops),
        loops=around.labels,
        status=SiteStatus.OPAQUE if reason else SiteStatus.REWRITABLE,
        reason=reason or "; ".join(note for note in notes if note),
        output=_output(product, weight),
    )
    return site, origin


def _not_real(dtypes: Sequence[Any]) -> str:
    """Why operands of these dtypes are no product that can be quantized; nothing where they are."""
    others = [dtype for dtype in dtypes if not jnp.issubdtype(dtype, jnp.floating)]
    if not others:
        return ""
    found = "not a product of real floating-point numbers"
    if len(others) < len(dtypes) and not jnp.issubdtype(others[0], jnp.complexfloating):
        found += f": cast the {others[0]} operand to a float in the model to quantize it"
    return found


def _output(product: Product, weight: int | None) -> Operand:
    channels = product.out_channels(weight)
    return Operand(
        key=Role.OUTPUT.value,
        role=Role.OUTPUT,
        side=2,
        shape=tuple(product.out.shape),
        dtype=str(product.out.dtype),
        free=tuple(a for a in range(product.out.ndim) if a not in channels),
        contracted=channels,
        window=(),
    )


class Result(NamedTuple):
    """A variable that holds the result of a site.

    Attributes:
      place: of the site, in what is found.
      batch: axes of the product's result that its operands have in common.
      moves: what the result went through since.
    """

    place: int
    batch: tuple[int, ...] = ()
    moves: Moves = ()


def bias_of(
    site: Site, weight: Origin | None, added: Origin, shape: Sequence[int], result: Result
) -> Operand | None:
    """The bias that is added to a site's result, if it is one.

    One parameter, moved, cast and broadcast, with an entry for each output channel and along those
    channels, as far as that can be seen. Members of an ensemble, which a map puts among the axes of
    the batch or of the channels ahead of a layer's own, may have one each or one in common.

    Args:
      shape: that of what is added.
    """
    operand, output = site.weight, site.output
    if operand is None or output is None or weight is None or site.op.is_lookup:
        return None
    same_layers = added.loops == weight.loops and added.derivable
    source = unbroadcast(added)
    if source is None or not same_layers:
        return None
    own = tuple(shape) if source is added else _shape(source, added)
    if own is None:
        return None
    axes = axes_back(result.moves, _varies(source, added, own))
    sizes, last = output.shape, output.contracted[-1:]
    if axes is None:  # cut or joined on the way
        every = math.prod(operand.shape[axis] for axis in operand.free)
        of_one = every // max(math.prod(sizes[axis] for axis in result.batch), 1)
        is_bias = math.prod(own) in (every, of_one)
    else:
        is_bias = axes <= {*output.contracted, *result.batch}
        is_bias &= math.prod(sizes[axis] for axis in axes) == math.prod(own)
        is_bias &= all(axis in axes or sizes[axis] == 1 for axis in last)
    if not is_bias:
        return None
    return Operand(
        key=Role.BIAS.value,
        role=Role.BIAS,
        side=3,
        shape=own,
        dtype=operand.dtype,
        free=(),
        contracted=tuple(range(len(own))),
        window=(),
        paths=source.paths,
        storable=True,
    )


def unbroadcast(origin: Origin) -> Origin | None:
    """What is only moved and broadcast on its way to this value: a parameter, or a layer of one."""
    node = origin
    while node.eqn is not None:
        if node.eqn.primitive.name not in provenance.REARRANGING | {"broadcast_in_dim"}:
            return None
        node = node.operands[0]
    known = node.kind is OriginKind.LEAF
    return node if known else None


def _shape(source: Origin, origin: Origin) -> tuple[int, ...] | None:
    """The shape of ``source``, which ``origin`` is made of."""
    node = origin
    while node is not source:
        if node.operands and node.operands[0] is source and node.eqn is not None:
            return provenance.eqn_shapes(node.eqn)[0]
        node = node.operands[0]
    return None


def _varies(source: Origin, origin: Origin, shape: Sequence[int]) -> Axes:
    """Along which axes ``origin`` has different entries, made of ``source`` of that shape."""
    path, node = [], origin
    while node is not source and node.eqn is not None:
        path.append(node.eqn)
        node = node.operands[0]
    axes: Axes = frozenset(axis for axis, size in enumerate(shape) if size != 1)
    for eqn in reversed(path):
        axes = axes_forth(eqn, axes)
    return axes


def _operand(product: Product, side: int, weight: int | None, origin: Origin) -> Operand:
    aval = (product.lhs, product.rhs)[side]
    free, contracted, window = product.axes(side)
    is_weight = side == weight
    role = Role.GRADIENT if origin is provenance.COTANGENT else Role.ACTIVATION
    role = Role.WEIGHT if is_weight else role
    keys = (role.value, role.value) if weight is not None else ("lhs", "rhs")
    recipe, constants = provenance.recipe(origin) if is_weight else ("", ())
    return Operand(
        key=keys[side],
        role=role,
        side=side,
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        free=free,
        contracted=contracted,
        window=window,
        paths=origin.paths if is_weight else (),
        recipe=recipe,
        constants=constants,
        storable=is_weight and provenance.is_rearranged_leaf(origin),
    )


def _name(product: Product, weight: Origin | None, scope: str) -> str:
    if weight is None or weight.kind is OriginKind.CONSTANT:
        return f"{scope}/{product.op.value}" if scope else product.op.value
    if weight.kind is OriginKind.LEAF:
        return weight.paths[0]
    shown = ",".join(weight.paths[:3]) + (",..." if len(weight.paths) > 3 else "")
    return f"f({shown})"


def _weight_note(origin: Origin) -> str:
    if origin.kind is OriginKind.FUNCTION and not origin.derivable:
        return "the weight changes from step to step: observed, not storable"
    if origin.kind is OriginKind.FUNCTION:
        return "the weight is computed from parameters: quantized in simulation, not storable"
    if origin.kind is OriginKind.LEAF and not origin.derivable:
        return "its place in the parameter changes in a loop: observed, one scale for all"
    if origin.kind is OriginKind.LEAF and not provenance.is_rearranged_leaf(origin):
        return "a part of a parameter enters, or integers: quantized in simulation, not storable"
    if origin.kind is OriginKind.CONSTANT:
        return "the weight is a constant of the function: pass it in params to name and store it"
    return ""
