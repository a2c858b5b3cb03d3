"""What a parameter is to a batch norm: told by what it does, not by its name or place.

A chain is ``y = M z + C`` for each channel. At made-up parameters, in float64, a parameter is

- an **offset** β where ``C`` grows as it does, a **bias** b where ``C`` grows by ``M b``, and a
  **mean** μ where it falls by ``M μ``, with ``M`` unmoved;
- a **scale** γ where ``M`` is proportional to it;
- a **variance** σ² where ``1 / M²`` is proportional to ``σ² + ε``, which also says what ε is.

Setting it to 1, 2, 3, ... then tells which of its entries each channel has. All of it together is
held against ``M = γ / sqrt(σ² + ε)`` and ``C = β + (b - μ) M``, at parameters of both signs and of
sizes over decades too, and at those that folding leaves: ``|γ|`` is γ where all are positive.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from quantjax.folding.chains import Affine, Chain, affine
from quantjax.interpreter.provenance import Loop
from quantjax.interpreter.sites import Location

Leaves = Mapping[str, np.ndarray]


class Part(enum.Enum):
    """What a parameter is to a batch norm."""

    OFFSET = "offset"
    BIAS = "bias"
    MEAN = "mean"
    SCALE = "scale"
    VARIANCE = "variance"


class Played(NamedTuple):
    """The part of one parameter.

    Attributes:
      part: which.
      entries: the entry of the flattened parameter that each channel has, behind an axis a loop.
      epsilon: of a variance.
    """

    part: Part
    entries: np.ndarray
    epsilon: float = 0.0


class OtherFormError(Exception):
    """A chain that is no batch norm's; its text says in what."""


class Trial(NamedTuple):
    """Made-up parameters, and where in the loops around a chain.

    Attributes:
      chain, length: the first steps of a chain.
      leaves: a value for each parameter.
      at: the step of each scan.
    """

    chain: Chain
    length: int
    leaves: Leaves
    at: Mapping[Location, int]

    def moved(self, **leaves: np.ndarray) -> Affine:
        """The chain with some parameters set otherwise."""
        return affine(self.chain, self.length, {**self.leaves, **leaves}, self.at)


