"""Quantize a parameter tree without a model: ``quantize_params``, and what undoes or packs it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import Fault
from quantjax.arguments import expect
from quantjax.granularity import OperandAxes, PerChannel, PerGroup
from quantjax.interpreter import leaves_by_path
from quantjax.kernels import as_site, kernels_in
from quantjax.meshes import automatic
from quantjax.policy import Policy
from quantjax.printing import shape_text
from quantjax.qtensor import QTensor, encode, first_quantized, is_quantized, packed
from quantjax.quantizer import Quantizer
from quantjax.simulation import prepare


def quantize_params(params: PyTree, policy: Policy, *, key: PRNGKeyArray | None = None) -> PyTree:
    """Replace kernels by :class:`QTensor`, from their own ranges; no model and no data.

    A kernel is a floating-point leaf of rank 2 or more, whose name does not end in ``bias``,
    ``scale``, ``offset``, ``beta``, ``gamma``, ``mean`` or ``var``, and that is none of Haiku's
    running averages. What is quantized already stays.
    Without a model nothing tells which axis is the output channel, so a rule states it:
    ``qj.PerChannel(axis=-1)``, ``qj.PerGroup(64, axis=-2)``, or ``qj.PerTensor()``.

    Args:
      params: the tree.
      policy: its selectors see each kernel as a site named by its path; the first match wins.
      key: for weights that are rounded at random.

    Returns:
      The same tree with ``QTensor`` leaves. Works under ``jit``.

    Raises:
      PolicyError: a rule that matches no kernel and is not optional.
      GranularityError: a channel or group granularity without an axis.
      DataError: a concrete kernel with NaN or infinity.
      KeyMissingError: a random rounding without a key.

    >>> import quantjax as qj
    >>> weights = qj.weight_quantizer(bits=4, granularity=qj.PerChannel(axis=-1))
    >>> policy = qj.Policy([qj.rule(qj.path("*kernel"), qj.Scheme(weights=weights))])
    >>> quantize_params({"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, policy)
    {'bias': Array([1., 1.], dtype=float32), 'kernel': QTensor(int4[4x2], scale[1x2], float32)}
    """
    fix = "qj.quantize_params(params, qj.Policy([qj.rule(qj.weighted(), scheme)]))"
    expect(policy, Policy, argument="policy", where="qj.quantize_params", fix=fix)
    named = leaves_by_path(params, is_leaf=is_quantized)
    kernels = {name: as_site(name, leaf) for name, leaf in kernels_in(named).items()}
    sites = list(kernels.values())
    chosen = policy.choices(sites)
    for rule, selector in zip(policy.rules, policy.resolved(sites), strict=True):
        if not rule.optional and not any(map(selector.matches, sites)):
            raise errors.PolicyError(
                f"the rule '{rule}' matches no kernel",
                where=f"kernels: {', '.join(list(kernels)[:8]) or 'none'}",
                why=""
                if kernels or first_quantized(params) is None
                else "all are quantized already",
                fix="qj.path('*kernel'), or qj.rule(..., optional=True)",
            )
    leaves = []
    for number, (name, leaf) in enumerate(named.items()):
        match = chosen.get(name)
        quantizer = match.scheme.weights if match is not None else None
        own = None if key is None else jax.random.fold_in(key, number)
        leaves.append(leaf if quantizer is None else _quantize(name, leaf, quantizer, own))
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), leaves)


def dequantize_params(qparams: PyTree) -> PyTree:
    """The same tree with every :class:`QTensor` as floats of its original dtype.

    >>> dequantize_params({"bias": jnp.ones(2)})
    {'bias': Array([1., 1.], dtype=float32)}
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_quantized(leaf) else leaf,
        qparams,
        is_leaf=is_quantized,
    )


def pack_params(qparams: PyTree) -> PyTree:
    """Each integer :class:`QTensor` in the smallest container for the width in use: codes of 3 and
    4 bits two a byte, of 2 bits four, of 1 bit eight. Other formats have containers of their own,
    ``max_bits``, and are packed from the start.

    Plans have containers of 8 bits by default, so that one compiled program serves a sweep; this is
    for what is kept. ``qj.execute`` with the plan at hand takes either. Codes and values stay.

    Args:
      qparams: from ``qj.freeze`` or ``qj.quantize_params``; its widths are concrete.

    Raises:
      BitsError: widths that are traced, so that no shape can depend on them.

    >>> import quantjax as qj
    >>> policy = qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=qj.weight_quantizer(
    ...     bits=4, granularity=qj.PerTensor())))])
    >>> frozen = qj.quantize_params({"w": jnp.ones((64, 64))}, policy)
    >>> frozen["w"].stored.nbytes, pack_params(frozen)["w"].stored.nbytes
    (4096, 2048)
    """
    return jax.tree.map(
        lambda leaf: _packed(leaf) if is_quantized(leaf) else leaf, qparams, is_leaf=is_quantized
    )


def _packed(tensor: QTensor) -> QTensor:
    widths = concrete(tensor.qparams.bits)
    if widths is None:
        raise errors.BitsError(
            "the widths of a tensor are traced, and its container cannot depend on them",
            where=f"qj.pack_params, tensor {shape_text(tensor.shape)}",
            fix="pack outside of jit, or plan with a smaller container: qj.integer(max_bits=4)",
        )
    format = tensor.format.narrowed(int(widths.max(initial=1)))
    if format.code_bits == tensor.format.code_bits:
        return tensor
    codes = tensor.codes.astype(format.storage_dtype)
    return packed(codes, tensor.qparams, format, tensor.dtype)


def _quantize(name: str, leaf: Any, quantizer: Quantizer, key: PRNGKeyArray | None) -> QTensor:
    granularity = quantizer.granularity
    where = f"parameter {name} {shape_text(jnp.shape(leaf))}"
    if isinstance(granularity, PerChannel | PerGroup) and granularity.axis is None:
        axis = "axis=-1" if isinstance(granularity, PerChannel) else f"{granularity.size}, axis=-2"
        raise errors.GranularityError(
            "no axis is stated, and without a model none can be found",
            where=where,
            fix=f"qj.{type(granularity).__name__}({axis})",
        )
    leaf = jnp.asarray(leaf)
    if not leaf.size:
        raise errors.DataError(
            "a kernel without entries has no range",
            where=where,
            fix="leave it out of the tree, or exempt it: a rule with qj.Scheme()",
        )
    shape = granularity.scale_shape(leaf.shape, OperandAxes((), ()), is_weight=True)
    bits = jnp.asarray(quantizer.bits, jnp.float32)
    qparams = automatic(partial(quantizer.qparams_of, scale_shape=shape), leaf, bits)
    fault = concrete(qparams.zero_point)
    scale = concrete(qparams.scale)
    if scale is not None and fault is not None and (scale != scale).any():
        kind = Fault(int(fault[scale != scale][0]))
        raise errors.DataError(
            f"the kernel has no range ({kind.name.lower().replace('_', ' ')})",
            where=where,
            fix=f"look for NaN or infinity, or exempt it: qj.rule(qj.path('{name}'), qj.Scheme())",
        )
    if quantizer.symmetric:  # one for all
        qparams = qparams._replace(zero_point=jnp.zeros((1,) * leaf.ndim, jnp.float32))
    format, rounding, scaling = quantizer.format, quantizer.rounding, quantizer.scaling
    estimator, dtype = quantizer.estimator, leaf.dtype
    leaf, qparams = prepare(leaf, quantizer.started(qparams), quantizer.arithmetic)
    qparams = qparams._replace(theta=estimator.rest(qparams.theta))
    tensor = encode(leaf, qparams, format, rounding=rounding, scaling=scaling, key=key)
    return QTensor(tensor.stored, tensor.qparams, format, dtype, tensor.packing)
