"""Frozen parameters in a folder: the same structure, dtypes and bits, or a refusal."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantjax as qj
from quantjax import errors
from quantjax.storage import load_params, save_params
from tests import models
from tests.refused import refused
from tests.storage import cases
from tests.storage.cases import Marked

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "uint4")
FLOATS = ("float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64")
DTYPES = [np.dtype(name) for name in ("bool", *INTEGERS, *FLOATS)]


@st.composite
def arrays(draw):
    """Any bits of any dtype, NumPy or JAX, scalars and empty arrays too."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(cases.shapes)
    count = int(np.prod(shape))
    if dtype.name in ("bool", "int4", "uint4"):  # not every byte is one of their values
        numbers = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        array = np.array(numbers, np.int8).astype(dtype).reshape(shape)
    else:
        size = count * dtype.itemsize
        array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    return jnp.asarray(array) if draw(st.booleans()) else array


@st.composite
def qtensors(draw):
    """Codes of any integer format, with stacked leading axes at times."""
    format = draw(cases.integer_formats | st.builds(Marked, max_bits=st.integers(1, 16)))
    lead = draw(st.sampled_from([(), (2,), (3, 1)]))
    codes = np.arange(int(np.prod(lead)) * 6).reshape(*lead, 2, 3).astype(format.storage_dtype)
    qparams = draw(cases.qparams)
    dtype = draw(st.sampled_from([np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)]))
    return qj.QTensor(jnp.asarray(codes), qparams, format, dtype)


names = st.text(max_size=6)
any_tree = cases.trees(arrays() | qtensors() | cases.qparams, names)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params"


# Laws


@given(any_tree)
@settings(max_examples=40)
def test_trees_come_back_as_they_are(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "params"
    save_params(path, tree)
    cases.assert_loaded(load_params(path, extra=(Marked,)), tree)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(path, dtype):
    tree = [np.ones((2, 3), dtype), np.zeros((), dtype), np.ones((0, 4), dtype)]
    save_params(path, tree)
    cases.assert_loaded(load_params(path), tree)


@pytest.mark.parametrize("bits", cases.SPECIAL_BITS, ids=hex)
def test_special_numbers(path, bits):
    """Checkpoints leave out what equals 0, so that a whole array of -0.0 is a case of its own."""
    tree = {"x": np.full(1000, bits, np.uint32).view(np.float32)}
    save_params(path, tree)
    cases.assert_loaded(load_params(path), tree)


@pytest.mark.parametrize(
    "tree",
    [{}, [], (), None, {"a": {}}, [None, ()], np.ones(2), [jnp.zeros((3, 0))]],
    ids=lambda tree: type(tree).__name__,
)
def test_trees_with_few_arrays_or_none(path, tree):
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    save_params(path, tree)
    back = load_params(path)
    cases.assert_loaded(back, tree)


def test_keys_may_be_whole_numbers(path):
    tree = {"layers": {0: jnp.ones(2), 10: jnp.zeros(2), 2: {"1": jnp.ones(1)}}}
    save_params(path, tree)
    back = load_params(path)
    cases.assert_loaded(back, tree)
    assert list(back["layers"]) == [0, 10, 2]


def test_keys_with_any_text(path):
    tree = {"a/b": {"": jnp.ones(1)}, "a": {"b": jnp.zeros(1)}, "tuple": jnp.ones(3), "é.": None}
    save_params(path, tree)
    cases.assert_loaded(load_params(path), tree)


def test_other_byte_orders_and_strides(path):
    tree = {"big": np.arange(3, dtype=">f4"), "turned": np.arange(6, dtype=np.int8).reshape(2, 3).T}
    save_params(path, tree)
    back = load_params(path)
    np.testing.assert_array_equal(back["big"], tree["big"])
    np.testing.assert_array_equal(back["turned"], tree["turned"])


def test_a_quantized_model(path):
    params = cases.frozen_params()
    save_params(path, params)
    back = load_params(path)
    cases.assert_loaded(back, params)
    models.assert_same_bits(qj.dequantize_params(back), qj.dequantize_params(params))


def test_a_loaded_tree_is_used_under_jit(path):
    case = models.cnn()
    params = cases.frozen_params()
    save_params(path, params)
    back, traces = load_params(path), []

    @jax.jit
    def run(params, x):
        traces.append(1)
        return case.f(qj.dequantize_params(params), x)

    models.assert_same_bits(run(back, case.x), run(params, case.x))
    assert len(traces) == 1  # to jit, both trees are one


def test_stacked_tensors_are_scanned_after_loading(path):
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(4, axis=-2))
    policy = qj.Policy([qj.rule(qj.everything(), qj.Scheme(weights=weights))])
    stacked = jax.vmap(lambda w: qj.quantize_params({"w": w}, policy))(models.normal(0, 3, 8, 8))
    assert stacked["w"].qparams.scale.shape == (3, 2, 8)
    save_params(path, stacked)
    back = load_params(path)
    cases.assert_loaded(back, stacked)

    def layer(x, params):
        return x @ params["w"].dequantize(), None

    x = models.normal(1, 2, 8)
    expected, _ = jax.lax.scan(layer, x, stacked)
    actual, _ = jax.lax.scan(layer, x, back)
    models.assert_same_bits(actual, expected)


def test_what_is_stored_is_as_small_as_the_codes(path):
    params = {
        "w": qj.encode(
            jnp.ones((512, 512)), qj.QParams(*jnp.ones((2, 1, 1)), jnp.float32(8)), qj.integer()
        )
    }
    save_params(path, params)
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < 512 * 512 * 1.5


def test_the_document_beside_the_arrays_is_readable(path):
    save_params(path, {"b": jnp.ones(2, jnp.bfloat16), "a": (jnp.zeros((0, 3)), None)})
    assert cases.document(path / "quantjax.json") == {
        "schema": "quantjax.params",
        "version": 1,
        "tree": {"dict": {"b": {"array": 0}, "a": {"tuple": [{"array": 1}, None]}}},
        "arrays": [{"dtype": "bfloat16", "shape": [2]}, {"dtype": "float32", "shape": [0, 3]}],
    }


# Formats of the user's own


def test_own_formats_have_to_be_given_back(path):
    qparams = qj.QParams(jnp.ones(()), jnp.zeros(()), jnp.float32(4))
    tensor = qj.QTensor(jnp.ones(2, jnp.int8), qparams, Marked(mark="m"), jnp.dtype("float32"))
    save_params(path, {"w": tensor})
    with refused(errors.StorageError, "'Marked' is not known", "params/w.format", "extra="):
        load_params(path)
    assert load_params(path, extra=(Marked,))["w"].format == Marked(mark="m")
