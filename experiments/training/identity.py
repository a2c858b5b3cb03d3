"""What a folder's run was made of, so that nothing else goes on in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.training.config import TrainerConfig
from experiments.training.errors import RunMismatchError, TaskError
from experiments.training.task import Batch, Task
from quantjax.printing import shape_text
from quantjax.storage.document import read_document, write_document

SCHEMA, VERSION = "experiments.training", 1
DOCUMENT = "run.json"
# What decides the state and the history. How often and how many checkpoints are kept does not.
_DECIDING = ("steps", "batch", "log_every", "evaluate_every", "evaluate_first")
_SHOWN = 10


def identity(task: Task, data: Batch, config: TrainerConfig, seed: int) -> dict[str, Any]:
    """What a run depends on, as JSON data.

    Raises:
      TaskError: a task's identity that is no JSON data.
    """
    try:
        stated = json.loads(json.dumps(dict(task.identity), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError) as error:
        raise TaskError(
            "the task's identity is no JSON data",
            why=str(error),
            fix="numbers, text, lists and dictionaries with text for keys; str(...) of all else",
        ) from None
    return {
        "trainer": {"seed": int(seed), **{name: getattr(config, name) for name in _DECIDING}},
        "data": {
            jax.tree_util.keystr(path): _digest(np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(data)
        },
        "task": stated,
    }


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """File the identity in a folder that has none; check it in one that has.

    Raises:
      RunMismatchError: the folder is of another run; the message says what differs.
      StorageError: its document cannot be read.
    """
    path = folder / DOCUMENT
    if not path.exists():
        write_document(path, wanted, schema=SCHEMA, version=VERSION)
        return
    found = _flat(read_document(path, schema=SCHEMA, version=VERSION))
    now = _flat(wanted)
    lines = [
        f"{name}: {found.get(name, 'absent')} in the folder, {now.get(name, 'absent')} now"
        for name in dict.fromkeys([*now, *found])
        if found.get(name) != now.get(name)
    ]
    if lines:
        hidden = len(lines) - _SHOWN
        raise RunMismatchError(
            "the folder holds another run",
            where=folder.name,
            why="; ".join(lines[:_SHOWN] + ([f"and {hidden} more"] if hidden > 0 else [])),
            fix="another folder, or what this one was begun with",
        )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Dotted names of all that lies in nested dictionaries, values as JSON text."""
    if not isinstance(value, dict) or not value:
        return {name: json.dumps(value, ensure_ascii=False)} if name else {}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"{array.dtype} {shape_text(array.shape)} {digest.hexdigest()[:16]}"
