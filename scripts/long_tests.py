"""Write tests/long_tests.txt, what `scripts/test` leaves out, from the times of a whole run.

    rm -r .cache/jax
    scripts/test tests quantjax --durations=0 --durations-min=0.5 > run.log
    scripts/in_env python scripts/long_tests.py run.log

A test is long whose slowest parameter set takes so many seconds, with nothing compiled yet. So is a
whole file with a fixture that takes twice as long: left out of one test, it would run for the next.
"""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "long_tests.txt"
KEPT = (
    "tests/statistics/test_devices.py",
    "tests/test_readme.py",
    "tests/transforms/test_execute.py",
)
"""What is run all the same, however long it takes."""
HEADER = """\
# Left out of `scripts/test` without arguments, not of CI: tests, and files with fixtures that take
# long. Made by scripts/long_tests.py.
"""
_LINE = re.compile(r"\s*(?P<seconds>[\d.]+)s (?P<phase>call|setup)\s+(?P<test>tests/\S+?::\w+)")


def long_ones(lines: Iterable[str], *, seconds: float) -> list[str]:
    """Tests and files that take so long, in the order of their names."""
    calls: dict[str, float] = collections.defaultdict(float)
    fixtures: dict[str, float] = collections.defaultdict(float)
    for found in map(_LINE.match, lines):
        if found and found["phase"] == "call":
            calls[found["test"]] = max(calls[found["test"]], float(found["seconds"]))
        elif found:
            name = found["test"].partition("::")[0]
            fixtures[name] = max(fixtures[name], float(found["seconds"]))
    files = {name for name, time in fixtures.items() if time >= 2.0 * seconds}
    tests = {
        name
        for name, time in calls.items()
        if time >= seconds and name.partition("::")[0] not in files
    }
    return sorted(name for name in files | tests if not name.startswith(KEPT))


def main(arguments: list[str] | None = None) -> None:
    """Read the logs, write the list, and say how many there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, help="what pytest printed")
    parser.add_argument("--seconds", type=float, default=4.0, help="what is long")
    parser.add_argument("--output", type=Path, default=LIST)
    options = parser.parse_args(arguments)
    lines = [line for log in options.logs for line in log.read_text("utf-8").splitlines()]
    names = long_ones(lines, seconds=options.seconds)
    options.output.write_text(HEADER + "".join(f"{name}\n" for name in names), "utf-8")
    print(f"{options.output.name}: {len(names)} tests and files of {options.seconds:g} s and more")


if __name__ == "__main__":
    main()
