"""``qj.freeze``: weights as codes, in the tree that they came in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams, has_codes, is_positive
from quantjax.interpreter import leaves_by_path
from quantjax.layout import STEP, casts, roundings, scale_in_parameter
from quantjax.meshes import automatic
from quantjax.planning import Plan
from quantjax.qtensor import QTensor, like, packed
from quantjax.simulation import transformed
from quantjax.transforms.calibrate import QState
from quantjax.transforms.encoding import Encoding, codes_by_parts, encoded_codes
from quantjax.transforms.keys import Key, split_keys
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.sites import check_plan
from quantjax.transforms.steps import over_steps
from quantjax.transforms.stored import (
    StoredWeight,
    agreement,
    parameter_qparams,
    same_arrays,
    same_qparams,
    stored_weights,
    unless,
)


def freeze(plan: Plan, qstate: QState, params: Any, *, key: Key | None = None) -> Any:
    """Replace each quantized weight by its codes: the same tree, with :class:`QTensor` leaves.

    ``qj.execute(f, plan)(qstate, qparams, x)`` runs it; ``qj.dequantize_params`` turns it back into
    floats, and ``f`` of those agrees with the simulation of the weights. Works under ``jit``.

    What the plan does not quantize stays as it is, and so does a weight that is computed from
    parameters (the plan's table says so): ``qj.execute`` encodes it when it runs.

    Containers of 4 bits and fewer are packed, 2, 4 or 8 codes a byte; symmetric weights have one
    zero point for all. Containers of 8 bits, which a plan has so that a sweep can go there, shrink
    to the width in use by ``qj.pack_params``.

    Args:
      plan: which weights.
      qstate: from ``qj.calibrate``; layers stacked in a scan have scales each.
      params: the tree that was planned for.
      key: for weights that are rounded at random; the draws are not those of ``qj.fake_quantize``.

    Raises:
      KeyMissingError: a random rounding and no key.
      FreezeError: a parameter that one site has in other codes than another, or that is used in
        float as well; a weight at width 0, which has no codes.
      PlanMismatchError, CalibrationError: as ``qj.fake_quantize``.
      DataError: a concrete weight with NaN.

    Memory: one parameter at a time is encoded, in parts; beyond input and output, a fraction of a
    leaf of floats. Formats whose codes depend on the width or on ``theta`` (tables, learned levels)
    are encoded layer by layer, without parts.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: x @ p["w"]
    >>> params, x = {"w": jnp.eye(4), "unused": jnp.ones(2)}, jnp.ones((1, 4))
    >>> plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, x))
    >>> freeze(plan, qj.calibrate(plan, {}, params), params)["w"]
    QTensor(int8[4x4], scale[1x4], float32)
    """
    check_plan(plan, verb="freeze")
    plan.check_params(params, ahead=qstate, call="qj.freeze(plan, qstate, params)")
    qstate = checked_qstate(plan, qstate)
    uses: dict[str, list[StoredWeight]] = {}
    for weight in stored_weights(plan):
        uses.setdefault(weight.path, []).append(weight)
    _check_uses(plan, uses)
    leaves = leaves_by_path(params)
    frozen: dict[str, QTensor] = {}
    for number, (path, weights) in enumerate(uses.items()):
        stated = [parameter_qparams(weight, qstate) for weight in weights]
        leaf = jnp.asarray(leaves[path])
        _check_agreement(weights, stated, leaf.dtype)
        own = _key_for(weights[0], key, number)
        learned = _learned(weights[0], qstate)
        for weight, other in zip(weights[1:], stated[1:], strict=True):
            its = _learned(weight, qstate)
            _check_transforms(weights[0], weight, learned, its)
            agrees = agreement((stated[0], learned), (other, its))
            stated[0] = stated[0]._replace(scale=unless(agrees, stated[0].scale))
        _check_known(weights[0], leaf, stated[0])
        encode = partial(_encode, weights[0])
        frozen[path] = automatic(encode, leaf, stated[0], learned, own, specs=like(leaf))
    flat = [frozen.get(path, leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def _key_for(weight: StoredWeight, key: Key | None, number: int) -> Key | None:
    quantizer = weight.operand.quantizer
    if quantizer is None or not quantizer.rounding.is_random:
        return None  # an estimator's draws are for training: every entry is encoded
    if key is None:
        raise errors.KeyMissingError(
            "the weight is rounded at random and there is no key",
            where=weight.where,
            why="randomness comes from explicit keys only",
            fix="qj.freeze(plan, qstate, params, key=jax.random.key(0))",
        )
    return jax.random.fold_in(key, number)


def _learned(weight: StoredWeight, qstate: QState) -> dict[str, jax.Array]:
    """The estimator's own parameters at the parameter, where they say what is encoded."""
    quantizer, site = weight.operand.quantizer, weight.entry.site
    assert quantizer is not None
    if quantizer.estimator.transform is None:
        return {}
    qparams = qstate[site.name][weight.operand.key]
    layers = len(site.steps)

    def moved(array: jax.Array) -> jax.Array:
        if array.shape[layers:] != weight.operand.operand.shape:  # unless each entry has its own
            array = jnp.broadcast_to(array, qparams.scale.shape)
        return scale_in_parameter(array, weight.moves, layers)

    return {name: moved(array) for name, array in quantizer.estimator.own(qparams.theta).items()}


