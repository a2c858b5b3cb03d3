"""``quantjax sweep``: accuracy against bit-width."""

from __future__ import annotations

import dataclasses
import enum
import time
from pathlib import Path
from typing import Any

from quantjax import errors
from quantjax.calibration.rules import RULES, RuleName
from quantjax.cli.named import find_rule, find_study
from quantjax.cli.progress import RichProgress
from quantjax.printing import counted
from quantjax.sweep.checks import PLOT, RESULTS
from quantjax.sweep.grid import Grid
from quantjax.sweep.plot import plot_accuracy
from quantjax.sweep.run import run_sweep
from quantjax.sweep.runner import Execution
from quantjax.sweep.summary import table


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
    own_rules: tuple[str, ...] = ()
    """Range rules of your own beside them, each as module:object: a RangeRule, or a function of no
    arguments that returns one. Results are filed by their names: change the name with the code."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One model is trained for each."""
    output: Path = Path("outputs")
    """Folder for results; each study has its own below it."""
    memory_budget_mib: int = 1024
    """What one call of the compiled program may use, by XLA's own account."""
    execution: ExecutionChoice = ExecutionChoice.AUTO
    """Run cells one after another or at once; auto times both."""


def sweep(options: SweepOptions) -> int:
    """Run the sweep, then print the table and write CSV and plot."""
    start = time.perf_counter()
    if options.memory_budget_mib < 1:
        raise errors.SweepError(
            f"a memory budget of {options.memory_budget_mib} MiB",
            where="--memory-budget-mib",
            why="a program of one cell needs some memory",
            fix="--memory-budget-mib 1024",
        )
    rules: list[Any] = [RULES[name] for name in options.rules]  # a grid refuses what is no rule
    rules += [find_rule(name) for name in options.own_rules]
    grid = Grid(
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        rules=tuple(rules),
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
    picture = folder / PLOT
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
            f"one program, {chosen.execution.value} of {counted(chosen.cells_per_call, 'cell')}, "
            f"{chosen.bytes_per_call / 2**20:.0f} MiB" + (f" (tried: {tried})" if tried else "")
        )
    print(
        f"{result.computed} of {counted(len(result.rows), 'cell')} computed, "
        f"{counted(result.trained, 'model')} trained, {time.perf_counter() - start:.1f} s"
    )
    print(f"results  {folder / RESULTS}")
    print(f"plot     {picture}")
    return 0
