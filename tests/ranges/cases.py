"""What the tests of range rules share: all of them, data, and the error that a range makes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax import integer, ranges, statistics
from quantjax.ranges import RangeRule, Target
from quantjax.statistics import Statistics

SEARCHED = (ranges.MSE, ranges.l_p(2.4), ranges.SQNR, ranges.COSINE)
DIVERGENCES = (ranges.KL_TENSORRT, ranges.KL_MODELOPT, ranges.KL_ONNXRUNTIME)
MOMENTS = (
    ranges.sigma(3.0),
    ranges.SAWB,
    ranges.LSQ,
    ranges.ACIQ_GAUSSIAN,
    ranges.ACIQ_LAPLACIAN,
)
RULES = (
    ranges.MIN_MAX,
    ranges.MOVING_AVERAGE,
    ranges.percentile(0.99),
    ranges.constant(-1.0, 2.0),
    *MOMENTS,
    *SEARCHED,
    *DIVERGENCES,
)
SIGNED, UNSIGNED = integer(max_bits=8), integer(max_bits=8, signed=False)
SYMMETRIC = Target(SIGNED, True, jnp.float32(8))
ASYMMETRIC = Target(UNSIGNED, False, jnp.float32(8))
DRAWS = {
    "gaussian": lambda g, n: g.normal(size=n),
    "laplacian": lambda g, n: g.laplace(size=n),
    "relu": lambda g, n: np.maximum(g.normal(size=n), 0.0),
    "student": lambda g, n: g.standard_t(3, size=n),
    "shifted": lambda g, n: g.normal(size=n) + 2.0,
    "uniform": lambda g, n: g.uniform(-1, 3, size=n),
}


def drawn(kind: str, seed: int = 0, size: int = 4096) -> np.ndarray:
    """Entries of a distribution, float32."""
    return np.float32(DRAWS[kind](np.random.default_rng(seed), size))


updated = jax.jit(statistics.update)


def observed(*batches: np.ndarray, where: Any = None) -> Statistics:
    """Statistics of one group after these batches."""
    seen = statistics.init((1,))
    for batch in batches:
        seen = updated(seen, jnp.asarray(batch), where=where)
    return seen


def at_hand(x: np.ndarray) -> Statistics:
    """Statistics of one group with its values."""
    return statistics.of_tensor(jnp.asarray(x), (1,), with_values=True)


def derived(rule: RangeRule, seen: Statistics, target: Target, bits: float = 8) -> Any:
    """Both bounds of the one group."""
    found = ranges.derive(rule, seen, target._replace(bits=jnp.float32(bits)))
    return found.low.item(), found.high.item()


@functools.cache
def _quantized(format: Any, symmetric: bool) -> Any:
    def run(x: jax.Array, low: jax.Array, high: jax.Array, bits: jax.Array) -> jax.Array:
        return Target(format, symmetric, bits).quantize(x, low, high)[0]

    return jax.jit(jax.vmap(run, (None, 0, 0, None)))


def losses(x: np.ndarray, target: Target, bits: float, low: Any, high: Any, p: float = 2.0) -> Any:
    """``mean |Q(x) - x|^p`` in float64 for each of several ranges."""
    ends = (jnp.atleast_1d(jnp.asarray(end, jnp.float32)) for end in (low, high))
    run = _quantized(target.format, target.symmetric)
    y = np.float64(run(jnp.asarray(x), *ends, jnp.float32(bits)))
    return (np.abs(y - np.float64(x)) ** p).mean(1)


def least(x: np.ndarray, target: Target, bits: float, tries: int = 400) -> float:
    """The smallest mean squared error over symmetric clips, or over pairs of both ends."""
    low, high = float(x.min()), float(x.max())
    if target.symmetric:
        reach = max(-low, high) * np.linspace(1.0 / tries, 1.0, tries)
        return float(losses(x, target, bits, -reach, reach).min())
    shares = np.linspace(0.02, 1.0, 40)
    a, b = np.meshgrid(shares * min(low, 0.0), shares * max(high, 0.0))
    return float(losses(x, target, bits, a.ravel(), b.ravel()).min())
