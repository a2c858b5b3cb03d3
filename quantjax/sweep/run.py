"""The sweep: every cell of a grid, for every seed of a study."""

from __future__ import annotations

import numbers
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from quantjax import errors
from quantjax.arguments import expect
from quantjax.calibration.batches import running
from quantjax.interpreter import Role
from quantjax.planning import Plan, plan
from quantjax.ranges import IndexedRule, RangeRule, stack
from quantjax.site_plan import OperandPlan
from quantjax.sweep.alike import check_alike, check_comparable, check_planned, shapes_of
from quantjax.sweep.checks import (
    CHECKPOINTS,
    RESULTS,
    check_logits,
    check_output,
    check_study,
    check_trained,
    takes_rules,
)
from quantjax.sweep.data import calibration_batches, tested
from quantjax.sweep.grid import FLOAT_CELL, Cell, Grid
from quantjax.sweep.progress import Progress, Silent
from quantjax.sweep.runner import CellProgram, Execution, compile_cells, expect_execution
from quantjax.sweep.store import ResultStore, Row
from quantjax.sweep.study import Study
from quantjax.transforms.calibrate import QState, calibrate_by
from quantjax.transforms.fake_quantize import fake_quantize
from quantjax.transforms.observe import init, observe
from quantjax.transforms.sites import sites


class SweepResult(NamedTuple):
    """What a sweep returns.

    Attributes:
      rows: one for each cell and seed of the grid, computed now or before.
      computed: how many of them were computed now.
      trained: how many models were trained now.
      program: the compiled program; None where nothing had to be computed.
    """

    rows: list[Row]
    computed: int
    trained: int
    program: CellProgram | None


