"""Timing variants against one another, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Variants = Mapping[str, Callable[[], Any]]
"""What is run, by name."""


def interleaved(variants: Variants, rounds: int, turns: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after a first one that compiles.

    In a round the variants run one after another, ``turns`` times over; a variant's time is the
    median of its turns, so that one disturbed run is not the round's.
    """
    for run in variants.values():
        jax.block_until_ready(run())
    rounds_ = [[_turn(variants) for _ in range(turns)] for _ in range(rounds)]
    return {
        name: [statistics.median(turn[name] for turn in round_) for round_ in rounds_]
        for name in variants
    }


def _turn(variants: Variants) -> dict[str, float]:
    seconds = {}
    for name, run in variants.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - start
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one; none lies outside of the values.

    >>> quartiles([1.0, 9.0]), quartiles([2.0])
    ((3.0, 5.0, 7.0), (2.0, 2.0, 2.0))
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compared(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Medians in milliseconds, and ratios to the base with their quartiles over rounds.

    >>> round(compared({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0]}, "a")["b"]["ratio"], 6)
    2.0
    """
    report = {}
    for name, seconds in times.items():
        each = [a / b for a, b in zip(seconds, times[base], strict=True)]
        low, middle, high = quartiles(each)
        report[name] = {
            "ms": 1e3 * statistics.median(seconds),
            "ratio": middle,
            "ratio_lower_quartile": low,
            "ratio_upper_quartile": high,
        }
    return report
