"""``quantjax calibrate``: every rule's range, site by site, with histograms."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Annotated, Any

import tyro

from quantjax import errors
from quantjax.arguments import why_unwritable
from quantjax.calibration.collect import ROWS, batched, collect, is_array
from quantjax.calibration.files import write_pictures, write_ranges
from quantjax.calibration.report import calibration_report, check_rules
from quantjax.calibration.rules import FITS, RULES, FitName, RuleName
from quantjax.cli.named import ARRAYS, find_data, find_model, find_rule
from quantjax.cli.progress import RichProgress
from quantjax.planning import Plan
from quantjax.policy import uniform_policy
from quantjax.printing import counted
from quantjax.ranges import FitRule, RangeRule
from quantjax.site_plan import PlanStatus

RANGES, HISTOGRAMS = "ranges.csv", "histograms"


@dataclasses.dataclass(frozen=True)
class CalibrateOptions:
    """The range by every rule, site by site: the share of values that it saturates, and the SQNR.

    Runs the model in float on the batches, once. Writes ranges.csv, and a picture of each operand's
    histogram with the candidate clips.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A registered model (digits), or module:object for one of your own: a
    quantjax.calibration.Model, a tuple (apply, params), or a function that returns one of these."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """Registered data (digits), a .npy or .npz file, or module:object: an iterable of batches, an
    array, or a function that returns one. A batch is what the model is called with: an array, a
    dictionary of them, or a tuple of several arguments; without labels."""
    weight_bits: int = 8
    """Width of the weights; 0 leaves them out."""
    activation_bits: int = 8
    """Width of the activations; 0 leaves them out."""
    rules: tuple[RuleName, ...] = tuple(RuleName)
    """Range rules."""
    fits: tuple[FitName, ...] = ()
    """Fits to the values themselves, for weights; they take seconds for each site."""
    own_rules: tuple[str, ...] = ()
    """Rules and fits of your own beside them, each as module:object: a RangeRule, a FitRule, or a
    function of no arguments that returns one."""
    batches: int = 32
    """Observe so many, at most."""
    batch_size: int | None = None
    """Split batches that have more rows. Left out, they stay as they are, and a single array is cut
    by 64."""
    output: Path = Path("outputs/calibrate")
    """Folder for ranges.csv and histograms."""
    data_dir: Path | None = None
    """Folder with data sets, for data that is a function of data_dir."""


def calibrate(options: CalibrateOptions) -> int:
    """Observe, report, print the table and write CSV and pictures."""
    start = time.perf_counter()
    policy = uniform_policy(
        weight_bits=options.weight_bits or None, activation_bits=options.activation_bits or None
    )
    if not policy.rules:
        raise errors.BitsError(
            "weights and activations are both left out",
            where="weight_bits 0, activation_bits 0",
            fix="a width for one of them",
        )
    rules: list[RangeRule | FitRule] = [RULES[name] for name in options.rules]
    rules += [FITS[name] for name in options.fits]
    rules += [find_rule(name) for name in options.own_rules]
    _check(options, rules)
    progress = RichProgress()
    with progress:
        progress.note(f"loading {options.model} and {options.data}")
        model, data = find_model(options.model), find_data(options.data, options.data_dir)
        rows = options.batch_size
        if rows is None and Path(options.data).suffix in ARRAYS:
            rows = ROWS
        batches = batched(data, rows=rows, most=options.batches)
        with progress.task("observing", _expected(data, rows, options.batches)) as advance:
            collected = collect(model, batches, policy, on_batch=advance)
        with progress.task("deriving ranges", len(rules)) as advance:
            report = calibration_report(
                collected.plan, collected.state, model.params, rules=rules, on_rule=advance
            )
        table, folder = options.output / RANGES, options.output / HISTOGRAMS
        write_ranges(report, table)
        with progress.task("drawing", len(report)) as advance:
            pictures = write_pictures(report, folder, on_picture=advance)
    print(f"\n{report}\n")
    for line in _float_sites(collected.plan):
        print(line)
    print(
        f"{counted(len(report), 'operand')}, {counted(len(rules), 'rule')}, "
        f"{counted(collected.batches, 'batch', plural='batches')}, "
        f"{time.perf_counter() - start:.1f} s"
    )
    print(f"ranges      {table}")
    older = len(set(folder.glob("*.png")) - set(pictures))
    note = f"; {older} more are of earlier runs" if older else ""
    print(f"histograms  {folder} ({counted(len(pictures), 'picture')}{note})")
    return 0


def _check(options: CalibrateOptions, rules: Sequence[RangeRule | FitRule]) -> None:
    """Raise for what would fail after all the work: rules, and a folder that cannot be written."""
    check_rules(rules)
    if not options.weight_bits and all(isinstance(rule, FitRule) for rule in rules):
        raise errors.PolicyError(
            "fits serve weights, which are left out",
            where="--weight-bits 0, no range rules",
            fix="--rules mse, or a width for the weights",
        )
    why = why_unwritable(options.output, files=[RANGES], folders=[HISTOGRAMS])
    if why:
        raise errors.DataError(
            f"nothing can be written to {options.output}",
            where="--output",
            why=why,
            fix="--output outputs/calibrate",
        )


def _expected(data: Any, rows: int | None, most: int) -> int:
    """How many batches there will be, for the bar; at most, where that is not known."""
    if is_array(data) and data.ndim:
        return min(math.ceil(len(data) / (rows or ROWS)), most)
    return min(len(data), most) if isinstance(data, Sized) and rows is None else most


def _float_sites(plan: Plan) -> list[str]:
    """The products that stay in float, and why."""
    others = [entry for entry in plan.sites if entry.status is not PlanStatus.QUANTIZED]
    return [f"not quantized: {entry.site.name} ({entry.reason})" for entry in others]
