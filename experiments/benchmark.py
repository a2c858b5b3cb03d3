"""What every benchmark script asks for, says of itself and writes."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def options(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with ``--output`` and, where there are rounds, ``--rounds``.

    >>> options("How fast it is.", rounds=3).parse_args(["--output", "a.json"])
    Namespace(output=PosixPath('a.json'), rounds=3)
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    if rounds is not None:
        parser.add_argument("--rounds", type=_count, default=rounds)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} rounds measure nothing")
    return number


def made_by() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "jax": version("jax"),
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def written(report: Mapping[str, Any], output: Path | None) -> None:
    """The report as JSON, where that is asked for."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
