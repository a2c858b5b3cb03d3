"""A loss that pulls weights to the middle of their bins."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from quantjax.affine import QParams, where_bypassed
from quantjax.arithmetic import Arithmetic
from quantjax.estimators import CLIPPED
from quantjax.granularity import expand
from quantjax.interpreter import leaves_by_path
from quantjax.lean import widened
from quantjax.meshes import automatic
from quantjax.planning import Plan
from quantjax.rounding import HALF_EVEN
from quantjax.simulation import centered_codes, prepare
from quantjax.site_plan import OperandPlan
from quantjax.transforms.calibrate import QState
from quantjax.transforms.live import live_qparams
from quantjax.transforms.operands import weight_at_hand
from quantjax.transforms.qstate import checked_qstate
from quantjax.transforms.steps import over_steps


def dampening_loss(plan: Plan, qstate: QState, params: PyTree) -> Float[Array, ""]:
    """``Σ ‖ŵ - clip(w, low, high)‖²`` over all quantized weights; ``ŵ`` has no gradient.

    ``ŵ = s · (q - z)`` is the quantized weight, ``low`` and ``high`` what the outermost codes stand
    for. The gradient is that of the weights alone, ``2 (w - ŵ)`` inside the range and 0 beyond it,
    so that clipped weights are free to come back. Multiply it by a factor that grows over training
    (the paper: a cosine from 0) and add it to the loss.

    Weights that are functions of parameters count as they enter their product; what the estimator
    transforms (DoReFa) as it is rounded. Weights at 0 bits count nothing.

    Returns:
      A float32 scalar.

    Raises:
      PlanMismatchError: parameters other than those planned for.
      CalibrationError: a planned operand without QParams.

    Sharp edges: random roundings are taken to the nearest. Weights that only a run of the model
    determines (the carry of a loop) are left out.

    >>> import quantjax as qj
    >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[2.0], [-0.75]])}
    >>> policy = qj.uniform_policy(weight_bits=2, activation_bits=None)
    >>> plan = qj.plan(policy, qj.sites(f, params, jnp.ones((1, 2))))
    >>> qstate = qj.calibrate(plan, {}, params)  # levels -2, -1, 0, 1
    >>> float(dampening_loss(plan, qstate, params))  # 2 is clipped to 1, which is a level
    0.0625

    Source: Nagel et al., Overcoming oscillations in quantization-aware training, 2022, section 4.2.
    """
    qstate = checked_qstate(plan, qstate)
    plan.check_params(params)
    leaves = leaves_by_path(params)
    total = jnp.zeros((), jnp.float32)
    for entry in plan.quantized:
        for operand in entry.quantized:
            weight = weight_at_hand(plan, entry, operand, leaves) if operand.is_weight else None
            if weight is None:
                continue
            one = over_steps(partial(_distance, operand), entry.site.steps)
            total += jnp.sum(automatic(one, weight, qstate[entry.site.name][operand.key]))
    return total


def nearest(arithmetic: Arithmetic) -> Arithmetic:
    """The same codes without what only gradients or keys decide."""
    rounding = HALF_EVEN if arithmetic.rounding.is_random else arithmetic.rounding
    return arithmetic._replace(rounding=rounding, estimator=CLIPPED)


def _distance(operand: OperandPlan, weight: jax.Array, qparams: QParams) -> jax.Array:
    """The sum of squares of one layer's weight."""
    quantizer = operand.quantizer
    assert quantizer is not None
    qparams = jax.lax.stop_gradient(live_qparams(operand, weight, qparams))
    x, used = prepare(weight, qparams, quantizer.arithmetic)
    x = widened(x)
    used = used._replace(theta=quantizer.estimator.rest(used.theta))
    spread: Any = lambda array: expand(jnp.asarray(array, jnp.float32), x.shape)  # noqa: E731
    scale, zero = spread(used.scale), jnp.round(spread(used.zero_point))
    middle = scale * centered_codes(x, used, nearest(quantizer.arithmetic))
    theta = quantizer.format.map_groups(used.theta, spread)
    low, high = quantizer.format.level_range(used.bits, theta)
    low, high = (low - zero) * scale, (high - zero) * scale
    clipped = jnp.where(x < low, low, jnp.where(x > high, high, x))
    distance = jnp.sum((jax.lax.stop_gradient(middle) - clipped) ** 2)
    return where_bypassed(used.bits, 0.0, distance)
