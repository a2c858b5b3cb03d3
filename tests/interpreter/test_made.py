"""Matrices that a function makes of nothing are no weights: nobody learned or stores them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import SiteStatus
from tests.models import assert_same_bits, normal

pytestmark = pytest.mark.thinned(3)

IMAGE = normal(0, 1, 4, 4, 2)
ROWS = IMAGE.reshape(16, 2)
TABLE = normal(1, 2, 3)
SHORT = normal(2, 2)


def resized(method):
    return lambda p, x: jax.image.resize(x, (1, 8, 6, 2), method)


def patches(p, x):
    return lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def in_a_loop(p, x):
    def body(carry, _):
        return jnp.tril(jnp.ones((4, 4))) @ carry, None

    return lax.scan(body, x[0, :, :, 0], length=3)[0]


MADE = {
    "bilinear": (resized("bilinear"), IMAGE),
    "cubic": (resized("cubic"), IMAGE),
    "smaller": (lambda p, x: jax.image.resize(x, (1, 2, 2, 2), "linear"), IMAGE),
    "patches": (patches, IMAGE),
    "ones": (lambda p, x: x @ jnp.ones((2, 3)), ROWS),
    "running sum": (in_a_loop, IMAGE),
    "vmapped": (jax.vmap(lambda p, x: x @ jnp.eye(2, 3), (None, 0)), IMAGE),
    "remat": (jax.checkpoint(lambda p, x: x @ jnp.eye(2, 3)), ROWS),
    "by a counter": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: c @ (jnp.eye(2) * i), x),
        ROWS,
    ),
    "one for each step": (
        lambda p, x: lax.scan(lambda c, m: (c @ m, None), x, jnp.ones((3, 2, 2)) / 3.0)[0],
        ROWS,
    ),
    "carried": (
        lambda p, x: lax.scan(
            lambda c, _: ((c[0] @ c[1], c[1] * 0.5), None), (x, jnp.eye(2)), length=3
        )[0][0],
        ROWS,
    ),
    "scales in a vector": (
        lambda p, x: jax.image.scale_and_translate(
            x, (1, 8, 8, 2), (1, 2), jnp.array([2.0, 2.0]), jnp.zeros(2), "linear"
        ),
        IMAGE,
    ),
    "gradient": (jax.grad(lambda p, x: jnp.sum(resized("linear")(p, x) ** 2), 1), IMAGE),
}
WEIGHTS = {
    "closed over": (lambda p, x: x @ TABLE, ROWS),
    "computed from it": (lambda p, x: x @ (jnp.eye(2) @ TABLE + 1.0), ROWS),
    "drawn": (lambda p, x: x @ jax.random.normal(jax.random.key(0), (2, 3)), ROWS),
    "drawn by an old key": (
        lambda p, x: x @ jax.random.uniform(jax.random.PRNGKey(0), (2, 3)),
        ROWS,
    ),
    "drawn by lax": (lambda p, x: x @ lax.rng_uniform(0.0, 1.0, (2, 3)), ROWS),
    "from a callback": (
        lambda p, x: (
            x @ jax.pure_callback(lambda: TABLE, jax.ShapeDtypeStruct((2, 3), jnp.float32))
        ),
        ROWS,
    ),
    "a short vector": (lambda p, x: x @ SHORT, ROWS),
    "carried, and changed by an array": (
        lambda p, x: lax.scan(
            lambda c, _: ((c[0] @ c[1], c[1] + TABLE[:, :2]), None), (x, jnp.eye(2)), length=2
        )[0][0],
        ROWS,
    ),
    "of a parameter": (lambda p, x: x @ (p["s"] * jnp.eye(2, 3)), ROWS),
}
PARAMS = {"s": jnp.float32(0.5)}


@pytest.mark.parametrize("name", MADE)
def test_they_stay_in_float_under_every_policy(name):
    f, x = MADE[name]
    table = qj.sites(f, PARAMS, x)
    assert len(table.sites)
    for site in table:
        assert site.weight is None
        if site.status is SiteStatus.OPAQUE:
            assert "makes one operand itself" in site.reason
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=2), activations=qj.activation_quantizer(bits=2)
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), scheme, optional=True)]), table)
    assert not plan.quantized
    assert_same_bits(jax.jit(qj.fake_quantize(f, plan))({}, PARAMS, x), jax.jit(f)(PARAMS, x))


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_holds_numbers_of_its_own_is_a_weight(name):
    f, x = WEIGHTS[name]
    (site,) = [s for s in qj.sites(f, PARAMS, x) if s.status is SiteStatus.REWRITABLE]
    assert site.weight is not None


def test_the_first_and_the_last_layer_are_those_of_the_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jax.image.resize(x, (1, 8, 8, 2), "bilinear")
            x = nn.relu(nn.Conv(3, (3, 3), name="enter")(x))
            x = nn.relu(nn.Conv(3, (3, 3), name="inside")(x))
            x = nn.Conv(2, (1, 1), name="leave")(x)
            return jax.image.resize(x, (1, 16, 16, 2), "bilinear")

    model = Net()
    params = model.init(jax.random.key(0), IMAGE)
    plan = qj.plan(
        qj.presets.first_last_8bit(qj.presets.w4a8()), qj.sites(model.apply, params, IMAGE)
    )
    _, state = qj.observe(model.apply, plan)(qj.init(plan), params, IMAGE)
    qstate = qj.calibrate(plan, state, params)
    widths = {name.split("/")[1]: float(site["weight"].bits) for name, site in qstate.items()}
    assert widths == {"enter": 8.0, "inside": 4.0, "leave": 8.0}
    frozen = qj.freeze(plan, qstate, params)
    assert_same_bits(
        jax.jit(qj.execute(model.apply, plan))(qstate, frozen, IMAGE),
        jax.jit(qj.fake_quantize(model.apply, plan))(qstate, params, IMAGE),
    )


def test_a_constant_image_stays_constant():
    """What a matrix with rounded entries would darken."""
    f = lambda p, x: resized("bilinear")(p, x) @ p["k"]  # noqa: E731
    params, x = {"k": jnp.eye(2)}, jnp.ones((1, 4, 4, 2))
    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=None), qj.sites(f, params, x))
    (name,) = (entry.site.name for entry in plan.quantized)
    assert name == "k"
    qstate = qj.calibrate(plan, {}, params)
    y = qj.fake_quantize(f, plan)(qstate, params, x)
    np.testing.assert_allclose(y, 127 / 128, rtol=1e-6)