def _check_transforms(first: StoredWeight, other: StoredWeight, learned: Any, its: Any) -> None:
    """Raise ``FreezeError`` where two sites round other values of one parameter."""
    estimators = [w.operand.quantizer.estimator for w in (first, other) if w.operand.quantizer]
    transforms = {estimator.transform for estimator in estimators}
    same = len(transforms) == 1 and same_arrays(learned, its)
    if not same:
        raise errors.FreezeError(
            f"the parameter {first.path} has two estimators, or one with two sets of parameters",
            where=f"{first.where} and {other.where}",
            why="a frozen tree holds a tied weight once",
            fix="the same scheme and parameters for both, or keep one in float: qj.Scheme()",
        )


def _transformed(
    weight: StoredWeight, leaf: jax.Array, qparams: QParams, stacked: int, static: Encoding
) -> jax.Array:
    """What is rounded in place of the parameter, by the estimator; ``theta`` is its own."""
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    if stacked != len(weight.entry.site.steps):
        raise errors.FreezeError(
            f"{quantizer.estimator.name} of layers that are not stacked along the first axis",
            where=weight.where,
            why="it transforms each layer as a whole",
            fix="stack the layers along axis 0, or keep the site in float: qj.Scheme()",
        )
    for dtype in static.dtypes:
        leaf = leaf.astype(dtype)
    transform = partial(transformed, arithmetic=quantizer.arithmetic)
    of_layers = over_steps(transform, leaf.shape[:stacked])
    return cast(jax.Array, of_layers(leaf, qparams))


def _encode(
    weight: StoredWeight,
    leaf: jax.Array,
    qparams: QParams,
    learned: dict[str, jax.Array],
    key: Key | None,
) -> QTensor:
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    format = quantizer.format
    stacked = 0  # leading axes of a stack of tensors, each of which has its width
    while stacked < len(weight.moves) and weight.moves[stacked].name == STEP:
        stacked += 1
    layered = stacked == len(weight.entry.site.steps)
    dtypes = tuple(map(jnp.dtype, casts(weight.moves)))
    static = Encoding(format, quantizer.rounding, quantizer.scaling, dtypes)
    dtype = leaf.dtype
    if quantizer.estimator.transform is not None:
        in_use = qparams._replace(theta=learned)
        leaf, static = (
            _transformed(weight, leaf, in_use, stacked, static),
            static._replace(dtypes=()),
        )
    scale, bits = _scale_and_width(qparams, stacked, is_symmetric=quantizer.symmetric)
    if format.is_elementwise(qparams.theta):
        codes = codes_by_parts(leaf, qparams, static, key)
    elif layered:
        codes = over_steps(partial(encoded_codes, static), leaf.shape[:stacked])(
            leaf, qparams._replace(bits=bits), split_keys(key, leaf.shape[:stacked])
        )
    else:
        raise errors.FreezeError(
            f"layers of {format.name} that are not stacked along the first axis of the parameter",
            where=weight.where,
            why="each layer has levels of its own, and its codes must be a slice of the whole",
            fix="stack the layers along axis 0, or keep the site in float: qj.Scheme()",
        )
    zero_point = qparams.zero_point
    if quantizer.symmetric and layered:
        zero_point = jnp.zeros((*leaf.shape[:stacked], *(1,) * (leaf.ndim - stacked)), jnp.float32)
    kept = qparams._replace(scale=scale, zero_point=zero_point, bits=bits)
    return packed(codes, kept, format, dtype)


