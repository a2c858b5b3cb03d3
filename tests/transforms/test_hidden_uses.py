"""Uses of a weight in float that are hard to see: by loops and branches, by indices that are
parameters, in another program than the planned one; and what a trace hides when it is frozen."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from tests.models import normal
from tests.refused import refused

PARAMS = {"w": normal(0, 6, 6), "u": normal(1, 6, 6)}
X = normal(2, 4, 6)
W4 = qj.uniform_policy(weight_bits=4, activation_bits=None)


def planned(f, params, x=X) -> qj.Plan:
    return qj.plan(W4, qj.sites(f, params, x))


def decoded(p, x):
    """A greedy decoder: the row of the first token is the carry, later ones are looked up."""

    def step(row, _):
        logits = jnp.tanh(row @ p["w"] + x[0]) @ p["u"].T
        return p["u"][jnp.argmax(logits)], logits

    return lax.scan(step, p["u"][0], None, length=3)[1]


def beside(use):
    """A product of the weight, and another use of it."""
    return lambda p, x: x @ p["w"] + jnp.sum(use(p["w"], p, x))


HANDED_ON = {
    "carry that shrinks": beside(lambda w, p, x: lax.fori_loop(0, 3, lambda i, c: c * 0.9, w)),
    "carry of a scan": beside(lambda w, p, x: lax.scan(lambda c, t: (c + t.sum(), None), w, x)[0]),
    "a row as carry": lambda p, x: lax.scan(
        lambda h, t: (jnp.tanh(t @ p["w"] + h), None), p["w"][0], x
    )[0],
    "results of all steps": beside(
        lambda w, p, x: lax.scan(lambda c, t: (c, c), w, None, length=2)[1]
    ),
    "a constant as result": beside(
        lambda w, p, x: lax.scan(lambda c, t: (c + t.sum(), w), 0.0, x)[1]
    ),
    "rows one step late": beside(lambda w, p, x: lax.scan(lambda c, r: (r, c), x[0], w)[1]),
    "the last row": beside(lambda w, p, x: lax.scan(lambda c, r: (r, None), x[0], w)[0]),
    "carry of a while": beside(
        lambda w, p, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, w), (0, 0.0 * w))[1]
    ),
    "one branch": beside(lambda w, p, x: lax.cond(x.sum() > 0, lambda: w, lambda: p["u"])),
    "one branch of zeros": beside(
        lambda w, p, x: lax.cond(x.sum() > 0, lambda: w, lambda: jnp.zeros((6, 6)))
    ),
    "a branch in a scan": lambda p, x: lax.scan(
        lambda h, t: (lax.cond(t.sum() > 0, lambda: h @ p["w"], lambda: p["w"][0]), None), x[0], x
    )[0],
    "fast weights": lambda p, x: lax.scan(
        lambda w, t: (w + 0.1 * jnp.outer(t @ p["w"], t), t @ w), p["w"], x
    )[1],
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_a_loop_or_a_branch_hands_on_is_used_in_float(name):
    plan = planned(HANDED_ON[name], PARAMS)
    qstate = qj.calibrate(plan, {}, PARAMS)
    with refused(errors.FreezeError, "the parameter w is used in float as well", "also used by"):
        qj.freeze(plan, qstate, PARAMS)


def test_the_first_row_of_a_decoder_is_used_in_float():
    plan = planned(decoded, PARAMS)
    with refused(errors.FreezeError, "the parameter u is used in float as well", "scan"):
        qj.freeze(plan, qj.calibrate(plan, {}, PARAMS), PARAMS)


LAYERS = {"s": normal(3, 3, 6, 6) * 0.5, "n": normal(4, 1, 3, 6, 6) * 0.5, "w": PARAMS["w"]}
KEPT = {
    "s": lambda p, x: lax.scan(lambda h, q: (jnp.tanh(h @ q), h.sum()), x, p["s"])[0],
    "n": lambda p, x: lax.scan(  # nested
        lambda h, q: (lax.scan(lambda h, r: (jnp.tanh(h @ r), None), h, q)[0], None), x, p["n"]
    )[0],
    "w, a carry that stays": lambda p, x: lax.scan(
        lambda c, t: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"], x), None, length=3
    )[0][1],
    "w, in a while": lambda p, x: lax.while_loop(
        lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)
    )[1],
    "w, handed out as it came in": lambda p, x: (
        x @ lax.scan(lambda h, q: (h + x.sum(), q), 0.0, p["w"])[1]
    ),
    "w, from both branches": lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_weight_that_loops_leave_as_it_is_is_frozen(name):
    f, path = KEPT[name], name[0]
    plan = planned(f, LAYERS)
    qstate = qj.calibrate(plan, {}, LAYERS)
    frozen = qj.freeze(plan, qstate, LAYERS)
    assert isinstance(frozen[path], qj.QTensor)
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, LAYERS, X)
    got = jax.jit(qj.execute(f, plan))(qstate, frozen, X)
    assert jnp.allclose(got, want, rtol=1e-6, atol=1e-6)


def by_index(p, x):
    return x @ p["w"] + p["w"][p["i"]][None]


def by_slice(p, x):
    return x @ p["w"] + lax.dynamic_slice(p["w"], (p["i"], 0), (1, 6))


@pytest.mark.parametrize("f", [by_index, by_slice])
@pytest.mark.parametrize("index", ["i", "z"], ids=["sorted ahead", "sorted behind"])
def test_entries_that_a_parameter_chooses_are_those_of_the_weight(f, index):
    """Both paths flow in; the weight is the one that is used in float."""
    params = {index: jnp.int32(2), "w": PARAMS["w"]}
    g = lambda p, x: f({"i": p[index], "w": p["w"]}, x)  # noqa: E731
    plan = planned(g, params)
    assert "w" in plan.others
    with refused(errors.FreezeError, "the parameter w is used in float as well"):
        qj.freeze(plan, qj.calibrate(plan, {}, params), params)


def test_a_site_is_named_by_its_weight_and_not_by_what_chooses_from_it():
    params = {"i": jnp.int32(1), "s": normal(3, 3, 6, 6)}
    table = qj.sites(lambda p, x: x @ p["s"][p["i"]], params, X)
    assert [site.name for site in table] == ["s"]


def test_a_use_in_float_that_only_another_batch_has():
    f = lambda p, x: x @ p["w"] + (p["w"][:1] if len(x) > 4 else 0.0)  # noqa: E731
    plan = planned(f, PARAMS)
    qstate = qj.calibrate(plan, {}, PARAMS)
    frozen = qj.freeze(plan, qstate, PARAMS)
    qj.execute(f, plan)(qstate, frozen, X)
    with refused(errors.FreezeError, "the parameter w is used in float as well", "program alone"):
        qj.execute(f, plan)(qstate, frozen, normal(4, 8, 6))


def tied(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_scales_of_a_tied_weight_that_a_trace_hides(factor):
    """Eagerly those that differ are refused; under ``jit`` what comes of them is NaN."""
    plan = planned(tied, PARAMS)
    qstate = qj.calibrate(plan, {}, PARAMS)
    other = qstate["w#1"]["weight"]
    qstate["w#1"]["weight"] = other._replace(scale=factor * other.scale)
    frozen = jax.jit(lambda q, p: qj.freeze(plan, q, p))(qstate, PARAMS)
    y = jax.jit(qj.execute(tied, plan))({}, frozen, X)
    assert jnp.isnan(y).all() == (factor != 1.0)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_frozen_scale_that_is_not_the_one_of_a_traced_qstate(factor):
    plan = planned(tied, PARAMS)
    qstate = qj.calibrate(plan, {}, PARAMS)
    frozen = qj.freeze(plan, qstate, PARAMS)
    moved = {
        name: {"weight": site["weight"]._replace(scale=factor * site["weight"].scale)}
        for name, site in qstate.items()
    }
    y = jax.jit(qj.execute(tied, plan))(moved, frozen, X)
    assert jnp.isnan(y).all() == (factor != 1.0)
