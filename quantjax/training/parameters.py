"""One of the estimators' parameters, set by hand or by a schedule."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax import errors
from quantjax.affine import QParams
from quantjax.training.parts import theta_names
from quantjax.transforms.calibrate import QState


def with_parameter(
    qstate: QState, name: str, value: float | Float[Array, ""] | Float[Array, "..."]
) -> QState:
    """A qstate in which every ``theta[name]`` is ``value``; what has none stays as it is.

    For what a schedule sets: IR-Net's ``sharpness``, Quant-Noise's ``rate`` (1 for evaluation),
    EWGS's ``delta``.

    Args:
      qstate: from ``qj.calibrate`` or from training.
      name: of the entry.
      value: a scalar, or an array that broadcasts to each entry; may be traced.

    Raises:
      TrainingError: no operand has the entry; a value that does not broadcast to one.

    >>> qparams = QParams(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.float32(1.0))
    >>> qparams = qparams._replace(theta={"sharpness": jnp.ones((1, 2))})
    >>> qstate = with_parameter({"w": {"weight": qparams}}, "sharpness", 4.0)
    >>> qstate["w"]["weight"].theta["sharpness"].tolist()
    [[4.0, 4.0]]
    """
    known = theta_names(qstate)
    if name not in known:
        raise errors.TrainingError(
            f"no operand has a parameter {name}",
            where="qj.training.with_parameter",
            why=f"there are {', '.join(sorted(known)) or 'none'}",
            fix="plan with an estimator that has it, for instance qj.estimators.ERROR_DECAY",
        )
    given = jnp.asarray(value, jnp.float32)

    def replaced(site: str, key: str, qparams: QParams) -> QParams:
        if not isinstance(qparams.theta, Mapping) or name not in qparams.theta:
            return qparams
        shape = jnp.shape(qparams.theta[name])
        return qparams._replace(theta={**qparams.theta, name: _fitted(given, shape, site, key)})

    return {
        site: {key: replaced(site, key, qparams) for key, qparams in operands.items()}
        for site, operands in qstate.items()
    }


def _fitted(value: jax.Array, shape: tuple[int, ...], site: str, key: str) -> jax.Array:
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError:
        raise errors.TrainingError(
            f"a value of shape {value.shape} for a parameter of shape {shape}",
            where=f"site {site}, {key}",
            fix="a scalar, which all entries get",
        ) from None