@partial(jax.jit, static_argnums=1, static_argnames="is_symmetric", inline=True)
def _scale_and_width(
    qparams: QParams, stacked: int, *, is_symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """Under a trace nothing can be raised: the scale of what has no codes, or of zero points that a
    symmetric tensor does not keep, becomes NaN."""
    usable = has_codes(qparams)
    if is_symmetric:
        usable &= qparams.zero_point == 0.0
    bits = qparams.bits.reshape(*qparams.bits.shape[:stacked], -1).max(axis=-1)
    return jnp.where(usable, qparams.scale, jnp.nan), bits


def _check_known(weight: StoredWeight, leaf: Any, qparams: QParams) -> None:
    if not np.size(leaf):
        raise errors.FreezeError(
            "a weight without entries has no codes",
            where=f"{weight.where}, shape {np.shape(leaf)}",
            fix="leave the layers out that are none, or exempt the site: qj.Scheme()",
        )
    widths, zeros = concrete(qparams.bits), concrete(qparams.zero_point)
    if widths is not None and not widths.all():
        raise errors.FreezeError(
            "a weight at 0 bits (bypass) has no codes",
            where=weight.where,
            fix="calibrate with a width of 1 or more, or exempt the site: qj.Scheme()",
        )
    quantizer, scales = weight.operand.quantizer, concrete(qparams.scale)
    assert quantizer is not None
    if scales is not None and not is_positive(scales).all():
        raise errors.FreezeError(
            "a scale that is no positive finite number",
            where=weight.where,
            why="a range that was not found, or training that moved it below zero",
            fix="qj.check(qstate), which says why",
        )
    if quantizer.symmetric and zeros is not None and zeros.any():
        raise errors.FreezeError(
            "a symmetric quantizer with a zero point",
            where=weight.where,
            fix="plan with symmetric=False, or leave the zero point at 0",
        )
    known = concrete(jnp.asarray(leaf))
    if known is not None and np.isnan(known).any():
        raise errors.DataError(
            "the weight holds NaN, for which no code stands",
            where=weight.where,
            fix="find its source with jax.config.update('jax_debug_nans', True)",
        )


def _check_uses(plan: Plan, uses: Mapping[str, list[StoredWeight]]) -> None:
    """A parameter is stored once: what uses it in float would see other values."""
    elsewhere = dict(plan.others)
    stored = {weight.entry.site.name for weights in uses.values() for weight in weights}
    for entry in plan.sites:
        if entry.site.name not in stored:
            for path in entry.site.weight_paths:
                elsewhere.setdefault(path, f"site {entry.site.name}")
    for path, weights in uses.items():
        if path in elsewhere:
            raise errors.FreezeError(
                f"the parameter {path} is used in float as well",
                where=f"{weights[0].where}; also used by {elsewhere[path]}",
                why="a frozen tree holds it once, and the simulation has it in two forms",
                fix="plan all its uses alike (qj.every_use(...)), hand it over twice in params, or "
                f"keep it in float: qj.rule(qj.path('{weights[0].entry.site.name}'), qj.Scheme()), "
                "ahead of the other rules",
            )


def _check_agreement(weights: list[StoredWeight], stated: list[QParams], dtype: Any) -> None:
    first, *others = weights
    for weight, qparams in zip(others, stated[1:], strict=True):
        once = f"the parameter {weight.path}"
        where = f"{first.where} and {weight.where}"
        seen = [roundings(one.moves, dtype) for one in (first, weight)]
        if seen[0] != seen[1]:
            names = [" and ".join(str(jnp.dtype(cast)) for cast in each) for each in seen]
            first_one, other = (name or "nothing narrower" for name in names)
            raise errors.FreezeError(
                f"{once} is rounded to {first_one} ahead of one use, to {other} ahead of another",
                where=where,
                why="a frozen tree holds a tied weight once, and its uses see other values",
                fix=f"one cast ahead of both uses: w = w.astype(jnp.{names[0] or names[1]})",
            )
        alike = _same_quantizer(first, weight)
        if not same_arrays(stated[0].bits, qparams.bits):
            raise errors.FreezeError(
                f"{once} has the width {_shown(stated[0].bits)} in one use, {_shown(qparams.bits)} "
                "in another",
                where=where,
                why="a frozen tree holds a tied weight once",
                fix="one width for both sites, or the weight twice in params",
            )
        if not (alike and same_qparams(stated[0], qparams)):
            sites, key = (first.entry.site.name, weight.entry.site.name), weight.operand.key
            shared = f"qstate['{sites[1]}']['{key}'] = qstate['{sites[0]}']['{key}']"
            raise errors.FreezeError(
                f"{once} has two sets of QParams",
                where=where,
                why="a frozen tree holds a tied weight once"
                + ("; training may have moved its scales apart" if alike else ""),
                fix=f"scales per tensor, and in the loss {shared}; or scales that are not learned"
                if alike
                else "plan both sites with one quantizer, per tensor or along the same axis",
            )


def _shown(bits: jax.Array) -> str:
    known = concrete(bits)
    return "traced" if known is None else ", ".join(f"{width:g}" for width in np.unique(known))


def _same_quantizer(first: StoredWeight, other: StoredWeight) -> bool:
    quantizers = first.operand.quantizer, other.operand.quantizer
    assert quantizers[0] is not None
    assert quantizers[1] is not None
    rounding = quantizers[0].rounding == quantizers[1].rounding
    scaling = quantizers[0].scaling == quantizers[1].scaling
    same_format = quantizers[0].format == quantizers[1].format
    return same_format and rounding and scaling
