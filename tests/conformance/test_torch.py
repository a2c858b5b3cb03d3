"""PyTorch's fake quantization and casts, bit for bit; skipped where torch is not installed.

Measured with torch 2.13.0 on CPU:

* ``torch.fake_quantize_per_tensor_affine``, ``..._per_channel_affine`` and
  ``torch._fake_quantize_learnable_per_tensor_affine`` are ``RECIPROCAL``: ``round(x · (1/s)) + z``.
  Their documentation adds the zero point before rounding; for odd zero points that is another code
  at every tie.
* ``torch.quantize_per_channel`` is ``RECIPROCAL_ADDED``: ``round(x · (1/s) + z)``.
  ``torch.quantize_per_tensor`` rounds product and sum at once (a fused multiply-add).
* NaN becomes the lowest code, where NaN stays NaN here. Infinities saturate, but per channel all
  values from ``2^63 s`` on, which leave int64, become the lowest code.
* A cast to ``float8_e4m3fn`` saturates, infinities too; ``float8_e5m2`` and the 16-bit types go to
  infinity, the ``fnuz`` types to NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from quantjax import QParams, encode, fake_quant, formats, integer
from quantjax.affine import DIVIDED, RECIPROCAL, RECIPROCAL_ADDED
from quantjax.estimators import CLIPPED
from quantjax.formats import Overflow
from quantjax.rounding import HALF_EVEN
from tests.oracles.integers import Integers, bounds

torch = pytest.importorskip("torch")

RANDOM = 100_000
TIES = np.arange(-1200, 1200, dtype=np.float32) / 2
FAMILIES = (Integers(8), Integers(8, signed=False), Integers(4), Integers(4, signed=False))
SCALES = (0.033, 0.1, 0.25, 1.7, 0.0037)

ranges = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: "iu"[not f.signed] + str(f.bits))
scales = pytest.mark.parametrize("scale", SCALES)


def tensor(scale: float, family: Integers, zero_point: int, *, seed: int = 0) -> np.ndarray:
    """Random reals, a third of them out of range; ties; ends of float32; always of one shape."""
    low, high = bounds(family)
    steps = np.random.default_rng(seed).uniform(
        1.5 * low - 0.5 * high, 1.5 * high - 0.5 * low, RANDOM
    )
    ends = np.float32([0.0, -0.0, 3e38, -3e38, np.inf, -np.inf])
    steps = np.float32(steps - zero_point) * np.float32(scale)
    return np.concatenate([steps, TIES * np.float32(scale), np.float32(TIES * scale), ends])


def cotangent(x: np.ndarray) -> np.ndarray:
    """What a gradient is multiplied with."""
    return np.random.default_rng(1).normal(size=x.shape).astype(np.float32)


def zero_points(family: Integers) -> tuple[int, ...]:
    """Even and odd ones, and both ends."""
    low, high = bounds(family)
    return (low, (low + high) // 2, (low + high) // 2 + 1, low + 3, high)


@functools.partial(jax.jit, static_argnames=("signed", "scaling"))
def ours(x, ct, scale, zero_point, bits, *, signed, scaling=RECIPROCAL):
    """Value, and the gradients of ``x``, scale and zero point."""

    def quantize(x, scale, zero_point):
        options = {"rounding": HALF_EVEN, "estimator": CLIPPED, "scaling": scaling}
        return fake_quant(x, scale, zero_point, bits=bits, signed=signed, **options)

    y, pull = jax.vjp(quantize, x, scale, zero_point)
    return y, *pull(ct)


def of_torch(operator, x, ct, *parameters):
    """Value, and the gradient of ``x``."""
    x = torch.tensor(x, requires_grad=True)
    y = operator(x, *parameters)
    y.backward(torch.from_numpy(ct))
    return y.detach().numpy(), x.grad.numpy()


def assert_same_bits(got, want):
    """Equal as patterns: -0 is not 0."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    unsigned = f"uint{8 * got.dtype.itemsize}"
    assert_array_equal(got.view(unsigned), np.ascontiguousarray(want).view(unsigned))


