"""The command line: ``quantjax sweep``; options are typed, and ``--help`` explains each."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from quantjax import errors
from quantjax.ranges import MIN_MAX, MOVING_AVERAGE, RangeRule
from quantjax.sweep.grid import Grid
from quantjax.sweep.plot import plot_accuracy
from quantjax.sweep.progress import Progress
from quantjax.sweep.run import run_sweep
from quantjax.sweep.runner import Execution
from quantjax.sweep.study import Study
from quantjax.sweep.summary import table

ENTRY_POINTS = "quantjax.studies"


class RuleName(enum.Enum):
    """Range rules by the name that the command line knows them by."""

    MIN_MAX = "min-max"
    MOVING_AVERAGE = "moving-average"


RULES: dict[RuleName, RangeRule] = {
    RuleName.MIN_MAX: MIN_MAX,
    RuleName.MOVING_AVERAGE: MOVING_AVERAGE,
}


class ExecutionChoice(enum.Enum):
    """How cells run; ``auto`` tries both."""

    AUTO = "auto"
    MAP = "map"
    VMAP = "vmap"


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Accuracy against bit-width: every combination of widths and range rules, for each seed.

    A second run computes only what results.csv does not have. A width of 0 is float.
    """

    study: str = "digits"
    """A registered study, or module:object for one of your own (a Study, or a function of no
    arguments that returns one)."""
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Widths of the weights."""
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    """Widths of the activations."""
    rules: tuple[RuleName, ...] = (RuleName.MIN_MAX, RuleName.MOVING_AVERAGE)
    """Range rules of the calibration."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One model is trained for each."""
    output: Path = Path("outputs")
    """Folder for results; each study has its own below it."""
    memory_budget_mib: int = 1024
    """What one call of the compiled program may use, by XLA's own account."""
    execution: ExecutionChoice = ExecutionChoice.AUTO
    """Run cells one after another or at once; auto times both."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``quantjax`` command; returns the exit status."""
    try:
        import rich  # noqa: F401
        import tyro
    except ImportError as missing:
        print(f'{missing.name} is missing: pip install "quantjax[experiments]"', file=sys.stderr)
        return 1
    command = tyro.cli(
        Annotated[SweepOptions, tyro.conf.subcommand("sweep")]
        | Annotated[ListOptions, tyro.conf.subcommand("studies")],
        prog="quantjax",
        description="Quantization experiments in JAX.",
        config=(tyro.conf.EnumChoicesFromValues,),
        args=arguments,
    )
    try:
        return sweep(command) if isinstance(command, SweepOptions) else list_studies()
    except errors.QuantjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was computed is kept, the same command goes on", file=sys.stderr)
        return 130


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """List the registered studies."""


def list_studies() -> int:
    """Print the registered studies, one a line."""
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        print(f"{point.name}  {point.value}")
    return 0


def sweep(options: SweepOptions) -> int:
    """Run the sweep, then print the table and write CSV and plot."""
    start = time.perf_counter()
    grid = Grid(
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        rules=tuple(RULES[name] for name in options.rules),
        seeds=options.seeds,
    )
    study = find_study(options.study)
    folder = options.output / study.name
    choice = options.execution
    result = run_sweep(
        study,
        grid,
        folder,
        memory_budget_bytes=options.memory_budget_mib << 20,
        execution=None if choice is ExecutionChoice.AUTO else Execution(choice.value),
        progress=RichProgress(),
    )
    picture = folder / "accuracy_vs_bits.png"
    seeds = "seed" if len(options.seeds) == 1 else "seeds"
    plot_accuracy(
        result.rows,
        picture,
        title=f"{study.name}: accuracy against bits, mean ± standard deviation of "
        f"{len(options.seeds)} {seeds}",
    )
    print("\naccuracy in percent, mean ± standard deviation over seeds\n")
    print(table(result.rows))
    print()
    if result.program is not None:
        tried = ", ".join(
            f"{trial.execution.value} {1e3 * trial.seconds_per_cell:.1f} ms/cell"
            for trial in result.program.trials
            if len(result.program.trials) > 1
        )
        chosen = result.program.chosen
        print(
            f"one program, {chosen.execution.value} of {chosen.cells_per_call} cells, "
            f"{chosen.bytes_per_call / 2**20:.0f} MiB" + (f" (tried: {tried})" if tried else "")
        )
    print(
        f"{result.computed} of {len(result.rows)} cells computed, {result.trained} models trained, "
        f"{time.perf_counter() - start:.1f} s"
    )
    print(f"results  {folder / 'results.csv'}")
    print(f"plot     {picture}")
    return 0


def find_study(name: str) -> Study:
    """A registered study, or the object that ``module:object`` names.

    Raises:
      SweepError: no such study, or something else than a study.
    """
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if ":" in name:
        module, _, attribute = name.partition(":")
        sys.path.insert(0, str(Path.cwd()))
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise errors.SweepError(
                f"{name} cannot be imported",
                why=str(error),
                fix="module:object, with the module importable from the current folder",
            ) from error
        finally:
            sys.path.remove(str(Path.cwd()))
    elif name in points:
        try:
            found = points[name].load()
        except ImportError as error:
            raise errors.SweepError(
                f"the study {name} cannot be loaded",
                why=str(error),
                fix='pip install "quantjax[experiments]"',
            ) from error
    else:
        raise errors.SweepError(
            f"no study is called {name}",
            where=f"registered: {', '.join(sorted(points)) or 'none'}",
            fix="one of these, or module:object for one of your own",
        )
    study = found() if callable(found) else found
    if not isinstance(study, Study):
        raise errors.SweepError(
            f"{name} is {type(study).__name__}, not a quantjax.sweep.Study",
            fix="name a Study, or a function of no arguments that returns one",
        )
    return study


class RichProgress(Progress):
    """Bars with the time left, on the terminal."""

    def __init__(self) -> None:
        from rich import progress

        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<20}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop redrawing; finished bars stay."""
        self._bars.stop()

    @contextlib.contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """One bar."""
        task = self._bars.add_task(label, total=total)
        yield lambda steps: self._bars.update(task, advance=steps)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, style="dim")


if __name__ == "__main__":
    sys.exit(main())
