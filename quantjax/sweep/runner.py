"""Run many cells of one computation as one compiled program.

A cell is a function of arrays; cells differ in values, never in shapes, so they share a program. It
runs them under ``vmap`` or one after another under ``lax.map``: a short trial decides, because on
CPU convolutions with batched weights are several times slower under ``vmap``, while small dense
products gain.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

import jax
import numpy as np
from jax import lax

from quantjax import errors
from quantjax.arguments import expect

CellFunction = Callable[..., Any]
"""``cell(values, *shared) -> pytree``; ``values`` holds what the cell has on each axis."""

Values = Mapping[str, Any]
CELLS_PER_CALL = 14
TRIAL_ROUNDS = 2


class Execution(enum.Enum):
    """How a call runs its cells."""

    MAP = "map"
    VMAP = "vmap"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate program.

    Attributes:
      execution: how it runs its cells.
      cells_per_call: the compiled shape.
      bytes_per_call: temporaries, arguments and results, as XLA's memory analysis states them.
      seconds_per_cell: the best of a few rounds.
    """

    execution: Execution
    cells_per_call: int
    bytes_per_call: int
    seconds_per_cell: float


@dataclasses.dataclass(frozen=True)
class CellProgram:
    """The compiled program of a grid; serves any number of cells of the same shapes.

    Attributes:
      chosen: the candidate that is run.
      trials: all candidates that were tried.
    """

    chosen: Trial
    trials: tuple[Trial, ...]
    _compiled: Any = dataclasses.field(repr=False)

    def calls(self, values: Values, *shared: Any) -> Iterator[Any]:
        """Results call by call, stacked on a first axis, as NumPy arrays.

        Args:
          values: as for :func:`compile_cells`.
          shared: what all cells have in common (parameters, statistics, data).
        """
        axes = _axes(values)
        count = _count(axes)
        size = self.chosen.cells_per_call
        for start in range(0, count, size):
            result = jax.device_get(self._compiled(_chunk(axes, start, size), *shared))
            kept = min(size, count - start)
            yield jax.tree.map(lambda leaf, kept=kept: leaf[:kept], result)

    def run(self, values: Values, *shared: Any) -> Any:
        """Results of all cells, stacked on a first axis, as NumPy arrays."""
        parts = list(self.calls(values, *shared))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def compile_cells(
    cell: CellFunction,
    values: Values,
    *shared: Any,
    memory_budget_bytes: int,
    execution: Execution | None = None,
    cells_per_call: int = CELLS_PER_CALL,
) -> CellProgram:
    """Compile ``cell`` for a grid, choosing between ``vmap`` and ``lax.map`` by a short trial.

    Args:
      cell: ``(values, *shared) -> pytree``, each value what its axis holds for one cell.
      values: the grid: an axis is an array, a list of numbers, or a tree of arrays
        (``qj.FloatBits``, a dictionary), all of the same length along their first axis.
      shared: arguments that all cells have in common; arguments and not constants, or XLA would
        fold them.
      memory_budget_bytes: bound of temporaries, arguments and results of one call. Cells
        per call are halved until it fits.
      execution: skip the trial.
      cells_per_call: upper bound; smaller calls report progress more often.

    Raises:
      SweepError: an empty grid, axes of unequal length, or one cell alone over the budget.
      ArgumentError: an execution that is none, an axis of text or of lists, a number that is none.

    >>> import jax.numpy as jnp
    >>> grid = {"bits": np.arange(5, dtype=np.float32)}
    >>> double = compile_cells(
    ...     lambda v, x: v["bits"] * x, grid, jnp.float32(2), memory_budget_bytes=1 << 20
    ... )
    >>> double.run(grid, jnp.float32(2)).tolist()
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    expect_execution(execution, where="compile_cells")
    _check_given(values, memory_budget_bytes, cells_per_call)
    axes = _axes(values)
    count = _count(axes)
    calls = math.ceil(count / min(cells_per_call, count))
    size = math.ceil(count / calls)
    candidates = list(Execution) if execution is None else [execution]
    trials: list[tuple[Trial, Any]] = []
    smallest = 1 << 62
    for candidate in candidates:
        fitted, needed = _fit(cell, axes, shared, candidate, size, memory_budget_bytes)
        smallest = min(smallest, needed)
        if fitted is not None:
            trials.append(fitted)
    if not trials:
        raise errors.SweepError(
            f"one cell needs {_size(smallest)}, the budget is {_size(memory_budget_bytes)}",
            where=f"{count} cells, {', '.join(c.value for c in candidates)}",
            fix="raise memory_budget_bytes (--memory-budget-mib of the command line), or evaluate "
            "fewer samples in a cell",
        )
    if len(trials) > 1:
        trials = _timed(trials, axes, shared)
    chosen, compiled = min(trials, key=lambda trial: trial[0].seconds_per_cell)
    return CellProgram(chosen, tuple(trial for trial, _ in trials), compiled)


def _check_given(values: object, memory_budget_bytes: object, cells_per_call: Any) -> None:
    where, grid = "compile_cells", '{"bits": np.arange(2.0, 9.0)}'
    expect(values, Mapping, argument="values", where=where, fix=grid)
    fix = "memory_budget_bytes=1 << 30"
    expect(memory_budget_bytes, numbers.Real, argument="memory_budget_bytes", where=where, fix=fix)
    fix = f"cells_per_call={CELLS_PER_CALL}"
    expect(cells_per_call, numbers.Integral, argument="cells_per_call", where=where, fix=fix)
    if cells_per_call < 1:
        raise errors.ArgumentError(f"{cells_per_call} cells per call", where=where, fix=fix)


def _fit(
    cell: CellFunction,
    axes: Mapping[str, Any],
    shared: tuple[Any, ...],
    execution: Execution,
    size: int,
    budget: int,
) -> tuple[tuple[Trial, Any] | None, int]:
    """The candidate at the largest size within the budget, and the bytes of the last one tried."""
    while True:
        compiled = _program(cell, execution).lower(_chunk(axes, 0, size), *shared).compile()
        needed = _bytes(compiled)
        if needed <= budget:
            return (Trial(execution, size, needed, 0.0), compiled), needed
        if size == 1:
            return None, needed
        size = size // 2


def _size(number: int) -> str:
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number:,} bytes"


def expect_execution(execution: object, *, where: str) -> None:
    """Raise ``ArgumentError`` for what is none, such as its name as text."""
    kinds = (Execution, NoneType)
    expect(execution, kinds, argument="execution", where=where, fix="execution=Execution.MAP")


def _program(cell: CellFunction, execution: Execution) -> Any:
    def cells_in_turn(values: Any, *shared: Any) -> Any:
        return lax.map(lambda one: cell(one, *shared), values)

    def cells_at_once(values: Any, *shared: Any) -> Any:
        return jax.vmap(lambda one: cell(one, *shared))(values)

    return jax.jit(cells_in_turn if execution is Execution.MAP else cells_at_once)


def _timed(
    trials: list[tuple[Trial, Any]], axes: Mapping[str, Any], shared: tuple[Any, ...]
) -> list[tuple[Trial, Any]]:
    """The candidates with their times, rounds interleaved, the first of each not counted."""
    times: dict[int, list[float]] = {index: [] for index in range(len(trials))}
    for _ in range(1 + TRIAL_ROUNDS):
        for index, (trial, compiled) in enumerate(trials):
            chunk = _chunk(axes, 0, trial.cells_per_call)
            start = time.perf_counter()
            jax.block_until_ready(compiled(chunk, *shared))
            times[index].append((time.perf_counter() - start) / trial.cells_per_call)
    return [
        (dataclasses.replace(trial, seconds_per_cell=min(times[index][1:])), compiled)
        for index, (trial, compiled) in enumerate(trials)
    ]


def _bytes(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise errors.SweepError(
            "this backend states no memory use",
            fix="use JAX on CPU, GPU or TPU",
        )
    return int(
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
    )


def _axes(values: Values) -> dict[str, Any]:
    """Each axis as an array, or as a tree of arrays with one entry a cell, as ``vmap`` takes it.

    Raises:
      ArgumentError: an axis of text, or a list of anything but numbers.
    """
    return {
        name: jax.tree.map(functools.partial(_array, name), axis, is_leaf=_is_list)
        for name, axis in values.items()
    }


def _is_list(axis: Any) -> bool:
    return type(axis) in (list, tuple)  # a NamedTuple is a tree: FloatBits, QParams


def _array(name: str, axis: Any) -> Any:
    if isinstance(axis, jax.Array):
        return axis  # keys are no NumPy arrays
    if _is_list(axis) and any(np.ndim(entry) or isinstance(entry, Mapping) for entry in axis):
        raise errors.ArgumentError(
            f"the axis {name} is a {type(axis).__name__} of something else than numbers",
            where="compile_cells",
            why="its entries may be cells, or parts of each cell",
            fix="one array with a leading axis of cells, or a dictionary or NamedTuple of them",
        )
    array = np.asarray(axis)
    if array.dtype.kind in "OUS":
        raise errors.ArgumentError(
            f"the axis {name} holds no numbers",
            where="compile_cells",
            why="each of its entries is an argument of a compiled program",
            fix="of rules and other names their places, np.arange(n), as qj.ranges.stack takes",
        )
    return array


def _count(axes: Mapping[str, Any]) -> int:
    lengths = {
        name + jax.tree_util.keystr(path): leaf.shape[0] if leaf.ndim else 0
        for name, axis in axes.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(axis)
    }
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise errors.SweepError(
            "the axes of the grid have no common length of one or more",
            where=f"lengths {lengths}",
            fix="give every cell a value on every axis (numpy.meshgrid, then ravel)",
        )
    return next(iter(lengths.values()))


def _chunk(axes: Mapping[str, Any], start: int, size: int) -> dict[str, Any]:
    """``size`` cells from ``start`` on; past the end the last cell is repeated."""
    index = np.minimum(np.arange(start, start + size), _count(axes) - 1)
    return {name: jax.tree.map(lambda leaf: leaf[index], axis) for name, axis in axes.items()}
