"""int8 products on CPUs: the integers of XLA's own, and weights that are read as they lie."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax.integers import cpu, lowering
from tests.integers.visiting import equations, int8
from tests.models import Case, normal, ready

ONE_ROW = {
    "row": ((1, 12), (12, 5), (((1,), (0,)), ((), ()))),
    "column": ((5, 12), (12, 1), (((1,), (0,)), ((), ()))),
    "vector": ((12,), (12, 5), (((0,), (0,)), ((), ()))),
    "vector on the right": ((5, 12), (12,), (((1,), (0,)), ((), ()))),
    "ones around": ((1, 3, 1, 4), (4, 2, 3, 5), (((1, 3), (2, 0)), ((), ()))),
    "ones around, on the right": ((4, 2, 3, 5), (1, 3, 4, 1), (((0, 2), (2, 1)), ((), ()))),
}
OTHERS = {
    "two vectors": ((12,), (12,), (((0,), (0,)), ((), ()))),
    "rows": ((3, 12), (12, 5), (((1,), (0,)), ((), ()))),
    "batch": ((2, 1, 12), (2, 12, 5), (((2,), (1,)), ((0,), (0,)))),
    "nothing": ((1, 0), (0, 5), (((1,), (0,)), ((), ()))),
    "empty": ((1, 3), (3, 0), (((1,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("name", [*ONE_ROW, *OTHERS])
def test_a_dot_has_the_integers_of_xlas_own(name):
    left, right, numbers = {**ONE_ROW, **OTHERS}[name]
    lhs, rhs = int8(0, *left), int8(1, *right)
    got = jax.jit(lambda a, b: cpu.rows_dot(a, b, dimension_numbers=numbers))(lhs, rhs)
    want = lax.dot_general(lhs.astype(jnp.int32), rhs.astype(jnp.int32), numbers)
    assert got.shape == want.shape
    assert_array_equal(got, want)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0)], ids=str)
def test_under_vmap_no_row_is_filled_up(name, batched):
    left, right, numbers = ONE_ROW[name]
    shapes = [(3, *s) if axis == 0 else s for s, axis in zip((left, right), batched, strict=True)]
    lhs, rhs = (int8(seed, *shape) for seed, shape in enumerate(shapes))
    own = lambda a, b: cpu.rows_dot(a, b, dimension_numbers=numbers)  # noqa: E731
    direct = lambda a, b: lowering.direct_dot(a, b, dimension_numbers=numbers)  # noqa: E731
    got, want = (jax.vmap(dot, batched) for dot in (own, direct))
    assert_array_equal(jax.jit(got)(lhs, rhs), want(lhs, rhs))
    assert "pad" not in str(jax.make_jaxpr(got)(lhs, rhs))


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
SERIES, VOLUME = ("NHC", "HIO", "NHC"), ("NDHWC", "DHWIO", "NDHWC")


class Conv(NamedTuple):
    """A convolution; ``form`` is the primitive that it becomes."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    layout: tuple[str, str, str] = LAST
    stride: int = 1
    edges: tuple[int, int] = (1, 1)
    spread: int = 1
    dilation: int = 1
    groups: int = 1
    form: str = "conv_general_dilated"


