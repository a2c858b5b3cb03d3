"""Fitted scales of integer codes, one group at a time, in float64 and from the papers' equations.

A group is a flat array that is not all zero; families are those of the oracle of integers.
"""

from typing import NamedTuple

import numpy as np

from tests.oracles.integers import Integers, bounds


class Affine(NamedTuple):
    """A scale and an integer zero point."""

    scale: float
    zero_point: float = 0.0


def centered(values: np.ndarray, at: Affine, family: Integers) -> np.ndarray:
    """``clip(rint(v / s) + z, low, high) - z``; one signed bit is a sign."""
    ratio, zero = np.float64(values) / at.scale, at.zero_point
    if family.bits == 1 and family.signed:
        return np.where(ratio + zero >= 0, 1.0, -1.0) - zero
    return np.clip(np.rint(ratio) + zero, *bounds(family)) - zero


def error(values: np.ndarray, at: Affine, family: Integers, power: float = 2.0) -> float:
    """``Σ |v - s (q - z)|^power``."""
    values = np.float64(values)
    return float((np.abs(values - at.scale * centered(values, at, family)) ** power).sum())


def whole_range(values: np.ndarray, family: Integers, *, symmetric: bool) -> Affine:
    """Min-max, as the oracle of affine maps has it, for one group."""
    values, (low, high) = np.float64(values), bounds(family)
    if symmetric:
        half = 2.0 ** (family.bits - 1)
        steps = (max(half - 1, 1) if family.narrow else half) if family.signed else float(high)
        return Affine(np.abs(values).max() / steps)
    least, most = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = (most - least) / (high - low)
    return Affine(scale, np.clip(low - np.rint(least / scale), low, high))


def closed_form(target: np.ndarray, codes: np.ndarray, otherwise: float) -> float:
    """The scale for given codes; another one where that is not positive."""
    product, square = float(target @ codes), float(codes @ codes)
    return product / square if square > 0 and product > 0 else otherwise


def least_squares(values: np.ndarray, family: Integers, start: float, rounds: int = 1000) -> float:
    """Codes and scale in turn until the codes are the ones before."""
    values, scale, before = np.float64(values), start, None
    for _ in range(rounds):
        codes = centered(values, Affine(scale), family)
        if before is not None and (codes == before).all():
            break
        scale, before = closed_form(values, codes, scale), codes
    return scale


def admm(values: np.ndarray, family: Integers, rho: float, rounds: int, inner: int) -> float:
    """From the fixed point of least squares, and from the best scale on the way to another one."""
    values = np.float64(values)
    first = least_squares(values, family, whole_range(values, family, symmetric=True).scale)
    scale, dual = first, np.zeros_like(values)
    feasible, tried = scale * centered(values, Affine(scale), family), [first]
    for _ in range(rounds):
        free = (values + rho * (feasible - dual)) / (1 + rho)
        for _ in range(inner):
            codes = centered(free + dual, Affine(scale), family)
            scale = closed_form(free + dual, codes, scale)
        feasible = scale * centered(free + dual, Affine(scale), family)
        dual = dual + free - feasible
        tried.append(scale)
    best = min(tried, key=lambda s: error(values, Affine(s), family))
    return least_squares(values, family, best)


def shrunk(errors: np.ndarray, beta: float, p: float) -> np.ndarray:
    """The generalized soft threshold; zeros stay."""
    size = np.abs(errors)
    with np.errstate(divide="ignore"):
        return np.sign(errors) * np.maximum(size - size ** (p - 1) / beta, 0.0)


def half_quadratic(
    values: np.ndarray,
    family: Integers,
    *,
    symmetric: bool,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    rounds: int = 20,
) -> list[Affine]:
    """The start and all iterates; errors in units of ``(max - min) / 2^bits``."""
    values, (low, high) = np.float64(values), bounds(family)
    at = whole_range(values, family, symmetric=symmetric)
    if symmetric:
        step = 2 * np.abs(values).max() / 2**family.bits
    else:
        step = (max(values.max(), 0.0) - min(values.min(), 0.0)) / 2**family.bits
    iterates = [at]
    for round_ in range(rounds):
        codes = centered(values, at, family)
        kept = step * shrunk((values - at.scale * codes) / step, beta * kappa**round_, p)
        target, zero = values - kept, at.zero_point
        if not symmetric:
            zero = np.clip(np.rint(zero + (codes - target / at.scale).mean()), low, high)
            codes = codes + at.zero_point - zero
        at = Affine(closed_form(target, codes, at.scale), zero)
        iterates.append(at)
    return iterates


def first_that_is_no_better(iterates: list[Affine], values: np.ndarray, family: Integers, p: float):
    """What an early stop keeps: the last iterate before the loss does not fall."""
    losses = [error(values, at, family, p) for at in iterates]
    for i in range(1, len(losses)):
        if losses[i] >= losses[i - 1]:
            return iterates[i - 1]
    return iterates[-1]
