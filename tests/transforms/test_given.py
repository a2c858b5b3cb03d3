"""Keywords of verbs that are the model's own as well, and arguments that are no qstate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors, storage
from quantjax.calibration import calibration_report
from tests.models import normal
from tests.refused import refused

PARAMS, X, KEY = {"w": normal(0, 6, 4)}, normal(1, 5, 6), jax.random.key(3)


def dropped(params, x, key=None, where=None):
    """A model with a key and a mask of its own."""
    y = x @ params["w"]
    y = y if key is None else jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0.0)
    return y if where is None else jnp.where(where[:, None], y, 0.0)


def ready(policy):
    plan = qj.plan(policy, qj.sites(dropped, PARAMS, X))
    _, state = qj.observe(dropped, plan)(qj.init(plan), PARAMS, X)
    return plan, qj.calibrate(plan, state, PARAMS)


def test_a_key_of_the_model_is_an_input():
    """As ``key=`` it was the verb's, which drew nothing, and the model ran without dropout."""
    plan, qstate = ready(qj.uniform_policy())
    frozen = qj.freeze(plan, qstate, PARAMS)
    for verb, params in (
        (qj.fake_quantize, PARAMS),
        (qj.execute, frozen),
        (qj.compare, PARAMS),
    ):
        with refused(errors.ArgumentError, "key= is the verb's own", "by position"):
            verb(dropped, plan)(qstate, params, X, key=KEY)
    run = qj.fake_quantize(dropped, plan)
    assert (np.asarray(run(qstate, PARAMS, X, KEY)) == 0.0).mean() > 0.2
    assert (np.asarray(run(qstate, PARAMS, X)) == 0.0).mean() < 0.2


def test_where_and_a_mask_of_the_model_are_two():
    plan, _ = ready(qj.uniform_policy())
    mask = jnp.arange(5) < 2
    with refused(errors.ArgumentError, "where= is the verb's own"):
        qj.observe(dropped, plan)(qj.init(plan), PARAMS, X, where=mask)
    own = lambda p, x, mask: dropped(p, x, where=mask)  # noqa: E731
    y, state = qj.observe(own, plan)(qj.init(plan), PARAMS, X, mask, where=mask)
    assert not np.any(y[2:])
    assert state["w"]["activation"].extremes.high.max() == X[:2].max()


def test_a_key_for_both_is_given_twice():
    scheme = qj.Scheme(weights=qj.weight_quantizer(rounding=qj.rounding.STOCHASTIC))
    plan, qstate = ready(qj.Policy([qj.rule(qj.weighted(), scheme)]))
    run = qj.fake_quantize(dropped, plan)
    found = run(qstate, PARAMS, X, KEY, key=KEY)
    assert (np.asarray(found) == 0.0).mean() > 0.2
    with refused(errors.ArgumentError, "key= is the verb's own"):
        run(qstate, PARAMS, X, key=KEY)


def test_a_loop_may_always_hand_a_key_on():
    """To plans that draw and plans that do not, of a model that has none."""
    f = lambda p, x: x @ p["w"]  # noqa: E731
    plan, qstate = ready(qj.uniform_policy())
    run = qj.fake_quantize(f, plan)
    assert_array_equal(run(qstate, PARAMS, X, key=KEY), run(qstate, PARAMS, X))


def test_what_is_no_qstate_is_refused(tmp_path):
    plan, qstate = ready(qj.uniform_policy())
    with refused(errors.ArgumentError, "qstate is a Plan", "qj.check"):
        qj.check(plan)
    table = qj.sites(dropped, PARAMS, X)
    storage.save_quantization(tmp_path / "q.json", plan=plan, qstate=qstate)
    saved = storage.load_quantization(tmp_path / "q.json")
    assert storage.plan_from(saved, table) == plan
    with refused(errors.ArgumentError, "quantization is a str", "load_quantization"):
        storage.plan_from("q.json", table)
    with refused(errors.ArgumentError, "table is a Plan"):
        storage.plan_from(saved, plan)


@functools.wraps(dropped)
def bound(params, x):
    """Its own signature has no key any more."""
    return dropped(params, x, key=KEY)


BOUND = {
    "partial": functools.partial(dropped, key=KEY),
    "jitted": jax.jit(functools.partial(dropped, key=KEY)),
    "lambda": lambda p, x: dropped(p, x, key=KEY),
    "wraps": bound,
}


@pytest.mark.parametrize("name", BOUND)
def test_what_is_bound_already_is_the_model_s(name):
    """A verb may get a key of its own beside it."""
    scheme = qj.Scheme(weights=qj.weight_quantizer(rounding=qj.rounding.STOCHASTIC))
    plan, qstate = ready(qj.Policy([qj.rule(qj.weighted(), scheme)]))
    y = qj.fake_quantize(BOUND[name], plan)(qstate, PARAMS, X, key=KEY)
    assert (np.asarray(y) == 0.0).mean() > 0.2


def test_a_mask_that_is_bound_already_is_the_model_s():
    plan, _ = ready(qj.uniform_policy())
    masked = functools.partial(dropped, where=jnp.arange(5) < 2)
    y, state = qj.observe(masked, plan)(qj.init(plan), PARAMS, X, where=jnp.arange(5) < 4)
    assert not np.any(y[2:])
    assert state["w"]["activation"].extremes.high.max() == X[:4].max()


def test_a_jitted_model_with_a_key_of_its_own_is_seen():
    plan, qstate = ready(qj.uniform_policy())
    with refused(errors.ArgumentError, "key= is the verb's own"):
        qj.fake_quantize(jax.jit(dropped), plan)(qstate, PARAMS, X, key=KEY)


def test_parameters_in_the_place_of_what_comes_ahead_of_them_are_told_where_they_belong():
    """Forgotten, or the wrong way round; "plan again" had the same error again."""
    plan, qstate = ready(qj.uniform_policy())
    state, frozen = qj.init(plan), qj.freeze(plan, qstate, PARAMS)
    verbs = {
        qj.fake_quantize: (qstate, PARAMS),
        qj.execute: (qstate, frozen),
        qj.compare: (qstate, PARAMS),
        qj.observe: (state, PARAMS),
    }
    for verb, (ahead, params) in verbs.items():
        call = f"qj.{verb.__name__}(f, plan)({'state' if verb is qj.observe else 'qstate'}, "
        for given in ((PARAMS, ahead, X), (PARAMS, X)):
            with refused(errors.ArgumentError, "one place too early", "parameter w", call):
                verb(dropped, plan)(*given)
        verb(dropped, plan)(ahead, params, X)
    for function, ahead in (
        (qj.calibrate, state),
        (qj.freeze, qstate),
        (calibration_report, state),
    ):
        call = f"{function.__name__}(plan, "
        with refused(errors.ArgumentError, "one place too early", call):
            function(plan, PARAMS, ahead)
    with refused(errors.PlanMismatchError, "not the parameter tree", "plan again"):
        qj.fake_quantize(dropped, plan)(qstate, {"v": PARAMS["w"]}, X)
