"""Integer products by group: int64 within a group, float32 from group to group, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.integers import integer_product
from tests.integers.visiting import int8, run, site_of
from tests.models import assert_same_bits
from tests.oracles.integers import spread
from tests.products.forms import Form, Quantized, conv, dot
from tests.products.terms import Terms, factors, product

GROUPED_CONV = conv((1, 4, 4, 8), (3, 3, 4, 6), padding="SAME", groups=2)
CHANNELS_FIRST = conv((1, 6, 4, 4), (4, 6, 3, 3), layouts=("NCHW", "OIHW", "NCHW"))
# Form, and the contracted axes of its weight in the order in which groups run.
FORMS = {
    "plain": (dot("mk,kn->mn", (3, 12), (12, 5)), (0,)),
    "transposed": (
        dot("mk,kn->mn", (3, 12), (12, 5), lambda p, x: x @ p["w"].T)._replace(transposed=True),
        (0,),
    ),
    "weight_left": (dot("km,nk->nm", (12, 3), (5, 12), lambda p, x: p["w"] @ x), (1,)),
    "batched": (dot("bmk,bkn->bmn", (2, 3, 12), (2, 12, 5)), (1,)),
    "two_axes": (dot("mij,ijn->mn", (3, 4, 6), (4, 6, 2)), (0, 1)),
    "conv_same": (conv((1, 4, 4, 6), (3, 3, 6, 4), padding="SAME"), (2,)),
    "conv_strided": (conv((2, 5, 4, 6), (2, 3, 6, 3), strides=(2, 1)), (2,)),
    "conv_lhs_dilated": (
        conv((1, 3, 3, 6), (2, 2, 6, 2), lhs_dilation=(2, 2), padding=((1, 1), (1, 0))),
        (2,),
    ),
    "conv_of_groups": (GROUPED_CONV, (2,)),
    "conv_channels_first": (CHANNELS_FIRST, (1,)),
}


def blocks(form: Form, contracted: tuple[int, ...], length: int) -> np.ndarray:
    """Which block each term is in: runs of ``length`` along the contracted axes, flattened."""
    position = np.zeros(form.w, int)
    for axis in contracted:
        position = position * form.w[axis] + np.indices(form.w)[axis]
    return (position // length).ravel()[form.terms().rhs]


def group_by_group(terms: Terms, ids: np.ndarray, x: Quantized, w: Quantized) -> np.ndarray:
    """``Σ_groups float32(Σ int64) · (s_x · s_w)``, groups in order."""
    total = np.zeros(terms.shape, np.float32)
    for block in range(ids.max() + 1):
        part = Terms(*(column[ids == block] for column in terms[:3]), terms.shape)
        sums = product(part, x.centered, w.centered).astype(np.float32)
        total = total + sums * factors(part, x.scale, w.scale)
    return total


def of_groups(form: Form, contracted: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Shape of the weight's scale: by group, along the last contracted axis."""
    (free,) = [o.free for o in site_of(form).operands if o.key == "weight"]
    shape = [n if a in free + contracted else 1 for a, n in enumerate(form.w)]
    shape[contracted[-1]] //= size
    return tuple(shape)


def rows(form: Form) -> tuple[int, ...]:
    """Shape of a scale for each row of the activation."""
    (free,) = [o.free for o in site_of(form).operands if o.key == "activation"]
    return tuple(n if a in free else 1 for a, n in enumerate(form.x))


class Operand:
    """Codes, zero point and scale, drawn at random."""

    def __init__(self, seed: int, shape: Any, scales: Any, *, asymmetric: bool) -> None:
        draw = np.random.default_rng(seed)
        self.codes = int8(seed, *shape)
        self.zero = draw.integers(-128, 128, scales).astype(np.int32) if asymmetric else None
        self.scale = draw.uniform(0.3, 2.9, scales).astype(np.float32)

    @property
    def quantized(self) -> Quantized:
        zero = np.int64(0) if self.zero is None else self.zero.astype(np.int64)
        shape = self.codes.shape
        return Quantized(
            self.codes.astype(np.int64) - spread(zero, shape), spread(self.scale, shape)
        )

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        zero = None if self.zero is None else jnp.asarray(self.zero)
        return jnp.asarray(self.codes), zero, jnp.asarray(self.scale)


def multiplied(form: Form, x: Any, w: Any) -> jax.Array:
    """The integer product of ``(codes, zero point, scale)`` of both operands."""
    found = {"activation": x[1:], "weight": w[1:]}
    return run(form, integer_product, x[0], w[0], found, dtype=jnp.float32)


