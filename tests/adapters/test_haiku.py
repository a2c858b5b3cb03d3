"""Haiku's transformed functions in one form, through every transformation and verb."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import storage
from quantjax.adapters import haiku as qhaiku
from quantjax.errors import AdapterError
from tests.adapters.modules import names
from tests.models import assert_same_bits, normal

pytestmark = pytest.mark.thinned(2)

X = normal(1, 6, 8)
KEY, OTHER = jax.random.key(0), jax.random.key(1)


@pytest.fixture(autouse=True)
def _haiku_promotes():
    """Its moving averages raise a float32 decay to an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def mlp(x):
    return hk.nets.MLP([16, 4], name="mlp")(x)


def dropped(x):
    """Draws a mask, keeps no state."""
    return hk.Linear(4)(hk.dropout(hk.next_rng_key(), 0.5, jax.nn.relu(hk.Linear(16)(x))))


def normed(x):
    """Batch norm in training mode, and a mask."""
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9, name="norm")
    x = norm(hk.Linear(16, name="one")(x), is_training=True)
    return hk.Linear(4, name="two")(hk.dropout(hk.next_rng_key(), 0.5, x))


def counted(x):
    """State, no key."""
    count = hk.get_state("count", (), jnp.int32, init=jnp.zeros)
    hk.set_state("count", count + 1)
    return hk.Linear(4)(x)


class Form(NamedTuple):
    """A model, its key, and how its own ``apply`` takes ``(params, state, key, x)``."""

    transformed: object
    key: object
    call: object


def forms():
    plain, keyed = hk.transform(mlp), hk.transform(dropped)
    stateful, counting = hk.transform_with_state(normed), hk.transform_with_state(counted)
    bare, bare_state = hk.without_apply_rng(plain), hk.without_apply_rng(counting)
    return {
        "transform": Form(plain, None, lambda p, s, k, x: (plain.apply(p, k, x), {})),
        "keyed": Form(keyed, OTHER, lambda p, s, k, x: (keyed.apply(p, k, x), {})),
        "stateful": Form(stateful, OTHER, stateful.apply),
        "without_rng": Form(bare, None, lambda p, s, k, x: (bare.apply(p, x), {})),
        "stateful_without_rng": Form(
            bare_state, None, lambda p, s, k, x: bare_state.apply(p, s, x)
        ),
    }


FORMS = forms()
ALL = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@ALL
def test_two_calls_are_those_of_apply_bit_for_bit(form, wrap):
    f, params, state = qhaiku.functional(form.transformed, KEY, X)
    ours, theirs = wrap(f), wrap(form.call)
    own = state
    for _ in range(2):
        y, state = ours(params, state, form.key, X)
        want, own = theirs(params, own, form.key, X)
        assert_same_bits((y, state), (want, dict(own)))


@ALL
def test_arrays_are_those_of_init(form):
    f, params, state = qhaiku.functional(form.transformed, KEY, X)
    init = form.transformed.init(KEY, X)
    want = init if isinstance(init, tuple) else (init, {})
    assert_same_bits((params, state), want)
    assert_same_bits(f.init(KEY, X), want)
    assert type(params) is type(state) is dict


@ALL
def test_the_program_holds_no_array_and_changes_no_argument(form):
    f, params, state = qhaiku.functional(form.transformed, KEY, X)
    before = jax.tree.map(jnp.copy, (params, state))
    first = f(params, state, form.key, X)
    assert_same_bits(f(params, state, form.key, X), first)
    assert_same_bits((params, state), before)
    closed = jax.make_jaxpr(f)(params, state, form.key, X)
    assert sum(np.size(const) for const in closed.consts) == 0


def test_names_are_those_of_haiku():
    f, params, state = qhaiku.functional(FORMS["stateful"].transformed, KEY, X)
    assert names(params) == ["norm/offset", "norm/scale", "one/b", "one/w", "two/b", "two/w"]
    assert "norm/~/mean_ema/average" in names(state)
    table = qj.sites(f, params, state, OTHER, X)
    assert [site.name for site in table] == ["one/w", "two/w"]


def test_state_is_the_carry_of_a_scan():
    f, params, state = qhaiku.functional(FORMS["stateful"].transformed, KEY, X)
    xs = normal(4, 3, 6, 8)
    last, ys = jax.jit(
        lambda state: jax.lax.scan(lambda s, x: f(params, s, OTHER, x)[::-1], state, xs)
    )(state)
    for x, y in zip(xs, ys, strict=True):
        want, state = f(params, state, OTHER, x)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    counter = last["norm/~/mean_ema"]["counter"]
    assert int(counter) == int(state["norm/~/mean_ema"]["counter"]) == 3


