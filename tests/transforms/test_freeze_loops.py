"""A weight that loops and branches hand on as a float is used in float, and is not frozen."""

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