@ranges
@scales
def test_per_tensor(family, scale):
    for zero_point in zero_points(family):
        x = tensor(scale, family, zero_point)
        ct = cotangent(x)
        want = of_torch(
            torch.fake_quantize_per_tensor_affine, x, ct, scale, zero_point, *bounds(family)
        )
        numbers = (np.float32(n) for n in (scale, zero_point, family.bits))
        y, to_x, *_ = ours(x, ct, *numbers, signed=family.signed)
        assert_same_bits(y, want[0])
        assert_same_bits(to_x, want[1])


@ranges
@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel(family, axis):
    zeros = zero_points(family)
    rows = [
        tensor(s, family, z, seed=i) for i, (s, z) in enumerate(zip(SCALES, zeros, strict=True))
    ]
    x = np.stack([row[np.abs(row) < 1e18] for row in rows], axis)  # int64 holds x/s
    ct, shape = cotangent(x), [1, 1]
    shape[axis] = len(rows)
    scale, zero_point = np.float32(SCALES), np.int32(zeros)
    want = of_torch(
        torch.fake_quantize_per_channel_affine,
        x,
        ct,
        torch.from_numpy(scale),
        torch.from_numpy(zero_point),
        axis,
        *bounds(family),
    )
    arrays = (scale.reshape(shape), np.float32(zero_point).reshape(shape))
    y, to_x, *_ = ours(x, ct, *arrays, np.float32(family.bits), signed=family.signed)
    assert_same_bits(y, want[0])
    assert_same_bits(to_x, want[1])


@ranges
def test_learnable(family):
    """LSQ+: the values are the same; so are the gradients, but for two habits of torch's.

    Its backward adds the zero point before rounding, with a fused multiply-add, so that ties go
    elsewhere; and it rounds the zero point by truncating ``z + 0.5``, so that a negative one is off
    by one. The gradient of the scale is ``q - z - x/s`` in range and ``q - z`` beyond, that of the
    zero point ``-s`` beyond, as here; torch multiplies both with ``grad_factor``.
    """
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    scale = np.float32(0.033)
    for zero_point in map(np.float32, zero_points(family)):
        numbers = (scale, zero_point, np.float32(family.bits))
        learned = [torch.tensor([n], requires_grad=True) for n in numbers[:2]]
        x = tensor(scale, family, int(zero_point))
        y = ours(x, x, *numbers, signed=family.signed)[0]
        want = learnable(torch.from_numpy(x), *learned, *bounds(family), 1.0)
        assert_same_bits(y, want.detach().numpy())

        x = np.where(np.abs(x) < 1e18, x, np.float32(0))
        x = np.where(np.abs(x / scale % 1 - 0.5) < 1e-3, np.float32(0), x)  # ties
        ct = cotangent(x)
        want = of_torch(learnable, x, ct, *learned, *bounds(family), 1.0)
        _, to_x, *to_learned = ours(x, ct, *numbers, signed=family.signed)
        if zero_point < 0:
            assert np.any(to_x != want[1])
            continue
        assert_same_bits(to_x, want[1])
        for got, parameter in zip(to_learned, learned, strict=True):
            assert_allclose(got, parameter.grad.numpy()[0], rtol=1e-3)


def test_only_one_variant_agrees_on_ties():
    family, scale, zero_point = Integers(8), np.float32(0.033), 17
    x = np.float32(TIES * scale)
    want = torch.fake_quantize_per_tensor_affine(
        torch.from_numpy(x), float(scale), zero_point, *bounds(family)
    ).numpy()
    numbers = (scale, np.float32(zero_point), np.float32(family.bits))
    differing = {
        scaling.name: int(np.sum(ours(x, x, *numbers, signed=True, scaling=scaling)[0] != want))
        for scaling in (DIVIDED, RECIPROCAL, RECIPROCAL_ADDED)
    }
    assert differing["reciprocal"] == 0
    assert differing["divided"] > 10
    assert differing["reciprocal-added"] > 100


