"""Acceptance: the 49 cells of weight width 2-8 by activation width 2-8 are one compiled program.

Each cell returns what that cell returns when it is run alone with widths that Python knows, bit
for bit: QParams, codes and logits.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import leaves_by_path
from quantjax.simulation import centered_codes
from tests.compilations import counted_compilations
from tests.models import assert_same_bits, cnn, planned

pytestmark = pytest.mark.thinned(2)

WIDTHS = range(2, 9)
CELLS = tuple(itertools.product(WIDTHS, WIDTHS))
SPREAD = ((2, 2), (2, 5), (2, 8), (3, 4), (4, 4), (5, 7), (8, 2), (8, 5), (8, 8))
RULES = qj.ranges.stack([qj.ranges.MIN_MAX, qj.ranges.MOVING_AVERAGE])
CASE = cnn()
GIB = 1 << 30


class Grid(NamedTuple):
    """The plan, and what calibration saw."""

    plan: qj.Plan
    state: Any


@pytest.fixture(scope="module")
def grid() -> Grid:
    plan = planned(CASE, qj.uniform_policy())
    observe = jax.jit(qj.observe(CASE.f, plan))
    state = qj.init(plan, averaging_constant=0.25)
    for factor in (1.0, 1.7, 0.4):  # so that the two rules differ
        _, state = observe(state, CASE.params, factor * CASE.x)
    return Grid(plan, state)


def outcome(
    f: Callable[..., Any], grid: Grid, bits: tuple[Any, Any], rule: Any, params: Any, x: Any
):
    """QParams, codes of weights and of the input, logits of one cell."""
    plan = grid.plan
    qstate = qj.calibrate(
        plan, grid.state, params, weight_bits=bits[0], activation_bits=bits[1], rule=rule
    )
    codes = {}
    for index, entry in enumerate(plan.quantized):
        for operand in entry.quantized:
            qparams, arithmetic = qstate[entry.site.name][operand.key], operand.quantizer.arithmetic
            if operand.is_weight:
                weight = leaves_by_path(params)[entry.site.name]
                codes[entry.site.name] = centered_codes(weight, qparams, arithmetic)
            elif index == 0:
                codes["input"] = centered_codes(x, qparams, arithmetic)
    return qstate, codes, qj.fake_quantize(f, plan)(qstate, params, x)


def mapped(f: Callable[..., Any], grid: Grid, kind: str, *, rules: bool) -> Callable[..., Any]:
    """The whole grid as one function of ``((widths, widths, rules), params, x)``."""

    def run(cells: tuple[jax.Array, ...], params: Any, x: jax.Array) -> Any:
        def cell(w: jax.Array, a: jax.Array, r: jax.Array) -> Any:
            return outcome(f, grid, (w, a), RULES[r] if rules else None, params, x)

        return jax.vmap(cell)(*cells) if kind == "vmap" else lax.map(lambda c: cell(*c), cells)

    return run


def axes(*, rules: bool) -> tuple[jax.Array, ...]:
    """Arrays of weight width, activation width and rule, one entry a cell; the rule is slowest."""
    table = np.array([(w, a, r) for r in range(2 if rules else 1) for w, a in CELLS])
    widths = [jnp.asarray(table[:, axis], jnp.float32) for axis in (0, 1)]
    return (*widths, jnp.asarray(table[:, 2], jnp.int32))


def peak_bytes(compiled: Any) -> int:
    """Arguments, results and temporaries of a compiled program."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


class Run(NamedTuple):
    """A grid's results, and what it took."""

    results: Any
    traces: int
    compilations: int
    peak_bytes: int


@pytest.fixture(scope="module", params=itertools.product(("map", "vmap"), (False, True)), ids=str)
def run(request, grid) -> Run:
    """The grid under ``lax.map`` or ``vmap``, of 49 cells or with the rule as an axis of 98."""
    kind, rules = request.param
    cells, traces = axes(rules=rules), []

    def f(variables: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return CASE.f(variables, x)

    backwards = jax.block_until_ready(tuple(axis[::-1] for axis in cells))
    jitted = jax.jit(mapped(f, grid, kind, rules=rules))
    with counted_compilations() as compilations:
        results = jax.block_until_ready(jitted(cells, CASE.params, CASE.x))
        reverse = jax.block_until_ready(jitted(backwards, CASE.params, CASE.x))
    counts = len(traces), len(compilations)
    assert_same_bits(reverse, jax.tree.map(lambda leaf: np.asarray(leaf)[::-1], results))
    compiled = jitted.lower(cells, CASE.params, CASE.x).compile()
    return Run(results, *counts, peak_bytes(compiled))


def test_a_grid_traces_once_and_compiles_once(run):
    assert (run.traces, run.compilations) == (1, 1)
    assert 0 < run.peak_bytes <= GIB


def test_a_grid_over_ten_thousand_images_stays_within_a_gibibyte(grid):
    images = jax.ShapeDtypeStruct((10_000, *CASE.x.shape[1:]), jnp.float32)
    jitted = jax.jit(mapped(CASE.f, grid, "map", rules=False))
    used = peak_bytes(jitted.lower(axes(rules=False), CASE.params, images).compile())
    inputs = math.prod(images.shape) * 4
    assert inputs < used <= GIB, f"{used / 2**20:.0f} MiB"


def test_every_cell_is_usable(run):
    qstates, _, logits = run.results
    assert qj.check(qstates) == []
    assert np.isfinite(logits).all()
    assert len({row.tobytes() for row in np.asarray(logits)}) == len(logits)


@pytest.fixture(scope="module")
def alone(grid) -> Callable[..., Any]:
    """One cell with Python's integers for widths, compiled for nothing else."""

    @functools.cache
    def compute(weight_bits: int, activation_bits: int, rule: qj.RangeRule) -> Any:
        bits = weight_bits, activation_bits
        f = jax.jit(lambda p, x: outcome(CASE.f, grid, bits, rule, p, x))
        return jax.block_until_ready(f(CASE.params, CASE.x))

    return compute


def assert_cells_equal(run: Run, alone: Callable[..., Any], cells: Any) -> None:
    for lane in range(len(run.results[-1])):
        rule, cell = divmod(lane, len(CELLS))
        if CELLS[cell] in cells:
            got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], run.results)
            assert_same_bits(got, alone(*CELLS[cell], RULES.rules[rule]))


def test_a_spread_of_cells_equals_each_cell_alone(run, alone):
    assert_cells_equal(run, alone, SPREAD)


@pytest.mark.slow
def test_all_cells_equal_each_cell_alone(run, alone):
    assert_cells_equal(run, alone, CELLS)
