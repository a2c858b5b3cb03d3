"""Timing variants against one another, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Variants = Mapping[str, Callable[[], Any]]
"""What is run, by name."""


def interleaved(variants: Variants, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after a first one that compiles."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def compared(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Medians in milliseconds, and ratios to the base with their quartiles over rounds.

    >>> round(compared({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0]}, "a")["b"]["ratio"], 6)
    2.0
    """
    report = {}
    for name, seconds in times.items():
        each = [a / b for a, b in zip(seconds, times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        report[name] = {
            "ms": 1e3 * statistics.median(seconds),
            "ratio": middle,
            "ratio_lower_quartile": low,
            "ratio_upper_quartile": high,
        }
    return report
