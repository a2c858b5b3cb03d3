"""The command's entry point: which command, and how it ends."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Annotated

from quantjax import errors
from quantjax.cli.streams import is_closed, let_go, write_what_fits

MISTAKE, FAILED, STOPPED = 2, 1, 130
CLOSED = 141  # what a shell says of a tool that SIGPIPE ended
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PICTURES = "matplotlib.backends.backend_agg"


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``quantjax`` command; returns the exit status."""
    write_what_fits(sys.stdout)
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # which rich turns into an exit
            raise
        return CLOSED
    except BrokenPipeError:
        if not is_closed(sys.stdout):
            raise  # it was another pipe
        let_go(sys.stdout)
        return CLOSED
    except OSError as error:
        if error.errno not in _FULL:
            raise
        let_go(sys.stdout)
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return FAILED


def _run(arguments: list[str] | None) -> int:
    if _lacks("rich") or _lacks("tyro"):
        return FAILED
    import tyro

    # Not before it is known that there is tyro: options are described in its terms.
    from quantjax.cli.calibrate import CalibrateOptions, calibrate
    from quantjax.cli.studies import ListOptions, list_studies
    from quantjax.cli.sweep import SweepOptions, sweep

    command = tyro.cli(
        Annotated[SweepOptions, tyro.conf.subcommand("sweep")]
        | Annotated[CalibrateOptions, tyro.conf.subcommand("calibrate")]
        | Annotated[ListOptions, tyro.conf.subcommand("studies")],
        prog="quantjax",
        description="Quantization experiments in JAX.",
        config=(tyro.conf.EnumChoicesFromValues, tyro.conf.PositionalRequiredArgs),
        args=arguments,
    )
    if not isinstance(command, ListOptions) and _lacks(_PICTURES):
        return FAILED  # they are drawn last, behind all the work
    kept = "what was computed is kept, the same command goes on"
    try:
        match command:
            case SweepOptions():
                return sweep(command)
            case CalibrateOptions():
                kept = "the same command starts anew"
                return calibrate(command)
            case ListOptions():
                return list_studies()
    except errors.QuantjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"stopped; {kept}", file=sys.stderr)
        return STOPPED


def _lacks(module: str) -> bool:
    """Whether the module cannot be imported; if so, says what to install."""
    try:
        importlib.import_module(module)
    except ImportError as missing:
        package = missing.name or module.partition(".")[0]
        print(f'{package} is missing: pip install "quantjax[experiments]"', file=sys.stderr)
        return True
    return False
