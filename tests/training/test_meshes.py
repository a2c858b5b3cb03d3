"""On a mesh with explicit axes, losses and optimizers of weights do what they do on one device."""

import pytest

from tests.devices import report_of
from tests.training.on_a_mesh import CASES


@pytest.fixture(scope="module")
def report():
    """What the program of eight devices prints; it stops at the first case that does not hold."""
    return report_of("tests.training.on_a_mesh")


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_has_the_results_of_one_device(report, name):
    assert f"{name} holds" in report.splitlines(), report