def test_keys_are_mapped():
    f, params, state = qhaiku.functional(FORMS["keyed"].transformed, KEY, X)
    keys = jax.random.split(OTHER, 3)
    ys, _ = jax.jit(jax.vmap(lambda key: f(params, state, key, X)))(keys)
    for key, y in zip(keys, ys, strict=True):
        np.testing.assert_allclose(y, f(params, state, key, X)[0], rtol=1e-5, atol=1e-6)
    assert jnp.any(ys[0] != ys[1])


def test_quantized_and_in_integers():
    f, params, state = qhaiku.functional(FORMS["without_rng"].transformed, KEY, X)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, state, None, X))
    (y, _), seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, state, None, X)
    qstate = qj.calibrate(plan, seen, params)
    simulated, _ = jax.jit(qj.fake_quantize(f, plan))(qstate, params, state, None, X)
    assert 0 < jnp.linalg.norm(simulated - y) / jnp.linalg.norm(y) < 0.02

    qparams = qj.freeze(plan, qstate, params)
    assert isinstance(qparams["mlp/~/linear_0"]["w"], qj.QTensor)
    executed, after = jax.jit(qj.execute(f, plan))(qstate, qparams, state, None, X)
    assert_same_bits((executed, after), (simulated, {}))


def test_frozen_parameters_go_to_disk_and_come_back(tmp_path):
    f, params, state = qhaiku.functional(FORMS["transform"].transformed, KEY, X)
    plan = qj.plan(qj.uniform_policy(activation_bits=None), qj.sites(f, params, state, None, X))
    qstate = qj.calibrate(plan, {}, params)
    qparams = qj.freeze(plan, qstate, params)
    storage.save_params(tmp_path / "weights", qparams)
    assert_same_bits(storage.load_params(tmp_path / "weights"), qparams)


def test_quantized_training_moves_parameters_and_state():
    f, params, state = qhaiku.functional(FORMS["stateful"].transformed, KEY, X)
    plan = qj.plan(qj.uniform_policy(weight_bits=4), qj.sites(f, params, state, OTHER, X))
    _, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), params, state, OTHER, X)
    quantized = qj.fake_quantize(f, plan)
    qstate, optimizer = qj.calibrate(plan, seen, params), optax.sgd(0.1)

    @jax.jit
    def step(params, state, moments, key):
        def loss(params):
            y, after = quantized(qstate, params, state, key, X)
            return jnp.mean(y**2), after

        (value, after), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), after, moments, value

    moments, values = optimizer.init(params), []
    for i in range(20):
        params, state, moments, value = step(params, state, moments, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert int(state["norm/~/mean_ema"]["counter"]) == 20


def test_one_function_of_several():
    def several():
        one, two = hk.Linear(4, name="one"), hk.Linear(8, name="two")
        return lambda x: two(one(x)), {"encode": one, "decode": two}

    multi = hk.multi_transform(several)
    with pytest.raises(AdapterError, match="not a function transformed by Haiku: MultiTransformed"):
        qhaiku.functional(multi, KEY, X)
    f, params, state = qhaiku.functional(hk.Transformed(multi.init, multi.apply["encode"]), KEY, X)
    assert_same_bits(f(params, state, None, X)[0], multi.apply["encode"](params, None, X))
    assert [site.name for site in qj.sites(f, params, state, None, X)] == ["one/w"]


def test_what_a_model_does_not_take_is_refused():
    f, params, _ = qhaiku.functional(FORMS["transform"].transformed, KEY, X)
    with pytest.raises(AdapterError, match=r"state: \['a/b'\]"):
        f(params, {"a": {"b": X}}, None, X)
    with pytest.raises(AdapterError, match="state are no dict: NoneType"):
        f(params, None, None, X)
    bare, params, _ = qhaiku.functional(FORMS["without_rng"].transformed, KEY, X)
    with pytest.raises(AdapterError, match="takes no key was given one"):
        bare(params, {}, KEY, X)
    with pytest.raises(AdapterError, match="not a function transformed by Haiku: function"):
        qhaiku.functional(mlp, KEY, X)


def test_state_that_the_call_creates_or_changes_is_refused():
    def late(x):
        if not hk.running_init():
            hk.set_state("cache", x)
        return hk.Linear(4)(x)

    f, params, state = qhaiku.functional(hk.transform_with_state(late), KEY, X)
    with pytest.raises(AdapterError, match=r"~/cache: absent -> float32\[6,8\]"):
        f(params, state, None, X)

    def growing(x):
        cache = hk.get_state("cache", (1, 8), init=jnp.zeros)
        hk.set_state("cache", jnp.concatenate([cache, cache]))
        return hk.Linear(4)(x)

    f, params, state = qhaiku.functional(hk.transform_with_state(growing), KEY, X)
    with pytest.raises(AdapterError, match=r"float32\[1,8\] -> float32\[2,8\]"):
        jax.jit(f)(params, state, None, X)


def test_importing_quantjax_or_the_room_loads_no_haiku():
    code = "import quantjax, quantjax.adapters, sys; print('haiku' in sys.modules)"
    root = Path(qj.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "False"
