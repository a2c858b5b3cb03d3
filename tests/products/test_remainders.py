"""Groups with a remainder, in simulation and in integers, against int64 within a group.

``out = Σ_groups float32(Σ int64) · (s_x · s_w)``, groups added in order: runs along the last
contracted axis, the last of each run shorter, one index of the other contracted axes after another.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.granularity import expand
from quantjax.integers import IntegerOperand, integer_product
from quantjax.interpreter import Product
from quantjax.products import Coded, Exactness, Sizing, multiply
from tests.integers.visiting import int8, run, site_of
from tests.models import assert_same_bits
from tests.products.forms import Form, conv, dot
from tests.products.terms import Terms, factors, product
from tests.test_granularity_blocks import spread

# Form, and the numbers of groups of the weight.
FORMS = {
    "plain": (dot("mk,kn->mn", (3, 14), (14, 5)), (3, 4)),
    "transposed": (
        dot("mk,kn->mn", (3, 14), (14, 5), lambda p, x: x @ p["w"].T)._replace(transposed=True),
        (5,),
    ),
    "weight_left": (dot("km,nk->nm", (14, 3), (5, 14), lambda p, x: p["w"] @ x), (4,)),
    "batched": (dot("bmk,bkn->bmn", (2, 3, 11), (2, 11, 5)), (3,)),
    "batch_last": (dot("mkb,kbn->bmn", (3, 7, 2), (7, 2, 5)), (2,)),
    "two_axes": (dot("mij,ijn->mn", (3, 3, 7), (3, 7, 2)), (2, 4)),
    "reversed_sum": (dot("mkj,jkn->mn", (3, 5, 7), (7, 5, 2)), (3, 2)),
    "conv_same": (conv((1, 4, 4, 7), (3, 3, 7, 4), padding="SAME"), (2,)),
    "conv_lhs_dilated": (
        conv((1, 3, 3, 5), (2, 2, 5, 2), lhs_dilation=(2, 2), padding=((1, 1), (1, 0))),
        (3,),
    ),
    "conv_of_groups": (conv((1, 4, 4, 10), (3, 3, 5, 6), padding="SAME", groups=2), (2,)),
    "conv_channels_first": (
        conv((1, 7, 4, 4), (4, 7, 3, 3), layouts=("NCHW", "OIHW", "NCHW")),
        (2, 4),
    ),
}


class Axes(NamedTuple):
    """Of the activation and of the weight, as the site's table has them."""

    x: Any
    w: Any


def axes_of(form: Form) -> Axes:
    operands = {operand.key: operand for operand in site_of(form).operands}
    return Axes(operands["activation"], operands["weight"])


def scale_shape(operand: Any, groups: int, columns: int = 0) -> tuple[int, ...]:
    """``groups`` along the last contracted axis, ``columns`` along the last free one."""
    shape = [n if a not in operand.window else 1 for a, n in enumerate(operand.shape)]
    shape[operand.contracted[-1]] = groups
    if columns:
        shape[operand.free[-1]] = columns
    return tuple(shape)


def rows_of(operand: Any) -> tuple[int, ...]:
    """A scale for each row."""
    return tuple(n if a in operand.free else 1 for a, n in enumerate(operand.shape))


class Operand:
    """Codes, zero point and scale, drawn at random."""

    def __init__(self, seed: int, shape: Any, scales: Any, *, asymmetric: bool) -> None:
        draw = np.random.default_rng(seed)
        self.codes = int8(seed, *shape)
        self.zero = draw.integers(-128, 128, scales).astype(np.int32) if asymmetric else None
        self.scale = draw.uniform(0.3, 2.9, scales).astype(np.float32)

    @property
    def centered(self) -> np.ndarray:
        zero = np.zeros(self.scale.shape, int) if self.zero is None else self.zero
        return self.codes.astype(np.int64) - spread(zero.astype(np.int64), self.codes.shape)

    @property
    def spread_scale(self) -> np.ndarray:
        return spread(self.scale, self.codes.shape)

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        zero = None if self.zero is None else jnp.asarray(self.zero)
        return jnp.asarray(self.codes), zero, jnp.asarray(self.scale)


def block_ids(form: Form, length: int) -> np.ndarray:
    """The block of each term: ``length`` entries of the last contracted axis, the last fewer."""
    weight = axes_of(form).w
    index = dict(enumerate(np.indices(form.w)))
    position = np.zeros(form.w, int)
    for axis in weight.contracted[:-1]:
        position = position * form.w[axis] + index[axis]
    last = weight.contracted[-1]
    position = position * math.ceil(form.w[last] / length) + index[last] // length
    return position.ravel()[form.terms().rhs]


def by_blocks(form: Form, length: int, x: Operand, w: Operand) -> np.ndarray:
    """The oracle."""
    terms, ids = form.terms(), block_ids(form, length)
    total = np.zeros(terms.shape, np.float32)
    for block in range(ids.max() + 1):
        part = Terms(*(column[ids == block] for column in terms[:3]), terms.shape)
        sums = product(part, x.centered, w.centered).astype(np.float32)
        total = total + sums * factors(part, x.spread_scale, w.spread_scale)
    return total


def simulated(product: Product, lhs: IntegerOperand, rhs: IntegerOperand) -> jax.Array:
    """The same operands as the simulation has them: centered codes in float32."""
    sides = []
    for codes, zero, factor in (lhs, rhs):
        values = codes.astype(jnp.float32)
        if zero is not None:
            values = values - expand(zero.astype(jnp.float32), values.shape)
        sides.append(Coded(values, factor))
    sizing = Sizing(Exactness.EXACT, product.contraction_size())
    return multiply(product, (lhs.codes, rhs.codes), sides[0], sides[1], sizing)


