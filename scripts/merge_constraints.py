"""Merge two `pip freeze` listings into constraints.txt; the header it prints says how to use it.

One listing comes from an environment on Python 3.12 or newer, one from 3.11. A package that has the
same version in both gets one line, any other a line for each side with an environment marker.
"""

import re
import sys
from pathlib import Path

BOUNDARY = "3.12"
HEADER = f"""\
# The versions that quantjax is tested with; scripts/setup installs these. Where Python {BOUNDARY}
# and newer takes another version than 3.11 (JAX 0.11 dropped 3.11), two lines have markers.
# Made by scripts/merge_constraints.py. To renew, in the repository root:
#   for v in 3.13 3.11; do
#     "python$v" -m venv ".venv-renew-$v"
#     ".venv-renew-$v/bin/python" -m pip install --upgrade ".[dev]" setuptools wheel
#     ".venv-renew-$v/bin/python" -m pip freeze --all > ".venv-renew-$v/freeze.txt"
#   done
#   python scripts/merge_constraints.py .venv-renew-3.13/freeze.txt .venv-renew-3.11/freeze.txt \\
#     > constraints.new && mv constraints.new constraints.txt && .ci/run
"""
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_LEFT_OUT = {"pip", "quantjax"}


def normalized(name: str) -> str:
    """The one spelling of a package name (PEP 503): `ml_dtypes` and `ml-dtypes` are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(freeze: str) -> dict[str, str]:
    """Name to version, from the text of one listing.

    A line that pins no registry version (`-e …`, `name @ file:…`) is an error, except for quantjax
    itself: such an environment holds something that nobody else could install.
    """
    found: dict[str, str] = {}
    for line in freeze.splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if match := _PIN.fullmatch(text):
            found[normalized(match[1])] = match[2]
        elif "quantjax" not in text:
            raise ValueError(
                f"{text.split('@')[0].strip()!r} is not pinned as name==version, so nobody else "
                "could install it; make the environment anew, from the package index only"
            )
    return {name: version for name, version in found.items() if name not in _LEFT_OUT}


def merge(newer: dict[str, str], older: dict[str, str]) -> list[str]:
    """The lines of the constraints file, sorted by name."""
    lines: list[str] = []
    for name in sorted(newer.keys() | older.keys()):
        new, old = newer.get(name), older.get(name)
        if new == old:
            lines.append(f"{name}=={new}")
            continue
        if old is not None:
            lines.append(f'{name}=={old}; python_version < "{BOUNDARY}"')
        if new is not None:
            lines.append(f'{name}=={new}; python_version >= "{BOUNDARY}"')
    return lines


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: merge_constraints.py FREEZE_NEWEST FREEZE_311", file=sys.stderr)
        return 2
    newer, older = (pins(Path(name).read_text(encoding="utf-8")) for name in arguments)
    print(HEADER + "\n".join(merge(newer, older)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
