"""Acceptance: a batch that is sharded over eight simulated devices."""

import pytest

from tests.conformance.containers.sharded import CASES
from tests.devices import report_of


@pytest.fixture(scope="module")
def report() -> str:
    """What the program of eight devices prints; it stops at the first case that does not hold."""
    return report_of("tests.conformance.containers.sharded")


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_give_what_one_gives(report, name):
    assert f"{name} holds" in report.splitlines(), report
