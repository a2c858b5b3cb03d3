"""What a study calibrates and tests with, looked at ahead of any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax import errors
from quantjax.arguments import kind_of
from quantjax.calibration.batches import changed_integers, checked, first_line
from quantjax.sweep.study import Study


class Tested(NamedTuple):
    """Inputs, and an integer label for each row of logits."""

    inputs: Any
    labels: jax.Array


def calibration_batches(study: Study) -> list[Any]:
    """The batches as JAX arrays, from an iterator too.

    Raises:
      SweepError: no batches but something else.
      DataError: none at all, and NaN, infinity or no numbers in one.
    """
    given = study.calibration()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        raise errors.SweepError(
            f"{kind_of(given)} for calibration batches",
            where=f"study {study.name}, calibration",
            fix="calibration=lambda: [inputs], a list of batches",
        )
    batches = [
        checked((batch,), f"study {study.name}, calibration, batch {number}")[0]
        for number, batch in enumerate(given, 1)
    ]
    if not batches:
        raise errors.DataError(
            "the study has no calibration batch",
            where=f"study {study.name}, calibration",
            why="ranges of activations are derived from what is observed, and nothing is",
            fix="return a list with at least one batch",
        )
    return batches


def tested(study: Study) -> Tested:
    """Inputs and labels of ``study.test``.

    Raises:
      SweepError: no pair, or labels that are no integers of 32 bits, or none.
      DataError: inputs with NaN or infinity, or no numbers; integers that JAX's do not hold.
    """
    found = study.test()
    if not isinstance(found, tuple | list) or len(found) != 2:
        count = f" of {len(found)}" if isinstance(found, tuple | list) else ""
        raise errors.SweepError(
            f"{kind_of(found)}{count} for inputs and labels",
            where=f"study {study.name}, test",
            fix="test=lambda: (inputs, labels)",
        )
    inputs, labels = found
    held = known_labels(study, labels)
    return Tested(checked((inputs,), f"study {study.name}, test")[0], held)


def known_labels(study: Study, labels: Any) -> jax.Array:
    """The labels as an array of integers."""
    where = f"study {study.name}, test"
    try:
        array = jnp.asarray(labels)
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.SweepError(
            "labels that are no array of numbers",
            where=where,
            why=first_line(error),
            fix="one integer label for each row of logits: np.array(labels, np.int32)",
        ) from error
    if not array.size:
        raise errors.SweepError(
            "the study has no test example",
            where=where,
            why="an accuracy is a share of them",
            fix="return inputs and labels with at least one row from test",
        )
    if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
        raise errors.SweepError(
            f"labels of {array.dtype}",
            where=where,
            why="there is one integer label for each row of logits",
            fix="labels.astype(jnp.int32)",
        )
    narrow = array.astype(jnp.int32)
    changed = changed_integers(labels, narrow)
    if changed:
        raise errors.SweepError(
            f"{changed} labels do not fit int32",
            where=where,
            why="labels are numbers of classes",
            fix="labels from 0 to one less than there are classes",
        )
    return narrow
