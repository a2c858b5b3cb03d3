"""What the tests of fitted scales share: tensors, programs of them, and losses in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.arithmetic import Arithmetic
from quantjax.formats import Format, integer
from quantjax.ranges.base import FitRule
from quantjax.simulation import apply
from tests.oracles.integers import spread

SHAPE = (12, 16)
# The tensor, columns, rows, groups that divide, groups of 6 columns of all rows and of half.
GROUPS = ((1, 1), (1, 16), (12, 1), (3, 4), (1, 3), (2, 3))
INTEGERS = integer(max_bits=8)
DRAWS = {
    "normal": lambda g, n: g.normal(size=n),
    "laplace": lambda g, n: g.laplace(size=n),
    "student": lambda g, n: g.standard_t(3, size=n),
    "pruned": lambda g, n: g.normal(size=n) * (g.uniform(size=n) < 0.3),
    "skewed": lambda g, n: g.exponential(size=n) - 0.3,
}


def coarse(bits: float) -> float:
    """How far a loss in float32 may be off: errors are ``2^-bits`` of what they are rounded as."""
    return 2e-6 + 2.0 ** (bits - 22)


def drawn(kind: str, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Entries of a distribution, float32."""
    return np.float32(DRAWS[kind](np.random.default_rng(seed), shape))


@functools.cache
def program(rule: FitRule, groups: tuple[int, ...] = (12, 1), format: Format = INTEGERS) -> Any:
    """``(x, bits) -> (qparams, y)``: one program for all widths."""

    def run(x: jax.Array, bits: jax.Array) -> Any:
        qparams = rule.fit(x, groups, format, bits)
        return qparams, apply(x, qparams, Arithmetic(format))

    return jax.jit(run)


def fitted(rule: FitRule, x: np.ndarray, bits: float, groups=(12, 1), format=INTEGERS) -> Any:
    """QParams and what the forward pass makes of ``x``."""
    return program(rule, groups, format)(x, jnp.float32(bits))


def groups_of(x: np.ndarray, groups: tuple[int, ...]) -> list[np.ndarray]:
    """The entries of each group, flat, in the order of the raveled scale; the last may be short."""
    home = spread(np.arange(np.prod(groups)).reshape(groups), x.shape)
    if any(-(-n // g) * g != n for n, g in zip(x.shape, groups, strict=True)):
        home = by_size(x.shape, groups)
    return [x[home == i] for i in range(int(np.prod(groups)))]


def by_size(shape: tuple[int, ...], groups: tuple[int, ...]) -> np.ndarray:
    """The group of each entry where groups are equally long but for the last of an axis."""
    places = [np.arange(n) // -(-n // g) for n, g in zip(shape, groups, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), groups)


def losses(x: np.ndarray, y: np.ndarray, groups: tuple[int, ...], power: float = 2.0) -> np.ndarray:
    """``Σ |x - y|^power`` of each group."""
    gap = np.abs(np.float64(x) - np.float64(y)) ** power
    return np.array([entries.sum() for entries in groups_of(gap, groups)])


def loss(rule: FitRule, x: np.ndarray, bits: float, groups=(12, 1), format=INTEGERS, power=2.0):
    """The loss of each group with the scales of a rule."""
    return losses(x, fitted(rule, x, bits, groups, format)[1], groups, power)
