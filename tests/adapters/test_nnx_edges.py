"""Variables of unusual content, and what the adapter refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quantjax.adapters import nnx as qnnx
from quantjax.errors import AdapterError
from tests.adapters.modules import MLP, X, assert_same, loss, names


def test_abstract_modules_have_abstract_arrays():
    f, params, state = qnnx.functional(nnx.eval_shape(MLP))
    assert params["linear1"]["kernel"].shape == (8, 16)
    y, after = jax.eval_shape(f, params, state, X)
    assert y.shape == (6, 4)
    assert jax.tree.structure(after) == jax.tree.structure(state)


class Odd(nnx.Module):
    """Variables that hold something else than one array, and arrays in no variable."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(3))
        self.reference = nnx.Variable(jnp.zeros(3), ref=True)
        self.nothing = nnx.Variable(None)
        self.number = nnx.Variable(2.0)
        self.tree = nnx.Variable({"a": jnp.ones(2), "b": jnp.zeros(1)})
        self.array = jnp.arange(3.0)
        self.sharded = nnx.Param(jnp.ones((2, 3)), out_sharding=None, note="kept")

    def __call__(self, x):
        self.reference[...] = self.reference[...] + x
        self.number.set_value(self.number.get_value() * 2.0)
        self.tree.get_raw_value()["b"] = self.tree.get_raw_value()["b"] + 1
        return x * self.w[...] * self.array


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_variables_of_any_content(wrap):
    f, params, state = qnnx.functional(Odd())
    assert names(state) == ["array", "number", "reference", "tree/a", "tree/b"]
    before = jax.tree.map(jnp.copy, state)
    y, after = wrap(f)(params, state, jnp.ones(3))
    assert_same(state, before)
    np.testing.assert_array_equal(y, [0, 1, 2])
    np.testing.assert_array_equal(after["reference"], [1, 1, 1])
    assert (float(after["number"]), float(after["tree"]["b"][0])) == (4, 1)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (after, state)]
    assert dtypes[0] == dtypes[1]
    assert not after["number"].weak_type
    module = qnnx.restore(qnnx.functional(Odd()), params, after)
    assert module.sharded.get_metadata("note") == "kept"
    assert isinstance(module.sharded, nnx.Param)


def test_what_the_call_writes_to_parameters_is_forgotten():
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    normed = nnx.WeightNorm(layer, rngs=nnx.Rngs(1))
    f, params, state = qnnx.functional(normed)
    gradient = jax.grad(lambda params: loss(f(params, state, X)[0]))(params)
    kernel = params["layer_instance"]["kernel"]
    # Along the raw weight the normed one does not move.
    along = jnp.sum(gradient["layer_instance"]["kernel"] * kernel, axis=0)
    np.testing.assert_allclose(along, jnp.zeros(4), atol=1e-6)


class Lazy(nnx.Module):
    """Makes its cache in the first call."""

    def __call__(self, x):
        if not hasattr(self, "cache"):
            self.cache = nnx.Cache(jnp.zeros_like(x))
        self.cache[...] += x
        return x


class Growing(nnx.Module):
    """Its cache gets longer, or another dtype."""

    def __init__(self, grow):
        self.cache = nnx.Cache(jnp.zeros((1, 8)))
        self.grow = grow

    def __call__(self, x):
        self.cache.set_value(self.grow(self.cache.get_value()))
        return x


def test_variables_that_the_call_creates_are_refused():
    module = Lazy()
    f, params, state = qnnx.functional(module)
    with pytest.raises(AdapterError, match=r"state/cache: absent -> float32\[6, 8\]"):
        jax.jit(f)(params, state, X)
    module(X)
    f, params, state = qnnx.functional(module)
    _, after = f(params, state, X)
    np.testing.assert_array_equal(after["cache"], 2 * X)


@pytest.mark.parametrize(
    ("grow", "change"),
    [
        (lambda c: jnp.concatenate([c, c]), r"float32\[1, 8\] -> float32\[2, 8\]"),
        (lambda c: c.astype(jnp.bfloat16), r"float32\[1, 8\] -> bfloat16\[1, 8\]"),
        (lambda c: {"k": c}, "state/cache/k: absent"),
    ],
)
def test_variables_that_change_their_type_are_refused(grow, change):
    f, params, state = qnnx.functional(Growing(grow))
    with pytest.raises(AdapterError, match=change):
        f(params, state, X)


def test_arrays_of_another_module_are_refused():
    model = qnnx.functional(MLP())
    f, params, state = model
    without = {key: value for key, value in params.items() if key != "norm"}
    with pytest.raises(AdapterError, match=r"absent: \['norm/bias', 'norm/scale'\]"):
        f(without, state, X)
    with pytest.raises(AdapterError, match=r"too many: \['more'\]"):
        f({**params, "more": X}, state, X)
    with pytest.raises(AdapterError, match="structure"):
        qnnx.restore(model, state, params)
