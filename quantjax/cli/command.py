"""The command's entry point: which command, and how it ends."""

from __future__ import annotations

import sys
from typing import Annotated

from quantjax import errors


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``quantjax`` command; returns the exit status."""
    try:
        import rich  # noqa: F401
        import tyro
    except ImportError as missing:
        print(f'{missing.name} is missing: pip install "quantjax[experiments]"', file=sys.stderr)
        return 1
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
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {kept}", file=sys.stderr)
        return 130