def made_up(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Values between 1/2 and 3/2."""
    draw = np.random.default_rng(seed)
    return {path: draw.uniform(0.5, 1.5, shape) for path, shape in shapes.items()}


def part_of(trial: Trial, path: str) -> tuple[Part, float] | None:
    """The part that one parameter plays, and ε; None where it has no effect.

    Raises:
      OtherFormError: it plays none.
    """
    value = trial.leaves[path]
    other = made_up({path: value.shape}, 7)[path]
    before, after = trial.moved(), trial.moved(**{path: other})
    if _close(before.multiplier, after.multiplier) and _close(before.shift, after.shift):
        return None
    moves = not _close(before.multiplier, after.multiplier)
    parts = (Part.SCALE, Part.VARIANCE) if moves else (Part.OFFSET, Part.BIAS, Part.MEAN)
    for part in parts:
        epsilon = _epsilon(trial, path) if part is Part.VARIANCE else 0.0
        if math.isnan(epsilon):
            continue
        found = _entries(trial, path, part, epsilon)
        if found is None:
            continue
        told = _told(trial, path, other, part, epsilon)
        if _close(told, other.ravel()[found]):
            return part, epsilon
    raise OtherFormError(f"{path} is neither its mean, variance, scale, offset nor a bias")


def entries_of(
    trial: Trial, path: str, part: Part, epsilon: float, loops: tuple[Loop, ...]
) -> np.ndarray:
    """The entry of a parameter that each channel has, behind an axis for each loop."""
    lengths = [loop.length or 1 for loop in loops]
    each = []
    for indices in itertools.product(*map(range, lengths)):
        at = {loop.location: index for loop, index in zip(loops, indices, strict=True)}
        found = _entries(trial._replace(at={**trial.at, **at}), path, part, epsilon)
        if found is None:
            raise OtherFormError(f"{path} plays another part in another step of a scan")
        each.append(found)
    return np.stack(each).reshape((*lengths, -1))


def _entries(trial: Trial, path: str, part: Part, epsilon: float) -> np.ndarray | None:
    """Which entries the channels have, if the parameter plays this part."""
    value = trial.leaves[path]
    counting = 1.0 + np.arange(value.size, dtype=np.float64).reshape(value.shape)
    told = _told(trial, path, counting, part, epsilon)
    whole = np.round(told)
    fits = np.isfinite(told).all() and np.allclose(told, whole, rtol=1e-9, atol=1e-6)
    if not fits or (whole < 1).any() or (whole > value.size).any():
        return None
    return whole.astype(np.int64) - 1


def _told(trial: Trial, path: str, value: np.ndarray, part: Part, epsilon: float) -> np.ndarray:
    """The entry of ``value`` that each channel has, as the chain shows it if this is its part."""
    at = trial.moved(**{path: value})
    with np.errstate(all="ignore"):
        if part is Part.VARIANCE:
            one = trial.moved(**{path: np.ones_like(value)})
            return (one.multiplier / at.multiplier) ** 2 * (1.0 + epsilon) - epsilon
        if part is Part.SCALE:
            return at.multiplier / trial.moved(**{path: np.ones_like(value)}).multiplier
        moved = at.shift - trial.moved(**{path: np.zeros_like(value)}).shift
        if part is Part.OFFSET:
            return moved
        return moved / at.multiplier if part is Part.BIAS else -moved / at.multiplier


def _epsilon(trial: Trial, path: str) -> float:
    """ε of ``1 / M² ∝ σ² + ε``; NaN where it is nothing of the kind."""
    shape = trial.leaves[path].shape
    with np.errstate(all="ignore"):
        none, one = (
            1.0 / trial.moved(**{path: np.full(shape, value)}).multiplier ** 2
            for value in (0.0, 1.0)
        )
        epsilon = none / (one - none)
    first = float(epsilon.flat[0]) if epsilon.size else math.nan
    same = np.allclose(epsilon, first, rtol=1e-6, atol=1e-12)
    if not same or first <= -1e-12:
        return math.nan
    # As the program has it: in float32, or in float64 with the digits that a person wrote.
    narrow = float(np.float32(first))
    return narrow if math.isclose(first, narrow, rel_tol=1e-10) else float(f"{first:.10g}")


def check_form(trial: Trial, parts: Mapping[str, Played]) -> None:
    """Raise unless the chain is a batch norm of just these parameters."""
    values = {
        played.part: trial.leaves[path].ravel()[played.entries] for path, played in parts.items()
    }
    if len(values) < len(parts):
        parted = [played.part for played in parts.values()]
        twice = next(part for part in parted if parted.count(part) > 1)
        raise OtherFormError(f"two parameters are its {twice.value}")
    if Part.VARIANCE not in values:
        raise OtherFormError("no parameter is its variance")
    epsilon = next(p.epsilon for p in parts.values() if p.part is Part.VARIANCE)
    found = trial.moved()
    multiplier = values.get(Part.SCALE, 1.0) / np.sqrt(values[Part.VARIANCE] + epsilon)
    shift = (values.get(Part.BIAS, 0.0) - values.get(Part.MEAN, 0.0)) * multiplier
    shift = shift + values.get(Part.OFFSET, 0.0)
    if not _close(found.multiplier, multiplier, 1e-6) or not _close(found.shift, shift, 1e-6):
        raise OtherFormError("it is not γ (z + b - μ) / sqrt(σ² + ε) + β")


def at_any_size(trial: Trial, parts: Mapping[str, Played], seed: int) -> Trial:
    """With parameters of both signs over five decades; variances are positive."""
    draw, leaves = np.random.default_rng(seed), dict(trial.leaves)
    for path, played in parts.items():
        shape = leaves[path].shape
        sizes = 10.0 ** draw.uniform(-3.0, 2.0, shape)
        if played.part is not Part.VARIANCE:
            sizes *= draw.choice([-1.0, 1.0], shape)
        leaves[path] = sizes
    return trial._replace(leaves=leaves)


def as_folded(trial: Trial, parts: Mapping[str, Played]) -> Trial:
    """With the parameters that folding leaves behind."""
    left = {Part.SCALE: 1.0, Part.MEAN: 0.0}
    leaves = dict(trial.leaves)
    for path, played in parts.items():
        value = 1.0 - played.epsilon if played.part is Part.VARIANCE else left.get(played.part)
        if value is not None:
            leaves[path] = np.full(leaves[path].shape, value)
    return trial._replace(leaves=leaves)


def _close(left: np.ndarray, right: np.ndarray, tolerance: float = 1e-9) -> bool:
    return bool(np.allclose(left, right, rtol=tolerance, atol=tolerance))
