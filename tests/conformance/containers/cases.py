"""Every container in every framework: builders by name, ``raw/layers``, ``linen/time``."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.conformance.containers import (
    equinox_cases,
    haiku_cases,
    linen_cases,
    nnx_cases,
    raw_cases,
)
from tests.conformance.containers.case import Case
from tests.models import shuffled

FRAMEWORKS = {
    "raw": raw_cases.CASES,
    "linen": linen_cases.CASES,
    "nnx": nnx_cases.CASES,
    "haiku": haiku_cases.CASES,
    "equinox": equinox_cases.CASES,
}
CASES: dict[str, Callable[[], Case]] = {
    f"{framework}/{name}": make
    for framework, cases in FRAMEWORKS.items()
    for name, make in cases.items()
}


@functools.cache
def build(name: str) -> Case:
    """One case, made only once, with parameters that are not at their initial 0 or 1."""
    case = CASES[name]()
    return case._replace(params=shuffled(case.params))
