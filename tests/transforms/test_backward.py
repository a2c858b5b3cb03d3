"""Quantized gradients: ``qj.fake_quantize(jax.grad(f), plan)`` sees the backward products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax.interpreter import Role

RNG = np.random.default_rng(8)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


X, Y = normal(16, 6), normal(16, 3)
PARAMS = {"one": normal(6, 8), "two": normal(8, 3)}


def flat(params, x, y):
    h = jnp.tanh(x @ params["one"])
    return jnp.mean((h @ params["two"] - y) ** 2)


def remat(params, x, y):
    h = jax.checkpoint(lambda x: jnp.tanh(x @ params["one"]))(x)
    return jnp.mean((h @ params["two"] - y) ** 2)


def jitted(params, x, y):
    h = jax.jit(lambda w, x: jnp.tanh(x @ w))(params["one"], x)
    return jnp.mean((jax.jit(jnp.matmul)(h, params["two"]) - y) ** 2)


def scanned(params, x, y):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    return jnp.mean((lax.scan(layer, x, params)[0][:, :3] - y) ** 2)


def convolved(params, x, y):
    image = x.reshape(4, 4, 3, 2)
    out = lax.conv_general_dilated(
        image, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.mean((jnp.tanh(out).reshape(16, -1) - y[:, :1]) ** 2)


MODELS = {
    "flat": (flat, PARAMS),
    "remat": (remat, PARAMS),
    "jitted": (jitted, PARAMS),
    "scanned": (scanned, normal(3, 6, 6)),
    "convolved": (convolved, normal(3, 3, 2, 2)),
}
NAMES = pytest.mark.parametrize("name", MODELS)


def roles(site: qj.Site) -> tuple[str, ...]:
    return tuple(operand.role.value for operand in site.operands)


@NAMES
def test_each_weight_has_its_forward_and_its_backward_products(name):
    """Forward x w, backward g x (for w) and g w (for x, where something is behind it)."""
    f, params = MODELS[name]
    table = qj.sites(jax.grad(f), params, X, Y)
    found = [sorted(roles(site)) for site in table if site.status.value == "rewritable"]
    forward, to_w, to_x = (
        ["activation", "weight"],
        ["activation", "gradient"],
        ["gradient", "weight"],
    )
    assert {tuple(pair) for pair in found} <= {tuple(forward), tuple(to_w), tuple(to_x)}
    products = {"flat": (2, 2, 1), "remat": (3, 2, 1), "jitted": (2, 2, 1)}.get(name)
    if products:
        assert tuple(map(found.count, (forward, to_w, to_x))) == products
    else:
        assert found.count(forward) >= 1
        assert found.count(to_w) >= 1


@NAMES
def test_a_model_without_grad_has_no_gradients(name):
    f, params = MODELS[name]
    assert all(Role.GRADIENT.value not in roles(site) for site in qj.sites(f, params, X, Y))


def policy(**quantizers) -> qj.Policy:
    scheme = qj.Scheme(**quantizers)
    return qj.Policy([qj.rule(qj.backward(), scheme)])


def test_gradients_are_what_the_products_of_codes_say():
    """Against a float64 model of both backward products, everything live and to the nearest."""
    per_tensor = {"granularity": qj.PerTensor(), "range": qj.RangeMode.LIVE}
    live = qj.activation_quantizer(bits=5, symmetric=True, range=qj.RangeMode.LIVE)
    plan = qj.plan(
        policy(weights=qj.weight_quantizer(bits=5, **per_tensor), activations=live, gradients=live),
        qj.sites(jax.grad(flat), PARAMS, X, Y),
    )
    assert len(plan.quantized) == 3
    qstate = qj.calibrate(plan, {}, PARAMS)
    got = jax.jit(qj.fake_quantize(jax.grad(flat), plan))(qstate, PARAMS, X, Y)

    def quantized(a):
        scale = np.float64(np.abs(np.float32(a)).max() / np.float32(16))
        return scale * np.clip(np.rint(np.float64(a) / scale), -16, 15)

    w = {name: np.float64(value) for name, value in PARAMS.items()}
    h = np.tanh(np.float64(X) @ w["one"])
    g = 2 * (h @ w["two"] - np.float64(Y)) / Y.size
    to_two = quantized(h).T @ quantized(g)
    back = quantized(g) @ quantized(w["two"]).T * (1 - h**2)
    to_one = quantized(np.float64(X)).T @ quantized(back)
    assert_allclose(got["two"], to_two, rtol=2e-4, atol=2e-5)
    # A code of the second product may go the other way: its operand is float32 in ours.
    assert_allclose(got["one"], to_one, rtol=2e-2, atol=2e-2 * np.abs(to_one).max())


@pytest.mark.thinned(5)
@NAMES
@pytest.mark.parametrize(
    "gradients",
    [qj.gradient_quantizer(), qj.gradient_quantizer(format=qj.formats.E5M2)],
    ids=["int8", "fp8"],
)
def test_stochastic_gradients_have_the_right_mean(name, gradients):
    f, params = MODELS[name]
    gradient = jax.grad(f)
    table = qj.sites(gradient, params, X, Y)
    plan = qj.plan(policy(gradients=gradients), table)
    qstate = qj.calibrate(plan, {}, params)
    run = jax.jit(qj.fake_quantize(gradient, plan))
    draws = jax.lax.map(
        lambda key: run(qstate, params, X, Y, key=key), jax.random.split(jax.random.key(0), 256)
    )
    exact = gradient(params, X, Y)
    pairs = zip(jax.tree.leaves(draws), jax.tree.leaves(exact), strict=True)
    for got, want in (map(np.asarray, pair) for pair in pairs):
        mean, spread = got.mean(axis=0), got.std(axis=0) / 16
        assert np.abs(got - want).max() > 0  # something is rounded
        # Sums of products of two random operands, so the mean of one rounding at most is exact;
        # a chain of layers is off by second order.
        close = np.abs(mean - want) < 5 * spread + 0.01 * np.abs(want).max()
        assert close.all()


def test_randomness_needs_a_key_and_is_its_own_at_each_site():
    gradient = jax.grad(flat)
    plan = qj.plan(policy(gradients=qj.gradient_quantizer()), qj.sites(gradient, PARAMS, X, Y))
    qstate = qj.calibrate(plan, {}, PARAMS)
    run = qj.fake_quantize(gradient, plan)
    with pytest.raises(qj.errors.KeyMissingError):
        run(qstate, PARAMS, X, Y)
    first, again, other = (run(qstate, PARAMS, X, Y, key=jax.random.key(k)) for k in (0, 0, 1))
    assert_array_equal(first["one"], again["one"])
    assert (first["one"] != other["one"]).any()


def test_widths_of_gradients_are_arrays():
    gradient = jax.grad(flat)
    quantizer = qj.activation_quantizer(symmetric=True, range=qj.RangeMode.LIVE)
    plan = qj.plan(policy(gradients=quantizer), qj.sites(gradient, PARAMS, X, Y))
    exact = gradient(PARAMS, X, Y)

    def error(bits):
        qstate = qj.calibrate(plan, {}, PARAMS, gradient_bits=bits)
        got = qj.fake_quantize(gradient, plan)(qstate, PARAMS, X, Y)
        return jnp.sum((got["one"] - exact["one"]) ** 2)

    errors = jax.jit(jax.vmap(error))(jnp.array([0.0, 8.0, 6.0, 4.0, 2.0]))
    assert errors[0] < 1e-10
    assert (np.diff(errors[1:]) > 0).all()


def test_a_width_of_gradients_where_there_are_none_is_refused():
    plan = qj.plan(qj.uniform_policy(), qj.sites(flat, PARAMS, X, Y))
    state = qj.observe(flat, plan)(qj.init(plan), PARAMS, X, Y)[1]
    with pytest.raises(qj.errors.PolicyError, match="gradient"):
        qj.calibrate(plan, state, PARAMS, gradient_bits=4)


def test_ranges_of_gradients_can_be_observed():
    gradient = jax.grad(flat)
    fixed = qj.activation_quantizer(bits=8, symmetric=True)
    plan = qj.plan(policy(gradients=fixed), qj.sites(gradient, PARAMS, X, Y))
    _, state = qj.observe(gradient, plan)(qj.init(plan), PARAMS, X, Y)
    assert {key for operands in state.values() for key in operands} == {"lhs", "gradient"} or {
        key for operands in state.values() for key in operands
    } == {"rhs", "gradient"}
    qstate = qj.calibrate(plan, state, PARAMS)
    got, exact = qj.fake_quantize(gradient, plan)(qstate, PARAMS, X, Y), gradient(PARAMS, X, Y)
    assert_allclose(got["one"], exact["one"], atol=0.02 * np.abs(exact["one"]).max())


def test_training_with_eight_bit_gradients_learns():
    """The whole step in integers: forward, and both backward products."""
    quantized = qj.Scheme(
        weights=qj.weight_quantizer(),
        activations=qj.activation_quantizer(range=qj.RangeMode.LIVE),
        gradients=qj.gradient_quantizer(),
    )
    gradient = jax.value_and_grad(flat)
    table = qj.sites(gradient, PARAMS, X, Y)
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), quantized)]), table)
    assert len(plan.quantized) == 5
    run = jax.jit(qj.fake_quantize(gradient, plan))
    calibrate = jax.jit(lambda params: qj.calibrate(plan, {}, params))
    params, key = PARAMS, jax.random.key(0)
    losses = []
    for step in range(150):
        loss, to_params = run(calibrate(params), params, X, Y, key=jax.random.fold_in(key, step))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, to_params)
        losses.append(float(loss))
    assert losses[-1] < 0.35 * losses[0]


def test_a_policy_for_gradients_without_a_backward_pass_is_refused():
    table = qj.sites(flat, PARAMS, X, Y)
    with pytest.raises(qj.errors.PolicyError, match=r"jax\.grad"):
        qj.plan(qj.uniform_policy(gradient_bits=8), table)
    scheme = qj.Scheme(gradients=qj.gradient_quantizer())
    optional = qj.Policy([qj.rule(qj.weighted(), scheme, optional=True)])
    assert len(qj.plan(optional, table).quantized) == 0


def test_a_cotangent_from_outside_is_known_by_the_weight_that_it_meets():
    def program(params, x, y):
        out, pull = jax.vjp(lambda p: jnp.tanh(x @ p["one"]) @ p["two"], params)
        return pull(out - y)

    table = qj.sites(program, PARAMS, X, Y)
    weighted = [site for site in table if site.weight is not None and "#" in site.name]
    assert [sorted(roles(site)) for site in weighted] == [["gradient", "weight"]]


def test_saved_activations_that_are_moved_are_no_gradients():
    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def loss(params, x, y):
        return jnp.mean((dense(jnp.tanh(dense(x, params["one"])), params["two"]) - y) ** 2)

    table = qj.sites(jax.grad(loss), PARAMS, X, Y)
    backward = [sorted(roles(site)) for site in table if qj.backward().matches(site)]
    assert ["gradient", "gradient"] not in backward
    assert backward.count(["activation", "gradient"]) == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_gradients_have_the_right_mean_at_both_ends(bits):
    """The largest one has a code on either side of zero, and rounding at random has no bias."""

    def f(params, x, cotangent):
        return jnp.sum(cotangent * (x @ params["w"]))

    params, x = {"w": jnp.zeros((2, 3))}, jnp.eye(2)[:1]
    scheme = qj.Scheme(gradients=qj.gradient_quantizer(bits=bits))
    policy, g = qj.Policy([qj.rule(qj.backward(), scheme)]), jax.grad(f)
    plan = qj.plan(policy, qj.sites(g, params, x, jnp.ones((1, 3))))
    qstate = qj.calibrate(plan, qj.init(plan), params)
    quantized = qj.fake_quantize(g, plan)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def draw(key, cotangent):
        return quantized(qstate, params, x, cotangent, key=key)["w"][0]

    keys, step = jax.random.split(jax.random.key(0), 4000), 1.0 / (2 ** (bits - 1) - 1)
    for cotangent in ([[1.0, 0.3, -0.25]], [[-1.0, 0.3, 0.25]]):
        cotangent = jnp.asarray(cotangent)
        found = draw(keys, cotangent)
        assert_allclose(found.mean(0), cotangent[0], atol=5 * 0.5 * step / np.sqrt(4000))
        assert_array_equal(found[:, 0], np.full(4000, cotangent[0, 0]))


def with_forces(params, x):
    force = -jax.grad(lambda x: jnp.sum(jnp.tanh(x @ params["one"])))(x)
    h = jnp.tanh((x + force) @ params["one"])
    return h @ params["two"] + jnp.tanh(force @ params["one"]) @ params["two"]


def test_layers_behind_an_inner_gradient_have_activations():
    """Forces, or a step of training inside: what is computed from gradients is no gradient."""
    table = qj.sites(with_forces, PARAMS, X)
    roles = {site.name: site.operands[0].role for site in table}
    assert [name for name, role in roles.items() if role is Role.GRADIENT] == ["one#1"]
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), table)
    observed = {name for name, kinds in qj.init(plan).items() if "activation" in kinds}
    assert observed == set(roles) - {"one#1"}
