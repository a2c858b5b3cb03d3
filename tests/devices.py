"""Starts programs that see eight simulated devices: a process has its devices for life."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
DEVICES = 8


def run_all(cases: Mapping[str, Callable[[], None]]) -> None:
    """Say of each case that it holds, in a program that was started with eight devices."""
    assert jax.device_count() == DEVICES, jax.devices()
    for name, case in cases.items():
        case()
        print(f"{name} holds", flush=True)


def report_of(module: str) -> str:
    """What a module prints that is run with eight devices; warnings are errors there too."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", "-m", module]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    return done.stdout + done.stderr
