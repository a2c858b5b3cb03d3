"""Surrogates of the sign's derivative, for codes of one signed bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quantjax.affine import QParams
from quantjax.estimators.base import Estimator, Need, Parameters, Point
from quantjax.formats import Format


def _approx_sign(point: Point) -> jax.Array:
    return jnp.maximum(2.0 - 2.0 * jnp.abs(point.scaled), 0.0)


APPROX_SIGN = Estimator("approx-sign", _approx_sign, needs=frozenset({Need.ONE_BIT}))
"""``∂q/∂u = max(2 - 2|u|, 0)`` with ``u = x/s``: the slope of a parabola on each side of zero.

Source: Liu et al., Bi-Real Net: enhancing the performance of 1-bit CNNs with improved
representational capability and advanced training algorithm, 2018, section 3.3.
"""


def _swish_sign(point: Point) -> jax.Array:
    beta = point.parameters["beta"]
    v = beta * point.scaled
    # β (2 - v tanh(v/2)) / (1 + cosh v), in terms that do not overflow: 1/(1 + cosh v) = 2σ(v)σ(-v)
    return beta * (2.0 - v * jnp.tanh(0.5 * v)) * 2.0 * jax.nn.sigmoid(v) * jax.nn.sigmoid(-v)


def _is_positive(parameters: Parameters) -> jax.Array:
    (number,) = parameters.values()
    return number > 0.0


def _beta(qparams: QParams, format: Format) -> Parameters:
    del format
    return {"beta": jnp.full_like(qparams.scale, 5.0)}


SWISH_SIGN = Estimator(
    "swish-sign",
    _swish_sign,
    parameters=("beta",),
    start=_beta,
    needs=frozenset({Need.ONE_BIT}),
    valid=_is_positive,
)
"""``∂q/∂u = β (2 - βu tanh(βu/2)) / (1 + cosh(βu))``, the derivative of
``2σ(βu)(1 + βu(1 - σ(βu))) - 1``; it is negative further out.

``β`` is ``theta["beta"]``, 5 to start with; it sets the width of the bump and is not learned.

Source: Darabi et al., Regularized binary network training (BNN+), 2019, section 3.
"""


def _magnitude_aware(point: Point) -> jax.Array:
    far = jnp.abs(point.scaled * point.scale) >= 1.0
    return point.scale * (~far).astype(jnp.float32)  # NaN is not clipped


MAGNITUDE_AWARE = Estimator("magnitude-aware", _magnitude_aware, needs=frozenset({Need.ONE_BIT}))
"""``∂y/∂w = s`` for ``|w| < 1``, else 0, with ``s`` the mean magnitude of the weights.

Large weights of a channel make its gradients larger, so that signs which hardly move are changed.
``s = E|w|`` in every forward pass is the rule ``qj.ranges.XNOR`` with a live range.

Source: Liu et al., Bi-Real Net, 2018, section 3.3.
"""


def _error_decay(point: Point) -> jax.Array:
    t = point.parameters["sharpness"]
    k = jnp.maximum(1.0 / t, 1.0)
    return k * t * (1.0 - jnp.tanh(t * point.scaled) ** 2)


def _sharpness(qparams: QParams, format: Format) -> Parameters:
    del format
    return {"sharpness": jnp.full_like(qparams.scale, 0.1)}


ERROR_DECAY = Estimator(
    "error-decay",
    _error_decay,
    parameters=("sharpness",),
    start=_sharpness,
    needs=frozenset({Need.ONE_BIT}),
    valid=_is_positive,
)
"""``∂q/∂u = k t (1 - tanh²(t u))``, ``k = max(1/t, 1)``: nearly 1 everywhere at first, then a bump.

``t = theta["sharpness"]`` grows over training from 0.1 to 10, ``t = 0.1 · 10^(2 i/N)`` at step
``i`` of ``N``: ``quantjax.training.error_decay``. It is not learned.

Source: Qin et al., Forward and backward information retention for accurate binary neural networks
(IR-Net), 2020, section 3, error decay estimator.
"""