def both(form: Form, x: Any, w: Any) -> tuple[jax.Array, jax.Array]:
    """``(integers, simulation)`` of ``(codes, zero point, scale)`` of both operands."""
    found = {"activation": x[1:], "weight": w[1:]}
    integers, simulation = (
        run(form, way, x[0], w[0], found, dtype=jnp.float32) for way in (integer_product, simulated)
    )
    return integers, simulation


def check(form: Form, length: int, pairs: list[tuple[Operand, Operand]]) -> None:
    """Both ways of each pair of operands, in one program, bit for bit."""
    everything = jax.jit(lambda pairs: [both(form, x, w) for x, w in pairs])
    results = everything([(x.arrays, w.arrays) for x, w in pairs])
    for (integers, simulation), (x, w) in zip(results, pairs, strict=True):
        want = by_blocks(form, length, x, w)
        assert np.isfinite(want).all()
        assert_same_bits(integers, want)
        assert_same_bits(simulation, want)


def pairs_for(form: Form, weight_scales: tuple[int, ...]) -> list[tuple[Operand, Operand]]:
    """A scale per tensor and per row on the left, with and without zero points."""
    one, rows = (1,) * len(form.x), rows_of(axes_of(form).x)
    kinds = [(one, True, False), (rows, True, True), (rows, False, True)]
    return [
        (
            Operand(seed, form.x, scales, asymmetric=left),
            Operand(50 + seed, form.w, weight_scales, asymmetric=right),
        )
        for seed, (scales, left, right) in enumerate(kinds)
    ]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FORMS)
def test_weights_in_groups(name):
    form, numbers = FORMS[name]
    weight = axes_of(form).w
    for groups in numbers:
        n = weight.shape[weight.contracted[-1]]
        length = math.ceil(n / groups)
        assert n % length or name == "plain"
        check(form, length, pairs_for(form, scale_shape(weight, groups)))


def test_eagerly():
    form, (groups, _) = FORMS["plain"]
    x, w = pairs_for(form, (groups, 5))[1]
    want = by_blocks(form, 5, x, w)
    for got in both(form, x.arrays, w.arrays):
        assert_same_bits(got, want)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("left", "right", "length"),
    [(4, 2, 1), (4, 7, 2), (3, 3, 5), (1, 3, 5), (3, 1, 5), (2, 4, 1)],
)
def test_groups_of_both_operands(left, right, length):
    """14 entries: sums run over the common divisor of both lengths, from the start of the axis."""
    form, _ = FORMS["plain"]
    x = Operand(1, form.x, (3, left), asymmetric=True)
    w = Operand(2, form.w, (right, 5), asymmetric=True)
    check(form, length, [(x, w)])


def test_groups_of_the_activation_alone():
    form, _ = FORMS["two_axes"]
    x = Operand(1, form.x, (3, 3, 2), asymmetric=True)
    w = Operand(2, form.w, (1, 1, 2), asymmetric=True)
    check(form, 4, [(x, w)])


def test_one_factor_for_each_index_of_an_outer_sum_and_groups_of_the_inner():
    """A run of 7 on the left, groups of 4 and 3 on the right."""
    form, _ = FORMS["two_axes"]
    x = Operand(1, form.x, (3, 3, 1), asymmetric=True)
    w = Operand(2, form.w, (1, 2, 2), asymmetric=False)
    check(form, 1, [(x, w)])


def test_a_shorter_group_counts_its_own_products():
    """``n z_x z_w`` of the last block has its own ``n``: all codes at their zero points give 0."""
    form, _ = FORMS["plain"]
    x = Operand(1, form.x, (1, 1), asymmetric=True)
    w = Operand(2, form.w, (3, 5), asymmetric=True)
    x.codes[:] = x.zero
    for got in both(form, x.arrays, w.arrays):
        np.testing.assert_array_equal(got, np.zeros((3, 5)))


def test_an_evenly_split_axis_would_give_other_results():
    """So the tests above can fail: 5, 5, 4 is not 4, 5, 5."""
    form, _ = FORMS["plain"]
    x, w = pairs_for(form, (3, 5))[0]
    forwards = by_blocks(form, 5, x, w)
    w.scale = np.concatenate([np.repeat(w.scale, (4, 5, 5), axis=0)])
    other = (x.centered * x.spread_scale.astype(np.float64)) @ (w.centered * w.scale)
    assert (np.abs(forwards - other) > 1e-3 * np.abs(other).max()).any()


def test_gradients_of_scales():
    """Those of the product of dequantized operands."""
    form, _ = FORMS["two_axes"]
    x = Operand(1, form.x, (1, 1, 1), asymmetric=False)
    w = Operand(2, form.w, (3, 2, 2), asymmetric=False)

    def simulation(scale: jax.Array) -> jax.Array:
        found = {"activation": x.arrays[1:], "weight": (None, scale)}
        out = run(form, simulated, *map(jnp.asarray, (x.codes, w.codes)), found, dtype=jnp.float32)
        return jnp.sum(jnp.sin(0.001 * out))

    left, codes = np.float32(x.codes) * x.scale, np.float32(w.codes)

    def dense(scale: jax.Array) -> jax.Array:
        out = jnp.einsum("mij,ijn->mn", left, codes * expand(scale, form.w))
        return jnp.sum(jnp.sin(0.001 * out))

    found, want = (jax.jit(jax.grad(f))(jnp.asarray(w.scale)) for f in (simulation, dense))
    assert float(jnp.abs(want).min()) > 0
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=1e-5 * float(jnp.abs(want).max()))
