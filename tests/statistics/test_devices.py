"""Statistics of a batch on eight simulated devices are those on one."""

import pytest

from tests.devices import report_of
from tests.statistics.sharded import CASES


@pytest.fixture(scope="module")
def report():
    """What the program of eight devices prints; it stops at the first case that does not hold."""
    return report_of("tests.statistics.sharded")


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_have_the_statistics_of_one(report, name):
    assert f"{name} holds" in report.splitlines(), report
