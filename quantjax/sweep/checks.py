"""What a study and a grid have to be, said as early as it is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from quantjax import errors
from quantjax.arguments import why_unwritable
from quantjax.formats import example_theta
from quantjax.policy import Rule
from quantjax.quantizer import Quantizer, RangeMode
from quantjax.ranges import MIN_MAX, RangeRule
from quantjax.storage.known import BUILT_IN, is_ours
from quantjax.storage.rules import CONFIGURED, FAMILIES
from quantjax.sweep.grid import FLOAT_CELL, Grid
from quantjax.sweep.study import Study

RESULTS, PLOT, CHECKPOINTS = "results.csv", "accuracy_vs_bits.png", "checkpoints"
"""What a sweep leaves in its folder."""


def check_study(study: Study, grid: Grid) -> None:
    """Raise for widths that a format does not have, for random roundings, and for rules whose names
    are those of others: results are filed by name.

    Raises:
      SweepError, BitsError: as said.
    """
    for rule in grid.rules:
        _check_name(rule, study)
    _check_taken(study, grid)
    for scheme_rule in study.policy.rules:
        for what, quantizer in _quantizers(scheme_rule):
            if quantizer.rounding.is_random or quantizer.estimator.is_random:
                raise errors.SweepError(
                    f"{what}s are rounded at random, and a sweep has no key to draw from",
                    where=f"study {study.name}, rule '{scheme_rule}'",
                    fix="rounding=qj.rounding.HALF_EVEN",
                )
        _check_widths(study, grid, scheme_rule)


def check_output(folder: Path) -> None:
    """Raise ``SweepError`` for a folder that results, checkpoints or the plot cannot be put in."""
    why = why_unwritable(folder, files=[RESULTS, PLOT], folders=[CHECKPOINTS])
    if why:
        raise errors.SweepError(
            f"nothing can be written to {folder}",
            where="the sweep's output",
            why=why,
            fix="another folder, such as outputs/sweep",
        )


def check_trained(study: Study, params: Any) -> None:
    """Raise ``SweepError`` for a tree without parameters, or with text; no checkpoint holds it."""
    leaves = jax.tree.leaves(params)
    numbers = int | float | complex
    other = [x for x in leaves if not (hasattr(x, "dtype") or isinstance(x, numbers))]
    if other:
        raise errors.SweepError(
            f"training returned {other[0]!r:.80} among the parameters",
            where=f"study {study.name}, train",
            why="checkpoints hold arrays and numbers",
            fix="return the parameters alone from train",
        )
    if not leaves:
        raise errors.SweepError(
            "training returned no parameters",
            where=f"study {study.name}, train",
            why="weights that apply closes over are constants, the same for every seed",
            fix="return the parameters from train, and take them as the first argument of apply",
        )


def takes_rules(quantizer: Quantizer | None) -> bool:
    """Whether the rules of a grid stand in for the operand's own: the default, of fixed ranges."""
    if quantizer is None or quantizer.range is RangeMode.LIVE:
        return False
    return quantizer.rule == MIN_MAX


def _check_taken(study: Study, grid: Grid) -> None:
    every = [pair for rule in study.policy.rules for pair in _quantizers(rule)]
    quantizers = [quantizer for what, quantizer in every if what != "bias"]
    if len(grid.rules) == 1 or not quantizers or any(map(takes_rules, quantizers)):
        return
    raise errors.SweepError(
        f"{len(grid.rules)} rules, and no operand that takes one",
        where=f"study {study.name}, rules",
        why="each quantizer of the policy names a rule of its own, or has live ranges",
        fix="one rule for the grid, or quantizers that name none",
    )


def _check_name(rule: RangeRule, study: Study) -> None:
    library = BUILT_IN.named.get(("range_rule", rule.name))
    family, bracket, _ = rule.name.partition("(")
    if rule.name == FLOAT_CELL.rule:
        what = "is the name of the float baseline"
    elif library is not None and library != rule:
        what = "is not the library's, but has its name"
    elif bracket and (family in FAMILIES or family in CONFIGURED) and not is_ours(rule):
        what = "is not of the library's family, but has its name"
    else:
        return
    raise errors.SweepError(
        f"the rule {rule.name} {what}",
        where=f"study {study.name}, rules",
        why="results are filed by the names of rules, and would be taken for the other's",
        fix="rename your own",
    )


def _quantizers(rule: Rule) -> Iterator[tuple[str, Quantizer]]:
    scheme = rule.scheme
    every = {
        "weight": scheme.weights,
        "activation": scheme.activations,
        "output": scheme.outputs,
        "bias": scheme.biases,
    }
    for what, quantizer in every.items():
        if isinstance(quantizer, Quantizer):
            yield what, quantizer


def _check_widths(study: Study, grid: Grid, rule: Rule) -> None:
    own = dict(_quantizers(rule))
    for what, widths in (("weight", grid.weight_bits), ("activation", grid.activation_bits)):
        quantizer = own.get(what)
        if quantizer is None:
            if any(widths) and not any(what in dict(_quantizers(r)) for r in study.policy.rules):
                raise errors.SweepError(
                    f"the grid has {what} widths, and the policy quantizes no {what}s",
                    where=f"study {study.name}, {what}_bits {list(widths)}",
                    fix=f"{what}_bits=(0,), which is float, or a policy that quantizes them",
                )
            continue
        format, theta = quantizer.format, example_theta(quantizer.format)
        most = range(1, format.max_bits + 1)
        has = [bits for bits in most if format.known_valid(bits, theta) is not False]
        beyond = [bits for bits in widths if bits not in (0, *has)]
        if beyond:
            raise errors.BitsError(
                f"{what} widths {beyond} are outside the format {format.name}",
                where=f"study {study.name}, rule '{rule}'",
                why=f"it has widths {', '.join(map(str, has)) or 'none'}, and 0 is float",
                fix=f"{what}_bits=({', '.join(map(str, [0, *has]))},), or some of them",
            )


def check_logits(study: Study, logits: Any, labels: jax.Array) -> None:
    """Raise unless there is a label for each row of logits, one of its classes.

    Args:
      logits: what ``study.apply`` returns, of shapes alone.

    Raises:
      SweepError: as said.
    """
    if not isinstance(logits, jax.ShapeDtypeStruct):
        raise errors.SweepError(
            f"a {type(logits).__name__} for logits",
            where=f"study {study.name}, apply",
            fix="apply=lambda params, inputs: model.apply(params, inputs), which returns an array",
        )
    if not logits.shape or logits.shape[:-1] != labels.shape:
        raise errors.SweepError(
            f"labels of shape {labels.shape} for logits of shape {logits.shape}",
            where=f"study {study.name}, test",
            why="each row of logits, whose last axis are the classes, has one",
            fix="labels of the logits' shape without its last axis",
        )
    least, most, classes = int(labels.min()), int(labels.max()), logits.shape[-1]
    if least < 0 or most >= classes:
        raise errors.SweepError(
            f"a label {least if least < 0 else most} for {classes} classes",
            where=f"study {study.name}, test",
            why="no prediction could be right there",
            fix=f"labels from 0 to {classes - 1}",
        )
