"""Rounds, turns and their medians, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from experiments import timing


class _Clock:
    """Time that passes only while a variant runs, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def variant(self, name: str, seconds: list[float]) -> Callable[[], float]:
        each = iter(seconds)

        def run() -> float:
            self.ran.append(name)
            self.now += next(each)
            return self.now

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(timing.time, "perf_counter", made.perf_counter)
    return made


def test_variants_take_turns_and_the_first_run_of_each_is_not_counted(clock: _Clock) -> None:
    variants = {
        "a": clock.variant("a", [100.0, 1.0, 2.0]),
        "b": clock.variant("b", [100.0, 3.0, 4.0]),
    }
    assert timing.interleaved(variants, 2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert clock.ran == ["a", "b"] * 3


def test_a_round_is_the_median_of_its_turns(clock: _Clock) -> None:
    variants = {
        "a": clock.variant("a", [0.0, 1.0, 50.0, 2.0, 4.0, 3.0, 5.0]),
        "b": clock.variant("b", [0.0, 7.0, 6.0, 8.0, 9.0, 9.0, 1.0]),
    }
    assert timing.interleaved(variants, 2, turns=3) == {"a": [2.0, 4.0], "b": [7.0, 9.0]}
    assert clock.ran == ["a", "b"] * 7


def test_ratios_are_taken_round_by_round() -> None:
    report = timing.compared({"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 8.0]}, "a")
    assert report["b"]["ratio"] == 2.0
    assert report["b"]["ms"] == 6000.0
    assert report["b"]["ratio_lower_quartile"] <= 2.0 <= report["b"]["ratio_upper_quartile"]


@pytest.mark.parametrize("rounds", [[5.0], [1.0, 9.0], [3.0, 1.0, 2.0]])
def test_no_quartile_lies_outside_of_what_was_measured(rounds: list[float]) -> None:
    report = timing.compared({"a": [1.0] * len(rounds), "b": rounds}, "a")["b"]
    low, middle, high = (
        report[f"ratio{part}"] for part in ("_lower_quartile", "", "_upper_quartile")
    )
    assert min(rounds) <= low <= middle <= high <= max(rounds)
    assert (low < high) == (len(rounds) > 1)
