"""Widths that were moved off their whole numbers: which number is used in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.formats.base import nearest_width
from quantjax.formats.minifloat import WIDTHS_IN_THETA, FloatBits

NOISE = 1e-3  # what arithmetic may add to a whole number of bits


def whole_widths(qstate: Mapping[str, Mapping[str, QParams]]) -> dict[str, dict[str, QParams]]:
    """Each width as the nearest whole number; what is below a half stays, and is one if it is 0.

    Weight decay and averages over ``(params, qstate)`` move widths that have no gradient, by parts
    of a millionth to begin with; most formats would take 3.9999995 bits for 3. ``qj.check``
    reports what has moved further.
    """
    return {
        site: {key: whole_qparams(qparams) for key, qparams in operands.items()}
        if isinstance(operands, Mapping)
        else operands
        for site, operands in qstate.items()
    }


def whole_qparams(qparams: Any, nearest: Callable[[Any], Any] = nearest_width) -> Any:
    """One operand's, with widths that ``nearest`` has made whole."""
    if not isinstance(qparams, QParams) or qparams.bits is None:
        return qparams
    theta = qparams.theta
    if isinstance(theta, Mapping) and not WIDTHS_IN_THETA.isdisjoint(theta):
        theta = {
            name: nearest(array) if name in WIDTHS_IN_THETA else array
            for name, array in theta.items()
        }
    return qparams._replace(bits=nearest(qparams.bits), theta=theta)


def known_nearest(bits: Any) -> Any:
    """In NumPy, since inside a trace JAX would not know the result; a tracer as it is."""
    known = concrete(bits)
    if known is None:
        return bits
    known = known.astype(np.float32)
    return np.where(known < 0.5, known, np.floor(known + np.float32(127.5)) - np.float32(127.0))


def settled(bits: Any) -> Any:
    """Widths asked for that are next to a whole number, as that number; all else as it is.

    ``jnp.linspace(1, 16, 16)`` has 7.0000005; 3.5 is a mistake, unlike in QParams.

    >>> settled({"w": 3.5, "v": np.float32(7.0000005)}), settled([4, 1.9999998])
    ({'w': 3.5, 'v': array(7.)}, [4, array(2.)])
    """
    if isinstance(bits, Mapping):
        return {name: settled(width) for name, width in bits.items()}
    if isinstance(bits, FloatBits):
        return FloatBits(*map(settled, bits))
    if isinstance(bits, list | tuple):
        return [settled(width) for width in bits]
    if not isinstance(bits, float | np.floating | np.ndarray | jax.Array):
        return bits  # whole, or refused later
    if not jnp.issubdtype(getattr(bits, "dtype", np.dtype(np.float64)), jnp.floating):
        return bits
    known = concrete(bits)
    if known is None:
        real, near = jnp.asarray(bits, jnp.float32), nearest_width(bits)
        return jnp.where(jnp.abs(real - near) < NOISE, near, real)
    known, near = known.astype(np.float64), known_nearest(bits)
    with np.errstate(invalid="ignore"):  # infinity is refused later
        moved = (known != near) & (np.abs(known - near) < NOISE)
    return np.where(moved, near, known) if moved.any() else bits
