"""On a mesh with explicit axes, verbs, losses and optimizers do what they do on one device."""

import functools

import pytest

from tests.devices import report_of
from tests.training import on_a_mesh as training
from tests.transforms import on_a_mesh as verbs

CASES = {name: program.__name__ for program in (verbs, training) for name in program.CASES}

report = functools.cache(report_of)
"""What a program of eight devices prints; it stops at the first case that does not hold."""


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_has_the_results_of_one_device(name):
    said = report(CASES[name])
    assert f"{name} holds" in said.splitlines(), said
