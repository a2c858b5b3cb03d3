"""Batches in, statistics out; every mistake in model or data has a message that names the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.calibration import Model, batched, calibration_report, collect
from tests.calibration import tiny
from tests.models import assert_same_bits, cnn

POLICY = qj.uniform_policy()


def shapes(*arguments, **options):
    return [jax.tree.map(np.shape, batch) for batch in batched(*arguments, **options)]


def test_statistics_are_those_of_observing_batch_by_batch():
    model = tiny.model()
    collected = collect(model, batched(tiny.batches()), POLICY)
    plan = qj.plan(POLICY, qj.sites(model.apply, model.params, tiny.batches()[0]))
    observing, state = jax.jit(qj.observe(model.apply, plan)), qj.init(plan)
    for batch in tiny.batches():
        _, state = observing(state, model.params, batch)
    assert collected.plan == plan
    assert collected.batches == 3
    assert_same_bits(collected.state, state)


def test_a_model_with_several_inputs_takes_tuples():
    def f(params, x, scales):
        return (x * scales["by"]) @ params["w"]

    model = Model(f, {"w": jnp.ones((4, 2))})
    rows = tiny.draws("normal", 10, 4)
    data = [(rows, {"by": np.full((10, 1), 3.0, np.float32)})]
    state = collect(model, batched(data, rows=4), POLICY).state
    assert float(state["w"]["activation"].extremes.high[0, 0]) == 3.0 * rows.max()


def test_models_of_flax_are_a_pair_of_apply_and_variables():
    case = cnn()
    collected = collect(Model(case.f, case.params), [(case.x,), (2 * case.x,)], POLICY)
    assert len(collected.plan.quantized) == 3
    assert collected.batches == 2


def test_integers_are_inputs_too():
    model = Model(lambda p, i: p["table"][i] @ p["w"], {"table": jnp.eye(4), "w": jnp.ones((4, 2))})
    assert collect(model, batched([np.array([0, 3])]), POLICY).batches == 1


def test_float64_data_is_observed_in_float32():
    state = collect(tiny.model(), batched(tiny.array.astype(np.float64)), POLICY).state
    assert float(state["first"]["activation"].extremes.high[0, 0]) == tiny.array.max()


def test_progress_is_told_of_each_batch():
    steps = []
    collect(tiny.model(), batched(tiny.batches()), POLICY, on_batch=steps.append)
    assert steps == [1, 1, 1]


def test_batches_stay_as_they_are_and_an_array_is_cut():
    assert shapes(tiny.batches()) == [((24, 6),)] * 3
    assert shapes(tiny.array) == [((64, 6),), ((8, 6),)]
    assert shapes(jnp.asarray(tiny.array), rows=30) == [((30, 6),), ((30, 6),), ((12, 6),)]
    assert shapes(tiny.batches(), rows=24) == [((24, 6),)] * 3
    assert shapes([tiny.array], rows=36) == [((36, 6),)] * 2


def test_rows_of_all_arguments_are_cut_alike():
    data = [({"x": np.zeros((5, 2)), "n": np.arange(5)}, np.float32(3.0))]
    assert shapes(data, rows=3) == [
        ({"x": (3, 2), "n": (3,)}, ()),
        ({"x": (2, 2), "n": (2,)}, ()),
    ]
    assert [int(batch[0]["n"][0]) for batch in batched(data, rows=3)] == [0, 3]


def test_a_generator_that_never_ends_is_taken_from_as_often_as_asked():
    assert shapes(tiny.infinitely_many(), most=2) == [((24, 6),)] * 2
    assert shapes(tiny.infinitely_many(), rows=10, most=4) == [((n, 6),) for n in (10, 10, 4, 10)]
    assert shapes(tiny.batches(), most=7) == [((24, 6),)] * 3


def test_data_is_not_read_ahead():
    taken = []
    source = (taken.append(1) or batch for batch in tiny.batches())
    next(batched(source))
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny.nothing, "the data has no batch"),
        (tiny.without_rows, "a batch is empty\n  where: batch 1, array 0 of shape 0x6"),
        (tiny.with_nan, "values of a batch are NaN or infinite\n  where: batch 2, array 0"),
        (tiny.narrower, "a batch is not like the first one\n  where: batch 2"),
        (tiny.strings, "a batch holds something else than arrays of numbers\n  where: batch 1"),
        (lambda: [()], "a batch has no array\n  where: batch 1"),
        (lambda: [tiny.array, (tiny.array, tiny.array)], "it has float32 72x6, float32 72x6"),
        (lambda: [tiny.array, tiny.array.astype(np.int32)], "it has int32 72x6"),
        (lambda: [np.int64([1, 2**33, 5])], "1 integers of a batch do not fit int32"),
        (lambda: [np.float32(np.inf) * np.abs(tiny.array)], "432 values of a batch"),
        (lambda: [np.complex64([1.0, np.nan, 1j * np.inf])], "2 values of a batch"),
    ],
)
def test_mistakes_in_the_data(data, message):
    with pytest.raises(errors.DataError) as caught:
        collect(tiny.model(), batched(data()), POLICY)
    assert message in str(caught.value)
    assert "try:" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "0 rows in a batch are asked for"),
        ({"most": -1}, "-1 batches are asked for"),
        ({"data": 3.5}, "float is no data"),
        ({"data": {"x": tiny.array}}, "a dictionary is one batch"),
    ],
)
def test_what_cannot_be_cut_into_batches(options, message):
    with pytest.raises(errors.DataError) as caught:
        batched(**{"data": tiny.batches(), **options})
    assert message in str(caught.value)


def fails(error):
    def f(params, x):
        raise error

    return Model(f, {})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (tiny.branching(), tiny.batches, "the model cannot be traced\n  where: batch 1: float32"),
        (tiny.branching(), tiny.batches, "why:   TracerBoolConversionError: Attempted boolean"),
        (Model(lambda p, x: x[: int(x[0, 0])], {}), tiny.batches, "cannot be traced"),
        (Model(lambda p, x: np.asarray(x), {}), tiny.batches, "cannot be traced"),
        (tiny.model(), tiny.too_narrow, "does not run on a batch\n  where: batch 1: float32 24x5"),
        (tiny.model(), tiny.too_narrow, "TypeError: dot_general requires contracting dimensions"),
        (Model(lambda p, x, y: x, {}), tiny.batches, "missing 1 required positional argument"),
        (Model(cnn().f, cnn().params), tiny.batches, "does not run"),
        (Model(tiny.apply, {}), tiny.batches, "why:   KeyError: 'first'"),
        (fails(AssertionError()), tiny.batches, "why:   AssertionError: no message"),
    ],
)
def test_models_that_do_not_run(model, data, message):
    with pytest.raises(errors.ModelError) as caught:
        collect(model, batched(data()), POLICY)
    assert message in str(caught.value)
    assert "try:" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_later_batch_that_the_model_does_not_take():
    def f(params, x):
        return x.reshape(-1, 2, 6).sum(1) @ params["first"]

    model = Model(f, tiny.params())
    with pytest.raises(errors.ModelError, match="does not run") as caught:
        collect(model, [(tiny.array[:4],), (tiny.array[:5],)], POLICY)
    assert "batch 2: float32 5x6" in str(caught.value)


def test_our_own_errors_pass_as_they_are():
    nowhere = qj.Policy([qj.rule(qj.path("third"), qj.Scheme(weights=qj.weight_quantizer()))])
    with pytest.raises(errors.PolicyError, match="matches no site"):
        collect(tiny.model(), batched(tiny.batches()), nowhere)


def test_an_interrupt_is_no_fault_of_the_model():
    with pytest.raises(KeyboardInterrupt):
        collect(fails(KeyboardInterrupt()), batched(tiny.batches()), POLICY)


def test_a_mask_of_minus_infinity_is_an_input_like_others():
    def attend(params, x, mask):
        return jax.nn.softmax(x @ params["w"] + mask) @ params["v"]

    model = Model(attend, {"w": jnp.ones((6, 5)), "v": jnp.ones((5, 3))})
    mask = np.where(np.tri(24, 5) > 0, 0.0, -np.inf).astype(np.float32)
    collected = collect(model, batched([(x, mask) for x in tiny.batches()]), POLICY)
    assert collected.batches == 3
    assert np.isfinite(collected.state["v"]["activation"].extremes.high).all()
    wrong = collect(tiny.model(), batched([np.float32(-np.inf) * np.abs(tiny.array)]), POLICY)
    with pytest.raises(errors.DataError, match="an observed activation is NaN or infinite"):
        calibration_report(wrong.plan, wrong.state, tiny.params(), rules=[qj.ranges.MIN_MAX])