CONVS = {
    "enough channels": Conv((2, 6, 5, 4), (3, 3, 4, 17)),
    "many channels": Conv((2, 6, 5, 32), (3, 3, 32, 8), stride=2),
    "channels first": Conv((2, 4, 6, 5), (17, 4, 3, 3), FIRST),
    "transposed": Conv((2, 4, 3, 4), (3, 3, 4, 17), spread=2, edges=(2, 1)),
    "cropped": Conv((2, 6, 5, 4), (3, 3, 4, 17), edges=(-1, 2)),
    "cropped and transposed": Conv((2, 4, 3, 4), (3, 3, 4, 17), spread=3, edges=(-2, 1)),
    "dilated": Conv((2, 6, 7, 4), (3, 2, 4, 17), dilation=2),
    "groups": Conv((2, 6, 5, 8), (3, 3, 2, 12), groups=4),
    "few channels": Conv((2, 6, 5, 3), (3, 3, 3, 32), form="dot_general"),
    "few outputs": Conv((2, 6, 5, 31), (3, 3, 31, 16), form="dot_general"),
    "a series": Conv((2, 9, 32), (3, 32, 32), SERIES, form="dot_general"),
    "a volume": Conv((2, 3, 4, 5, 8), (2, 3, 2, 8, 20), VOLUME, form="dot_general"),
    "a series in groups": Conv((2, 9, 8), (3, 2, 12), SERIES, groups=4, form="dot_general"),
    "depthwise": Conv((2, 6, 5, 4), (3, 3, 1, 8), groups=4, form="mul"),
    "few and transposed": Conv((2, 4, 3, 2), (3, 3, 2, 5), spread=2, form="dot_general"),
    "one patch": Conv((1, 3, 3, 2), (3, 3, 2, 5), edges=(0, 0), form="dot_general"),
    "smaller than the window": Conv((1, 2, 2, 4), (3, 3, 4, 32), edges=(0, 0)),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_has_the_integers_of_xlas_own(name):
    x, w, layout, stride, edges, spread, dilation, groups, form = CONVS[name]
    rank = len(x) - 2
    numbers = {
        "window_strides": (stride,) * rank,
        "padding": (edges,) * rank,
        "lhs_dilation": (spread,) * rank,
        "rhs_dilation": (dilation,) * rank,
        "dimension_numbers": lax.conv_dimension_numbers(x, w, layout),
        "feature_group_count": groups,
    }
    lhs, rhs = int8(0, *x), int8(1, *w)
    own = functools.partial(cpu.conv, **numbers)
    got = jax.jit(own)(lhs, rhs)
    want = lax.conv_general_dilated(lhs.astype(np.int32), rhs.astype(np.int32), **numbers)
    assert_array_equal(got, want)
    assert got.dtype == jnp.int32
    found = [eqn.primitive.name for eqn in equations(jax.make_jaxpr(own)(lhs, rhs).jaxpr)]
    forms = {"conv_general_dilated", "dot_general", "mul"} & set(found)
    assert forms == {form}


@pytest.mark.parametrize("channels", [3, 4])
def test_a_convolution_of_any_size_is_exported(channels):
    """Patches of an unknown size cannot be cut out."""

    def f(p, x):
        x = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=LAST)
        return jax.nn.relu(x) @ p["o"]

    params = {"w": normal(0, 3, 3, channels, 17), "o": normal(1, 17, 4)}
    case = Case(f, params, normal(2, 2, 6, 6, channels))
    plan, _, qstate = ready(case, qj.uniform_policy())
    frozen = qj.freeze(plan, qstate, case.params)
    run = jax.jit(lambda x: qj.execute(f, plan)(qstate, frozen, x))
    for sizes in ("b, 6, 6", "b, h, w"):
        shape = jax.export.symbolic_shape(f"{sizes}, {channels}")
        program = jax.export.export(run)(jax.ShapeDtypeStruct(shape, jnp.float32))
        assert_array_equal(program.call(case.x), run(case.x))


AXES = [axes for n in (1, 2, 3) for axes in itertools.permutations(range(3), n)]


@pytest.mark.parametrize("has_batch", [False, True])
def test_sums_are_those_of_reducing(has_batch):
    codes = int8(2, 3, 4, 5)
    for axes in [(), *AXES]:
        got = lowering.sums_over(codes, axes, has_batch=has_batch)
        want = np.sum(codes, axis=axes, keepdims=True, dtype=np.int32)
        assert_array_equal(got, want)
        assert got.dtype == jnp.int32


def test_sums_of_many_codes_leave_the_range_of_int8():
    codes = jnp.full((1000, 2), -128, jnp.int8)
    assert cpu.sums_by_product(codes, (0,)).tolist() == [[-128_000, -128_000]]


def layers(p, x):
    for w in p:
        x = jax.nn.relu(x @ w)
    return x


@pytest.mark.thinned(2)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for CPUs")
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_frozen_weights_are_not_widened(rows):
    """All of them were, to int32 ahead of the first product: 16 times what is live here."""
    weights = [normal(seed, 128, 128) for seed in range(8)]
    case = Case(layers, weights, normal(9, rows, 128))
    plan, _, qstate = ready(case, qj.uniform_policy())
    frozen = qj.freeze(plan, qstate, weights)
    run = jax.jit(qj.execute(layers, plan)).lower(qstate, frozen, case.x).compile()
    simulated = jax.jit(qj.fake_quantize(layers, plan))(qstate, weights, case.x)
    assert_array_equal(run(qstate, frozen, case.x), simulated)
    held = run.memory_analysis().temp_size_in_bytes
    assert held < 2 * 128 * 128 + 16 * rows * 128 * 4