def run_sweep(
    study: Study,
    grid: Grid,
    output: Path | str,
    *,
    memory_budget_bytes: int = 1 << 30,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Evaluate every cell of ``grid`` for every seed, and file the results under ``output``.

    Trains and calibrates one model a seed, then evaluates all its cells as one compiled program;
    it and the calibration are compiled once for all seeds. Cells that ``output/results.csv``
    already has are not computed, nor are models trained that ``output/checkpoints`` has; an
    interrupted sweep goes on where it stopped.

    Raises:
      SweepError: an inconsistent grid, random roundings, an unreadable result file or checkpoint,
        labels that are not a class for each row of logits, too small a budget; parameters of other
        shapes than the first seed's, ahead of that seed's cells; logits that are not finite, behind
        all cells, of which the others are filed.
      ArgumentError: arguments of another kind.
      DataError: no calibration batch, or NaN or infinity in one or in what is tested.
      ModelError: a model that does not run on what the study has.
      BitsError: widths that the policy's formats do not have, before anything is computed.
    """
    _check_arguments(study, grid, output, memory_budget_bytes, execution, progress)
    output = Path(output)
    check_study(study, grid)
    check_output(output)
    progress = progress or Silent()
    store = ResultStore(output / RESULTS)
    fingerprint = study.fingerprint()
    wanted = grid.cells()
    missing = {
        seed: [cell for cell in wanted if cell not in known]
        for seed in grid.seeds
        for known in [store.known(fingerprint, seed)]
    }
    todo = {seed: cells for seed, cells in missing.items() if cells}
    checkpoints = output.absolute() / CHECKPOINTS / fingerprint
    trained, broken = 0, list[str]()
    program: CellProgram | None = None
    observing: _Observing | None = None
    first: tuple[int, Any] | None = None
    if todo:
        inputs, labels = tested(study)
        batches = calibration_batches(study)
        check_comparable(study, batches[0], inputs)
    with progress:
        for seed in todo:
            fresh = not (checkpoints / f"seed_{seed}").exists()
            trained += fresh
            params = _trained(study, seed, checkpoints / f"seed_{seed}", progress)
            first = first or (seed, shapes_of(params))
            check_alike(study, first, seed, params)
            if observing is None:
                with running((batches[0],), f"study {study.name}, calibration, batch 1"):
                    table = sites(study.apply, params, batches[0])
                planned = plan(study.policy, table)
                check_planned(study, planned, params, batches[0], inputs)
                observing = _Observing(planned, jax.jit(observe(study.apply, planned)))
            planned = observing.planned
            state = _observed(study, observing, params, batches, progress)
            with running((inputs,), f"study {study.name}, test"):
                logits = jax.eval_shape(study.apply, params, inputs)
            check_logits(study, logits, labels)
            shared = (state, params, inputs, labels)
            values = _values(todo[seed], grid.names)
            if program is None:
                cell = _cell(study, planned, grid.rules)
                longest = max(todo.values(), key=len)
                progress.note("compiling one program for all cells")
                program = compile_cells(
                    cell,
                    _values(longest, grid.names),
                    *shared,
                    memory_budget_bytes=memory_budget_bytes,
                    execution=execution,
                )
            with progress.task(f"evaluating seed {seed}", len(todo[seed])) as advance:
                done = 0
                for counts in program.calls(values, *shared):
                    cells = todo[seed][done : done + len(counts)]
                    found = dict(zip(cells, counts.tolist(), strict=True))
                    finite = {cell: count for cell, count in found.items() if count >= 0}
                    store.add(_rows(study, fingerprint, seed, finite, labels.size))
                    broken += [_at(seed, cell) for cell in found.keys() - finite.keys()]
                    done += len(counts)
                    advance(len(counts))
    if broken:
        of_floats = {_at(seed, FLOAT_CELL) for seed in grid.seeds} & set(broken)
        if of_floats:
            raise errors.SweepError(
                "the logits of the float model are not finite",
                where=f"{study.name}, {'; '.join(sorted(of_floats)[:6])}",
                why="what training returned, an input or the model itself is; a class that is "
                "masked by -inf is one that argmax never chooses, and needs a finite number",
                fix="study.apply(params, inputs) under jax.config.update('jax_debug_nans', True)",
            )
        raise errors.SweepError(
            f"the logits of {len(broken)} cells are not finite",
            where=f"{study.name}, {'; '.join(sorted(broken)[:6])}",
            why="all other cells are computed and filed",
            fix="calibrate one of them outside the sweep and print qj.check(qstate)",
        )
    rows = {seed: store.known(fingerprint, seed) for seed in grid.seeds}
    return SweepResult(
        [rows[seed][cell] for seed in grid.seeds for cell in wanted],
        sum(map(len, todo.values())),
        trained,
        program,
    )


def _check_arguments(
    study: object,
    grid: object,
    output: object,
    memory_budget_bytes: Any,
    execution: object,
    progress: object,
) -> None:
    """Raise for an argument of another kind, and for a budget that holds nothing."""
    where = "run_sweep"
    expect(study, Study, argument="study", where=where, fix="a quantjax.sweep.Study")
    expect(grid, Grid, argument="grid", where=where, fix="Grid(weight_bits=(2, 4, 8))")
    paths = (str, Path)
    expect(output, paths, argument="output", where=where, fix='output="outputs/sweep"')
    expect_execution(execution, where=where)
    expect(
        progress, (Progress, NoneType), argument="progress", where=where, fix="Silent(), or None"
    )
    fix = "memory_budget_bytes=1 << 30"
    expect(memory_budget_bytes, numbers.Real, argument="memory_budget_bytes", where=where, fix=fix)
    if memory_budget_bytes < 1:
        raise errors.SweepError(
            f"a memory budget of {memory_budget_bytes} bytes",
            where=where,
            why="a program of one cell needs some memory",
            fix=fix,
        )


def _trained(study: Study, seed: int, folder: Path, progress: Progress) -> Any:
    """The model of one seed, from its checkpoint where there is one."""
    with ocp.StandardCheckpointer() as checkpointer:
        if folder.exists():
            return _restored(checkpointer, folder)
        with progress.task(f"training seed {seed}", study.train_steps) as advance:
            params = study.train(seed, advance)
        check_trained(study, params)
        # Under a name of its own: two sweeps may have trained it, and save at the same time.
        own = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}")
        checkpointer.save(own, params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(own)
        is_whole = str(jax.tree.structure(restored)) == str(jax.tree.structure(params))
        try:
            if not is_whole:  # tuples, keys that are no text: a later run trains them again
                progress.note(f"seed {seed} is not kept: no tree of dicts with text keys and lists")
                return params
            own.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            return _restored(checkpointer, folder)  # another sweep has been first
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return restored


def _restored(checkpointer: ocp.StandardCheckpointer, folder: Path) -> Any:
    try:
        return checkpointer.restore(folder)
    except (OSError, ValueError, KeyError) as error:
        raise errors.SweepError(
            "a checkpoint cannot be read",
            where=f"{folder.parent.name}/{folder.name}",
            why=f"{type(error).__name__}: {error}"[:200],
            fix="delete the folder; the sweep trains that seed again",
        ) from error


class _Observing(NamedTuple):
    """The plan of all seeds, and the compiled function that collects its statistics."""

    planned: Plan
    one_batch: Callable[..., Any]


def _observed(
    study: Study,
    observing: _Observing,
    params: Any,
    batches: Sequence[jax.Array],
    progress: Progress,
) -> Any:
    """Statistics of the calibration batches: one pass, for every rule and width."""
    state = init(observing.planned)
    with progress.task("calibrating", len(batches)) as advance:
        for number, batch in enumerate(batches, 1):
            with running((batch,), f"study {study.name}, calibration, batch {number}"):
                _, state = observing.one_batch(state, params, batch)
            advance(1)
    return state


def _cell(study: Study, planned: Plan, rules: Sequence[RangeRule]) -> Callable[..., Any]:
    """Correct predictions at one point of the grid; every argument an array."""
    rule_stack = stack(rules)
    quantized = fake_quantize(study.apply, planned)
    operands = [operand for entry in planned.quantized for operand in entry.quantized]
    roles = {operand.operand.role for operand in operands}

    def cell(values: Any, state: Any, params: Any, inputs: Any, labels: Any) -> jax.Array:
        widths = {Role.WEIGHT: values["weight_bits"], Role.ACTIVATION: values["activation_bits"]}
        asked = {role: bits for role, bits in widths.items() if role in roles}
        chosen = rule_stack[values["rule"]]

        def rule_of(operand: OperandPlan) -> IndexedRule | None:
            is_bias = operand.operand.role is Role.BIAS
            return chosen if takes_rules(operand.quantizer) and not is_bias else None

        qstate = calibrate_by(planned, state, params, asked, rule_of)
        logits = quantized(_bypassed(qstate, values["is_float"]), params, inputs)
        valid = jnp.all(jnp.isfinite(logits))
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return jnp.where(valid, correct, -1)

    return cell


def _bypassed(qstate: QState, is_float: jax.Array) -> QState:
    """Outputs and biases have no axis in the grid; the float baseline has none of them."""
    return {
        site: {
            key: qparams._replace(bits=jnp.where(is_float, 0.0, qparams.bits))
            for key, qparams in operands.items()
        }
        for site, operands in qstate.items()
    }


def _values(cells: Sequence[Cell], names: Sequence[str]) -> dict[str, np.ndarray]:
    index = [0 if cell == FLOAT_CELL else names.index(cell.rule) for cell in cells]
    return {
        "weight_bits": np.array([cell.weight_bits for cell in cells], np.float32),
        "activation_bits": np.array([cell.activation_bits for cell in cells], np.float32),
        "rule": np.array(index, np.int32),
        "is_float": np.array([cell == FLOAT_CELL for cell in cells]),
    }


def _rows(
    study: Study,
    fingerprint: str,
    seed: int,
    counts: Mapping[Cell, int],
    total: int,
) -> list[Row]:
    return [
        Row(fingerprint, study.name, seed, *cell, count / total, correct=count, total=total)
        for cell, count in counts.items()
    ]


def _at(seed: int, cell: Cell) -> str:
    return f"seed {seed}, W{cell.weight_bits} A{cell.activation_bits}, {cell.rule}"
