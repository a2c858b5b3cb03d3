"""Checkpoints of a state and a record beside it, by orbax; the newest one that is whole serves.

Each function opens the folder anew and leaves nothing running, so that a run that was interrupted
in the midst of a save can still save. That costs 0.1 to 0.2 s a save of a small state.
"""

from __future__ import annotations

import os
import uuid
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments.training import leaves
from experiments.training.errors import CheckpointError, CheckpointWarning, RunMismatchError
from experiments.training.seal import check_sealed, seal
from experiments.training.task import State

_STATE, _RECORD = "state", "record"
_LEAVES, _REST = "leaves", "rest"


class Saved(NamedTuple):
    """One checkpoint.

    Attributes:
      step: how many steps had been done; its name.
      state: any pytree of arrays.
      record: JSON data that goes with it; NaN and infinity are allowed.
    """

    step: int
    state: State
    record: Any = None


def save(folder: Path, saved: Saved, *, keep: int = 1, best: int | None = None) -> None:
    """Write a checkpoint, whole or not at all, then remove those that need not be kept.

    Args:
      folder: of the checkpoints, each in a folder of its own that is named by its step.
      keep: how many of the newest stay.
      best: a step whose checkpoint stays too.

    Raises:
      ValueError: from orbax, where there is a checkpoint of that step.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.CustomSteps([] if best is None else [best]),
        ]
    )
    record = {
        _LEAVES: [list(leaf) for leaf in leaves.described(saved.state)],
        _REST: saved.record,
    }
    with _manager(folder, preservation_policy=policy, create=True) as manager:
        manager.save(
            saved.step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(leaves.stored(saved.state)),
                record=ocp.args.JsonSave(record),
            ),
            force=True,
        )
    seal(folder / str(saved.step))


def saved_steps(folder: Path) -> tuple[int, ...]:
    """The steps whose checkpoints are complete, in order; they may be damaged all the same."""
    if not folder.is_dir():
        return ()
    with _manager(folder) as manager:
        return tuple(sorted(manager.all_steps()))


def load(folder: Path, like: State, *, step: int | None = None) -> Saved:
    """Read one checkpoint.

    Args:
      like: a state of the same structure, dtypes and shapes, whose devices it comes back on.
      step: None for the newest.

    Raises:
      CheckpointError: there is none, or it cannot be read.
      RunMismatchError: it holds another kind of state.
    """
    found = saved_steps(folder)
    if step is None and found:
        step = found[-1]
    if step not in found or step is None:
        raise CheckpointError(
            "there is no checkpoint" + ("" if step is None else f" of step {step}"),
            where=folder.name,
            why=f"there are those of steps {', '.join(map(str, found))}" if found else "",
            fix="one of those" if found else "check the path",
        )
    where = f"{folder.name}/{step}"
    try:
        check_sealed(folder / str(step))
        record = _read(folder, step, ocp.args.Composite(record=ocp.args.JsonRestore())).record
        listed = [leaves.Leaf(p, d, tuple(s), i) for p, d, s, i in record[_LEAVES]]
        leaves.check_same(listed, like, where=where)
        state = leaves.restored(_read_arrays(folder, step, like), like)
    except RunMismatchError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            "the checkpoint cannot be read",
            where=where,
            why=str(error).partition("\n")[0][:200],
            fix="copy the folder again, or use an older checkpoint",
        ) from None
    return Saved(step, state, record[_REST])


def recover(folder: Path, like: State) -> Saved | None:
    """The newest checkpoint that can be read; None where none was ever completed.

    Damaged ones that are newer are moved to a folder beside this one, so that their steps can be
    saved again.

    Warns:
      CheckpointWarning: for each that is incomplete or damaged.

    Raises:
      CheckpointError: there are some, and none can be read.
      RunMismatchError: the newest that can be read holds another kind of state.
    """
    steps = saved_steps(folder)
    if folder.is_dir():
        for name in sorted(set(os.listdir(folder)) - {str(step) for step in steps}):
            _warn(f"{folder.name}/{name} is incomplete; its writing was interrupted")
    damaged: list[CheckpointError] = []
    for step in reversed(steps):
        try:
            saved = load(folder, like, step=step)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for fault, bad in zip(damaged, reversed(steps), strict=False):
            aside = _moved_aside(folder, bad)
            _warn(f"{fault.where} cannot be read ({fault.why}); it is now {aside}")
        return saved
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints can be read",
            where=folder.name,
            why=damaged[0].why,
            fix="copy the folder again, or train anew in another one",
        )
    return None


def _manager(folder: Path, *, create: bool = False, **options: Any) -> Any:
    """One process writes at a time: what is incomplete is nobody's and is removed before a save."""
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            create=create,
            cleanup_tmp_directories=create,
            enable_async_checkpointing=False,
            **options,
        ),
    )


def _read(folder: Path, step: int, args: Any) -> Any:
    with _manager(folder) as manager:
        return manager.restore(step, args=args)


def _read_arrays(folder: Path, step: int, like: State) -> dict[str, np.ndarray]:
    as_numpy = {
        name: ocp.RestoreArgs(restore_type=np.ndarray) for name in leaves.stored_names(like)
    }
    args = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return dict(_read(folder, step, args).state)


def _moved_aside(folder: Path, step: int) -> str:
    aside = folder.with_name(f"{folder.name}_damaged")
    aside.mkdir(exist_ok=True)
    target = aside / f"{step}-{uuid.uuid4().hex[:8]}"
    os.rename(folder / str(step), target)
    return f"{aside.name}/{target.name}"


def _warn(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=3)
