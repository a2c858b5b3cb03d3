"""How many bits the weights take, differentiable where widths are learned."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax import estimators
from quantjax.affine import is_bypassed
from quantjax.planning import Plan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.steps import over_steps


def learned_bits(plan: Plan, qstate: QState) -> dict[str, dict[str, Float[Array, "..."]]]:
    """The width in use of each operand, ``{site: {operand: bits}}``.

    Differentiable in ``qstate`` where the estimator learns the width (``ROUNDED_WIDTH``,
    ``DIFFERENTIABLE_QUANTIZATION``), for a penalty on the size of weights or activations; elsewhere
    it is ``QParams.bits``. Layers stacked in a scan have one each, a leading axis.

    Raises:
      CalibrationError: a planned operand without QParams.

    >>> import quantjax as qj
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
    >>> quantizer = qj.weight_quantizer(bits=4, estimator=qj.estimators.ROUNDED_WIDTH)
    >>> policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=quantizer))])
    >>> plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 4))))
    >>> learned_bits(plan, qj.calibrate(plan, {}, params))["w"]["weight"].tolist()
    4.0

    Source: Uhlich et al., Mixed precision DNNs: all you need is a good parametrization, 2020,
    section 2.
    """
    qstate = checked_qstate(plan, qstate)
    found: dict[str, dict[str, jax.Array]] = {}
    for entry in plan.quantized:
        widths: dict[str, jax.Array] = {}
        for operand in entry.quantized:
            quantizer = operand.quantizer
            assert quantizer is not None
            width = partial(
                estimators.learned_bits, format=quantizer.format, estimator=quantizer.estimator
            )
            qparams = qstate[entry.site.name][operand.key]
            widths[operand.key] = over_steps(width, entry.site.steps)(qparams)
        found[entry.site.name] = widths
    return found


def weight_bits_total(plan: Plan, qstate: QState) -> Float[Array, ""]:
    """``Σ entries · bits`` of all planned weights, in bits; differentiable as :func:`learned_bits`.

    A width of 0 counts as the bits of the weight's own dtype. A weight that several sites use
    counts once, at the widest of its widths. Scales and what the plan leaves in float are left out.

    A penalty is ``jax.nn.relu(weight_bits_total(plan, qstate) - budget) ** 2`` times a factor.

    Raises:
      CalibrationError: a planned operand without QParams.

    Sharp edges: a float32 scalar: exact up to 2^24 bits, to 1e-7 beyond.

    >>> import quantjax as qj
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
    >>> policy = qj.uniform_policy(weight_bits=3, activation_bits=None)
    >>> plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 4))))
    >>> float(weight_bits_total(plan, qj.calibrate(plan, {}, params)))
    48.0

    Source: Uhlich et al., Mixed precision DNNs, 2020, section 3.
    """
    widths = learned_bits(plan, qstate)
    found: dict[tuple[object, ...], jax.Array] = {}
    for entry in plan.quantized:
        for operand in entry.quantized:
            if not operand.is_weight:
                continue
            weight, bits = operand.operand, widths[entry.site.name][operand.key]
            own = 8.0 * jnp.dtype(weight.dtype).itemsize
            total = math.prod(weight.shape) * jnp.sum(jnp.where(is_bypassed(bits), own, bits))
            # One parameter, however it is moved, or what is derived alike from the same ones.
            what = (weight.recipe, weight.constants) if not weight.storable else ()
            what = (weight.paths, *what)
            found[what] = jnp.maximum(found[what], total) if what in found else total
    return sum(found.values(), start=jnp.zeros((), jnp.float32))
