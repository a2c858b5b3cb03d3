"""Values of parameters without JAX are those of JAX, and the channels of a product are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax.folding.chains import NotPerChannelError, per_channel
from quantjax.folding.channels import channels_of_result, compressed, kernel_place, place_of
from quantjax.folding.recompute import UnreadableError, recompute
from quantjax.interpreter import leaves_by_path, trace
from quantjax.interpreter.product import product_of
from tests import models

FUNCTIONS = {
    "arithmetic": lambda p: (p["a"] + 2.0) * p["b"] / (p["a"] - p["b"] ** 2 - 7.0),
    "roots": lambda p: jax.lax.rsqrt(p["a"] + 1e-3) + jnp.sqrt(p["b"]) - p["a"] ** -0.5,
    "powers": lambda p: jnp.power(p["a"], 1.5) + p["b"] ** 3 - jnp.square(p["a"]),
    "exponentials": lambda p: jnp.exp(-p["a"]) + jnp.log(p["b"]) + jnp.abs(p["a"] - p["b"]),
    "extremes": lambda p: jnp.maximum(p["a"], p["b"]) - jnp.minimum(p["a"], 0.5),
    "choice": lambda p: jnp.where(p["a"] > p["b"], p["a"], 2.0 * p["b"]),
    "comparisons": lambda p: jnp.where((p["a"] <= 1.0) != (p["b"] >= 1.0), p["a"], 0.0),
    "moves": lambda p: jnp.flip(p["a"].T.reshape(2, 6), 1)[:, 1:5:2] + p["b"][0, :2],
    "broadcast": lambda p: jnp.broadcast_to(p["a"][:, None], (3, 2, 4)) * p["b"][0],
    "casts": lambda p: p["a"].astype(jnp.bfloat16).astype(jnp.float32) + p["b"],
    "parts": lambda p: (
        jnp.split(p["a"], [1, 3], axis=1)[1] * jnp.unstack(p["b"], axis=1)[2][:, None]
    ),
    "stacked": lambda p: jnp.stack([p["a"], 2.0 * p["b"]], axis=1),
    "jitted": lambda p: jax.jit(lambda a: a * 2.0)(p["a"]) + jnp.squeeze(p["b"][None], 0),
}


def origin_of(function, params):
    """Where ``function(params)`` comes from, as the weight of a product."""
    size = jax.eval_shape(function, params).size

    def f(params, x):
        with jax.numpy_rank_promotion("allow"):
            return x @ function(params).reshape(size, 1)

    program = trace(f, params, jnp.ones((1, size)))
    (origin,) = program.weights.values()
    return origin


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_as_jax(name):
    function = FUNCTIONS[name]
    params = {"a": jnp.abs(models.normal(0, 3, 4)) + 0.1, "b": jnp.abs(models.normal(1, 3, 4))}
    with jax.numpy_rank_promotion("allow"):
        expected = function(params)
        origin = origin_of(function, params)
    leaves = {path: np.float64(leaf) for path, leaf in leaves_by_path(params).items()}
    tolerance = 1e-2 if name == "casts" else 1e-5  # casts do not round here
    found = recompute(origin, leaves, {})
    assert_allclose(found.ravel(), np.ravel(expected), rtol=tolerance, atol=tolerance)


def test_what_cannot_be_read_is_named():
    origin = origin_of(lambda p: jnp.cumsum(p["a"], axis=0), {"a": models.normal(0, 3, 4)})
    with pytest.raises(UnreadableError, match="cumsum"):
        recompute(origin, {"a": np.ones((3, 4))}, {})


def test_the_step_of_a_scan():
    def f(params, x):
        return jax.lax.scan(lambda x, w: (x @ (2.0 * w), None), x, params["w"])[0]

    params = {"w": models.normal(0, 3, 4, 4)}
    program = trace(f, params, jnp.ones((1, 4)))
    (origin,) = program.weights.values()
    (loop,) = origin.loops
    for step in range(3):
        found = recompute(origin, {"w": np.float64(params["w"])}, {loop.location: step})
        assert_allclose(found, 2.0 * np.float64(params["w"][step]))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    channel=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_entries_of_channels(shape, channel, seed):
    """A vector along one axis is found again; where one entry is another it is refused."""
    axis = channel % len(shape)
    own = [n if a == axis else 1 for a, n in enumerate(shape)]
    draw = np.random.default_rng(seed)
    vector = draw.permutation(shape[axis]).astype(np.float64)
    numbers = np.broadcast_to(np.arange(shape[axis]).reshape(own), shape)
    small, full = vector.reshape(own), np.broadcast_to(vector.reshape(own), shape)
    assert compressed(numbers).size <= max(shape[axis], 1)
    for value in (small, full, full.copy()):
        assert_array_equal(per_channel(value, numbers, shape[axis]), vector)
    if full.size > shape[axis]:
        other = full.copy()
        other.flat[draw.integers(full.size)] += 0.5
        with pytest.raises(NotPerChannelError):
            per_channel(other, numbers, shape[axis])


@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [
        ("ni,io->no", (2, 3), (3, 4)),
        ("io,ni->no", (2, 3), (3, 4)),
        ("ngi,gio->ngo", (2, 3, 4), (3, 4, 5)),
        ("nhi,hio->nho", (2, 3, 4), (3, 4, 5)),
        ("ni,hio->nho", (2, 4), (3, 4, 5)),
    ],
)
def test_channels_of_products(equation, x, kernel):
    """A kernel that holds the number of its channel, over what is contracted, returns it."""
    left = equation.startswith("io")

    def f(params, x):
        pair = (params["w"], x) if left else (x, params["w"])
        return jnp.einsum(equation, *pair)

    def product(params, x):
        program = trace(f, params, x)
        (site,) = program.sites.values()
        eqns = (eqn for eqn in program.jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general")
        return site, product_of(next(eqns)), program.weights[site.name]

    inputs = jnp.ones(x)
    site, found, origin = product({"w": jnp.ones(kernel)}, inputs)
    side = site.weight.side
    place = kernel_place("w", kernel, origin, found, side)
    numbers = np.reshape(place.channels, place.shape)
    filled = jnp.asarray(np.broadcast_to(numbers, kernel), jnp.float32)
    contracted = site.contraction_size
    (raw,) = qj.tap(f, qj.everything())({"w": filled}, inputs).values()
    assert_allclose(raw / contracted, channels_of_result(found, side))
    assert sorted(place.channels) == list(range(len(place.channels)))


def test_places_are_as_small_as_they_can_be():
    assert place_of("w", np.array([[0, 1], [0, 1]])).shape == (1, 2)
    assert place_of("w", np.array([[0, 1], [2, 3]])).shape == (2, 2)
    assert place_of("w", np.zeros((2, 3), np.int64)).shape == (1, 1)
    assert place_of("w", np.array([[0, 1], [0, 1]])).axes == (1,)
