"""Models and data for calibration: what works, and what each message is about."""

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax.calibration import Model, batched, collect

ROWS, FEATURES, HIDDEN, CLASSES = 24, 6, 8, 3


def draws(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Float32 numbers of a distribution that range rules care about."""
    generator = np.random.default_rng(seed)
    normal = generator.normal(size=shape)
    if kind == "relu":
        normal = np.maximum(normal, 0.0)
    elif kind == "outliers":
        normal = normal * np.where(generator.uniform(size=shape) < 1e-3, 60.0, 1.0)
    elif kind == "shifted":
        normal = 5.0 + normal
    elif kind == "lognormal":
        normal = 1e-3 * np.exp(normal)
    return normal.astype(np.float32)


KINDS = ("normal", "relu", "outliers", "shifted", "lognormal")


def apply(params, x):
    """Two dense layers, a ReLU between them."""
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def product(params, x):
    """One product, whose operand is the input itself."""
    return x @ params["w"]


def half(statistics, target):
    """Half of what was seen."""
    del target
    low, high = statistics.extremes
    return qj.ranges.Range(0.5 * low, 0.5 * high, statistics.batches > 0)


HALF = qj.RangeRule("half", half)
OWN_FIT = qj.ranges.least_squares(iterations=3)._replace(name="own_fit")


def own_rule():
    """A rule that a function makes."""
    return HALF._replace(name="made")


def params():
    return {
        "first": jnp.asarray(draws("normal", FEATURES, HIDDEN, seed=1)),
        "second": jnp.asarray(draws("normal", HIDDEN, CLASSES, seed=2)),
    }


def model() -> Model:
    return Model(apply, params())


def batches():
    """Three batches of 24 rows."""
    return [draws("normal", ROWS, FEATURES, seed=seed) for seed in (3, 4, 5)]


def seen(kind: str, *, bits: int = 4, rows: int = 256, policy=None):
    """Model, batches and what was collected, of one product on data of a kind."""
    data = [draws(kind, rows, 16, seed=seed) for seed in (6, 7)]
    one = Model(product, {"w": jnp.asarray(draws("normal", 16, 12, seed=8))})
    policy = policy or qj.uniform_policy(weight_bits=bits, activation_bits=bits)
    return one, data, collect(one, batched(data), policy)


# What the command line is told to load.

ready = model()
pair = (apply, params())
array = np.concatenate(batches())
texts = "no batches"
number = 3


def generated():
    yield from batches()


def infinitely_many():
    while True:
        yield batches()[0]


def from_folder(data_dir=None):
    return [batches()[0]] if data_dir is None else [np.load(data_dir / "rows.npy")]


def needs(argument):
    return argument


def nothing():
    return []


def without_rows():
    return [np.zeros((0, FEATURES), np.float32)]


def with_nan():
    return [batches()[0], np.where(batches()[1] > 2.0, np.nan, batches()[1])]


def narrower():
    return [batches()[0], batches()[1][:, :-1]]


def too_narrow():
    return [batches()[0][:, :-1]]


def strings():
    return [np.array(["a", "b"])]


def branching():
    """A model that asks for the values of its input."""
    return Model(lambda params, x: x @ params["first"] if x.sum() > 0 else x, params())


def dividing_by_zero():
    """A model whose second operand is infinite, on finite inputs."""

    def f(params, x):
        return (1.0 / (x @ params["first"] * 0.0)) @ params["second"]

    return Model(f, params())


def scaled():
    """A model of two inputs."""
    return lambda params, x, by: apply(params, x * by), params()


def with_a_product_of_inputs():
    """A model with a product that no rule of a uniform policy matches."""
    return lambda params, x: (x @ x.T) @ apply(params, x), params()
