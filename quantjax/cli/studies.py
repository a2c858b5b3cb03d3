"""``quantjax studies``: what is registered."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points

from quantjax.cli.named import STUDIES


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """List the registered studies."""


def list_studies() -> int:
    """Print the registered studies, one a line."""
    for point in sorted(entry_points(group=STUDIES.name), key=lambda point: point.name):
        print(f"{point.name}  {point.value}")
    return 0
