"""Say whether the environment that runs this file still fits pyproject.toml and constraints.txt.

Called by scripts/setup, with the environment's own interpreter; needs only the standard library:

    environment.py check STAMP [EXTRA…]    exit 0 when STAMP shows that all of it is installed
    environment.py extras STAMP [EXTRA…]   print what to install: these extras and those of STAMP
    environment.py write STAMP [EXTRA…]    write STAMP

A stamp's first line is a fingerprint of pyproject.toml, constraints.txt, this interpreter and this
folder; the second names the extras, those that they pull in included.
"""

import hashlib
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    # The folder counts, because the installed commands and the editable install hold its path.
    for part in (sys.version, sys.prefix, str(root)):
        digest.update(part.encode() + b"\0")
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def implied(root: Path) -> dict[str, set[str]]:
    """Each extra of pyproject.toml, with the extras that it names as `quantjax[…]`."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = re.compile(rf"{re.escape(project['name'])}\[([^\]]*)\]")
    return {
        extra: {
            name.strip()
            for requirement in requirements
            if (match := own.match(requirement))
            for name in match[1].split(",")
        }
        for extra, requirements in project.get("optional-dependencies", {}).items()
    }


def closure(extras: set[str], implies: dict[str, set[str]]) -> set[str]:
    """The extras and all that they pull in."""
    reached: set[str] = set()
    while extras - reached:
        reached |= extras
        extras = set().union(*(implies.get(extra, set()) for extra in reached))
    return reached


def read_stamp(path: Path) -> tuple[str, set[str]]:
    """The stamp's fingerprint and extras; empty ones where there is no stamp."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return (lines[0], set(lines[1].split())) if len(lines) == 2 else ("", set())


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__)
        return 0 if arguments == ["--help"] else 2
    verb, stamp, wanted = arguments[0], Path(arguments[1]), set(arguments[2:])
    implies = implied(ROOT)
    wanted = closure(wanted, implies)
    found, installed = read_stamp(stamp)
    if verb == "check":
        return 0 if found == fingerprint(ROOT) and wanted <= installed else 1
    if verb == "extras":
        if unknown := ", ".join(sorted(wanted - implies.keys())):
            sys.exit(f"quantjax: no extra named {unknown}; there are {', '.join(sorted(implies))}")
        print(",".join(sorted(wanted | (installed & implies.keys()))))
        return 0
    if verb == "write":
        extras = " ".join(sorted(wanted))
        stamp.write_text(f"{fingerprint(ROOT)}\n{extras}\n", encoding="utf-8")
        return 0
    sys.exit(f"environment.py: no verb {verb!r}; see its docstring")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
