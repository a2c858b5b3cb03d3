"""Which operands take the rules of a grid: those to which the policy gives none of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, formats
from quantjax.sweep import Cell, Execution, Grid, run_sweep
from tests.refused import refused
from tests.sweep.tiny import tiny_study

MIN_MAX = qj.ranges.MIN_MAX
GRID = Grid(weight_bits=(2, 3), activation_bits=(0,), rules=(MIN_MAX,), seeds=(0,))
LEARNED = qj.weight_quantizer(
    format=formats.learned_codebook(), rule=qj.ranges.K_MEANS, granularity=qj.PerTensor()
)


def study_of(weights, activations=None):
    scheme = qj.Scheme(weights=weights, activations=activations)
    policy = qj.Policy([qj.rule(qj.weighted(), scheme)])
    study = tiny_study()
    # Labels of which no calibrated cell is sure, so that counts tell rules from one another.
    inputs = jnp.asarray(np.random.default_rng(5).normal(size=(400, 6)), jnp.float32)
    params = study.train(0, lambda steps: None)
    labels = jnp.argmax(study.apply(params, inputs), axis=-1).astype(jnp.int32)
    return dataclasses.replace(study, policy=policy, test=lambda: (inputs, labels))


def counted(study, cell, **rules):
    """Correct predictions by the verbs alone."""
    params = study.train(0, lambda steps: None)
    batches, (inputs, labels) = study.calibration(), study.test()
    plan = qj.plan(study.policy, qj.sites(study.apply, params, batches[0]))
    state = qj.init(plan)
    observe = jax.jit(qj.observe(study.apply, plan))
    for batch in batches:
        _, state = observe(state, params, batch)
    widths = {"weight_bits": cell.weight_bits}
    if cell.activation_bits:
        widths["activation_bits"] = cell.activation_bits
    qstate = qj.calibrate(plan, state, params, **widths, **rules)
    logits = jax.jit(qj.fake_quantize(study.apply, plan))(qstate, params, inputs)
    return int((jnp.argmax(logits, axis=-1) == labels).sum())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("rule", [qj.ranges.percentile(0.9), qj.ranges.ADMM], ids=lambda r: r.name)
def test_a_rule_that_the_policy_names_stays(tmp_path, rule):
    study = study_of(qj.weight_quantizer(rule=rule))
    rows = run_sweep(study, GRID, tmp_path, execution=Execution.MAP).rows
    for row in rows:
        if row.cell.weight_bits:
            assert row.correct == counted(study, row.cell)
    cells = [Cell(bits, 0, "min_max") for bits in GRID.weight_bits]
    own, others = ([counted(study, cell, **by) for cell in cells] for by in ({}, {"rule": MIN_MAX}))
    assert own != others


def test_levels_are_fitted_as_the_policy_says(tmp_path):
    study = study_of(LEARNED)
    rows = run_sweep(study, GRID, tmp_path, execution=Execution.MAP).rows
    assert [row.correct for row in rows[1:]] == [counted(study, row.cell) for row in rows[1:]]


def test_operands_without_a_rule_of_their_own_take_each_of_the_grid(tmp_path):
    study = study_of(qj.weight_quantizer(rule=qj.ranges.sigma(2)), qj.activation_quantizer())
    rules = (MIN_MAX, qj.ranges.percentile(0.6))
    grid = dataclasses.replace(GRID, weight_bits=(3,), activation_bits=(2,), rules=rules)
    rows = run_sweep(study, grid, tmp_path, execution=Execution.MAP).rows[1:]
    want = [
        counted(study, row.cell, activation_rule=rule)
        for row, rule in zip(rows, rules, strict=True)
    ]
    assert [row.correct for row in rows] == want
    assert want[0] != want[1]


def test_several_rules_that_nothing_takes_are_refused_before_any_work(tmp_path):
    live = qj.activation_quantizer(range=qj.RangeMode.LIVE)
    grid = dataclasses.replace(GRID, rules=(MIN_MAX, qj.ranges.MSE))
    with refused(errors.SweepError, "2 rules", "no operand that takes one", "one rule"):
        run_sweep(study_of(LEARNED, live), grid, tmp_path)
    assert list(tmp_path.iterdir()) == []