def test_counterexamples_by_hand():
    """Divided, it is a tie; times the reciprocal, it is not. With ``z = 1``, a tie is another."""
    scale, x = np.float32(1.7), np.float32(12.75)
    assert x / scale == 7.5
    assert fake_quant(x, scale) == 8 * scale
    assert fake_quant(x, scale, scaling=RECIPROCAL) == 7 * scale
    lower = torch.fake_quantize_per_tensor_affine(torch.tensor([x]), float(scale), 0, -128, 127)
    assert lower.numpy() == 7 * scale
    ties = torch.tensor([0.5, 1.5])
    assert torch.fake_quantize_per_tensor_affine(ties, 1.0, 1, -128, 127).tolist() == [0, 2]
    assert fake_quant(ties.numpy(), 1.0, 1, scaling=RECIPROCAL).tolist() == [0, 2]
    assert fake_quant(ties.numpy(), 1.0, 1, scaling=RECIPROCAL_ADDED).tolist() == [1, 1]


def test_nan():
    x = torch.tensor([float("nan")])
    assert torch.fake_quantize_per_tensor_affine(x, 1.0, 3, -128, 127).tolist() == [-131]
    assert np.isnan(fake_quant(x.numpy(), 1.0, 3)).all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
@pytest.mark.parametrize("signed", [True, False])
def test_codes_per_channel(signed):
    """``torch.quantize_per_channel``; evaluated eagerly, one operation after the other."""
    family = Integers(8, signed)
    zeros = zero_points(family)
    x = np.stack([tensor(s, family, z)[:-4] for s, z in zip(SCALES, zeros, strict=True)])
    want = torch.quantize_per_channel(
        torch.from_numpy(x),
        torch.from_numpy(np.float32(SCALES)),
        torch.tensor(zeros),
        0,
        torch.qint8 if signed else torch.quint8,
    )
    columns = (np.float32(values)[:, None] for values in (SCALES, zeros))
    qparams = QParams(*map(jnp.asarray, columns), jnp.float32(8))
    got = encode(jnp.asarray(x), qparams, integer(signed=signed), scaling=RECIPROCAL_ADDED)
    assert_array_equal(got.codes, want.int_repr().numpy())


CASTS = {
    "float8_e4m3fn": formats.E4M3FN,
    "float8_e4m3fnuz": formats.E4M3FNUZ,
    "float8_e5m2": formats.E5M2,
    "float8_e5m2fnuz": formats.E5M2FNUZ,
    "float16": formats.FLOAT16,
    "bfloat16": formats.BFLOAT16,
}


@pytest.mark.parametrize("name", CASTS)
def test_casts(name):
    """Random patterns of float32, random reals about the format's range, all ties, the ends."""
    dtype, format = getattr(torch, name), CASTS[name]
    # Whether infinity saturates is torch's to say; where overflow begins is compared below.
    saturates = torch.tensor(np.inf).to(dtype).float().isfinite()
    overflow = Overflow.SATURATE if saturates else Overflow.SPECIAL
    format, random = dataclasses.replace(format, overflow=overflow), np.random.default_rng(0)
    bits = jnp.float32(format.max_bits)
    codes = jnp.arange(2**format.max_bits).astype(format.storage_dtype)
    levels = np.unique(np.float64(format.decode(codes, bits)))
    levels = levels[np.isfinite(levels)]
    with np.errstate(all="ignore"):  # signalling NaN
        whole = random.integers(2**32, size=RANDOM, dtype=np.uint32).view(np.float32)
        near = random.choice(levels, RANDOM) * random.uniform(0.5, 2.0, RANDOM)
        ends = [*levels[[0, -1]] * 1.05, *levels[[0, -1]] * 1.1, np.inf, -np.inf, np.nan, 0.0, -0.0]
        x = np.concatenate([whole, near, (levels[1:] + levels[:-1]) / 2, ends])
        x = np.float32(x)
    x = x[~(np.abs(x) < 2.0**-126) | (x == 0)]  # subnormals, which XLA flushes

    @jax.jit
    def cast(x):
        return format.encode(format.snap(x, jnp.zeros(()), bits, HALF_EVEN).level, bits)

    got = np.asarray(cast(x))
    stored = torch.from_numpy(x).to(dtype)
    want = stored.view(torch.uint8 if got.itemsize == 1 else torch.uint16).numpy()
    is_nan = stored.float().isnan().numpy()
    assert_array_equal(got[~is_nan], want[~is_nan])
    assert_array_equal(is_nan, np.isnan(format.decode(jnp.asarray(got), bits)))