def check(form: Form, ids: np.ndarray, pairs: list[tuple[Operand, Operand]]) -> list[Any]:
    """Each pair of operands, in one program."""
    everything = jax.jit(lambda pairs: [multiplied(form, x, w) for x, w in pairs])
    results = everything([(x.arrays, w.arrays) for x, w in pairs])
    for got, (x, w) in zip(results, pairs, strict=True):
        want = group_by_group(form.terms(), ids, x.quantized, w.quantized)
        assert np.isfinite(want).all()
        assert_same_bits(got, want)
    return results


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FORMS)
def test_weights_in_groups(name):
    """With scales per tensor and per row on the left, with and without zero points."""
    form, contracted = FORMS[name]
    size = 3 if form.w[contracted[-1]] % 3 == 0 else 2
    ids, scales = blocks(form, contracted, size), of_groups(form, contracted, size)
    one = (1,) * len(form.x)
    pairs = []
    for seed, (shape, left, right) in enumerate(
        [
            (one, True, False),
            (one, False, False),
            (one, True, True),
            (rows(form), True, True),
            (rows(form), False, True),
        ]
    ):
        x = Operand(seed, form.x, shape, asymmetric=left)
        pairs.append((x, Operand(50 + seed, form.w, scales, asymmetric=right)))
    results = check(form, ids, pairs)
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("sizes", [(4, 6), (3, 12), (12, 2), (2, 2)])
def test_groups_of_both_operands(sizes):
    """Sums run over what both share; a group of 12 is all of a row."""
    form, contracted = FORMS["plain"]
    left, right = sizes
    x = Operand(1, form.x, (3, 12 // left), asymmetric=True)
    w = Operand(2, form.w, (12 // right, 5), asymmetric=True)
    lengths = [n for n in sizes if n < 12]
    check(form, blocks(form, contracted, int(np.gcd.reduce(lengths))), [(x, w)])


def test_groups_of_the_activation_alone():
    form, contracted = FORMS["two_axes"]
    x = Operand(1, form.x, (3, 4, 2), asymmetric=True)
    w = Operand(2, form.w, (1, 1, 2), asymmetric=False)
    check(form, blocks(form, contracted, 3), [(x, w)])


def test_without_groups_it_is_the_sum_scaled_once():
    form, _ = FORMS["plain"]
    x = Operand(1, form.x, (3, 1), asymmetric=True)
    w = Operand(2, form.w, (1, 5), asymmetric=True)
    check(form, np.zeros(form.terms().out.size, int), [(x, w)])


@pytest.mark.parametrize("name", ["plain", "conv_same"])
def test_eagerly(name):
    form, contracted = FORMS[name]
    x = Operand(3, form.x, (1,) * len(form.x), asymmetric=True)
    w = Operand(4, form.w, of_groups(form, contracted, 3), asymmetric=True)
    want = group_by_group(form.terms(), blocks(form, contracted, 3), x.quantized, w.quantized)
    assert_same_bits(multiplied(form, x.arrays, w.arrays), want)


def test_the_order_of_groups_matters():
    """So the tests above can fail."""
    form, contracted = FORMS["plain"]
    x = Operand(1, form.x, (1, 1), asymmetric=True).quantized
    w = Operand(2, form.w, (6, 5), asymmetric=False).quantized
    ids = blocks(form, contracted, 2)
    forwards, backwards = (group_by_group(form.terms(), i, x, w) for i in (ids, ids.max() - ids))
    assert (forwards != backwards).any()


def test_long_groups_stay_exact():
    """Sums beyond 2^24, which float32 does not hold on the way: int32 does."""
    form = dot("mk,kn->mn", (2, 4096), (4096, 3))
    x = Operand(1, form.x, (1, 1), asymmetric=False)
    w = Operand(2, form.w, (2, 3), asymmetric=False)
    x.codes[:], w.codes[:] = 127 - np.arange(4096) % 3, 125
    sums = [
        np.sum(x.codes[0].astype(np.int64)[half] * 125) for half in np.split(np.arange(4096), 2)
    ]
    assert min(sums) > 2**24
    check(form, blocks(form, (0,), 2048), [(x, w)])


def test_a_nan_scale_reaches_the_whole_result():
    form, contracted = FORMS["plain"]
    x = Operand(1, form.x, (1, 1), asymmetric=True)
    w = Operand(2, form.w, of_groups(form, contracted, 3), asymmetric=False)
    codes, zero, scale = x.arrays
    out = jax.jit(lambda x, w: multiplied(form, x, w))((codes, zero, scale * jnp.nan), w.arrays)
    assert np.isnan(out).all()
