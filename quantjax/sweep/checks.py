"""What a study and a grid have to be, said before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from quantjax import errors
from quantjax.formats import example_theta
from quantjax.policy import Rule
from quantjax.quantizer import Quantizer
from quantjax.ranges import RangeRule
from quantjax.storage.known import BUILT_IN, FAMILIES
from quantjax.sweep.grid import FLOAT_CELL, Grid
from quantjax.sweep.study import Study


def check_study(study: Study, grid: Grid) -> None:
    """Raise for widths that a format does not have, for random roundings, and for rules whose names
    are those of others: results are filed by name.

    Raises:
      SweepError, BitsError: as said.
    """
    for rule in grid.rules:
        _check_name(rule, study)
    for scheme_rule in study.policy.rules:
        for what, quantizer in _quantizers(scheme_rule):
            if quantizer.rounding.is_random or quantizer.estimator.is_random:
                raise errors.SweepError(
                    f"{what}s are rounded at random, and a sweep has no key to draw from",
                    where=f"study {study.name}, rule '{scheme_rule}'",
                    fix="rounding=qj.rounding.HALF_EVEN",
                )
        _check_widths(study, grid, scheme_rule)


def _check_name(rule: RangeRule, study: Study) -> None:
    library = BUILT_IN.named.get(("range_rule", rule.name))
    family = FAMILIES.get(rule.name.partition("(")[0])
    if rule.name == FLOAT_CELL.rule:
        what = "is the name of the float baseline"
    elif library is not None and library != rule:
        what = "is not the library's, but has its name"
    elif family is not None and not _is_of(family, rule):
        what = "is not of the library's family, but has its name"
    else:
        return
    raise errors.SweepError(
        f"the rule {rule.name} {what}",
        where=f"study {study.name}, rules",
        why="results are filed by the names of rules, and would be taken for the other's",
        fix="rename your own",
    )


def _is_of(family: Callable[..., RangeRule], rule: RangeRule) -> bool:
    try:
        return family(*rule.parameters).range is rule.range
    except (TypeError, errors.QuantjaxError):
        return False


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
                why=f"it has widths {', '.join(map(str, has))}, and 0 is float",
                fix=f"widths from {min(has)} to {max(has)}, or 0",
            )


def check_labels(study: Study, logits: Any, labels: jax.Array) -> None:
    """Raise unless there is an integer label for each row of logits.

    Raises:
      SweepError: as said.
    """
    shape = tuple(np.shape(logits))
    fits = shape[:-1] == np.shape(labels) and len(shape) > 0
    if fits and np.issubdtype(np.asarray(labels).dtype, np.integer):
        return
    kind = np.asarray(labels).dtype
    raise errors.SweepError(
        f"labels {kind} of shape {np.shape(labels)} for logits of shape {shape}",
        where=f"study {study.name}, test",
        why="there is one integer label for each row of logits, whose last axis are the classes",
        fix="labels of the logits' shape without its last axis, in jnp.int32",
    )
