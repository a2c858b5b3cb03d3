"""Acceptance: a batch that is sharded over eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.containers.sharded import CASES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def report() -> str:
    """What the program of eight devices prints; it stops at the first case that does not hold."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", "tests.conformance.containers.sharded"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_give_what_one_gives(report, name):
    assert f"{name} holds" in report.splitlines(), report
