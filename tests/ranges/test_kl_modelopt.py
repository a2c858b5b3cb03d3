"""``KL_MODELOPT``: what NVIDIA's code does otherwise than the slides, on data of few values too."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from quantjax import integer, ranges, statistics
from quantjax.ranges import KL_MODELOPT, Target
from quantjax.ranges.kl_tensorrt import MODELOPT
from tests.oracles import divergence as oracle

SIGNED = Target(integer(), True, jnp.float32(8))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_modelopt_keeps_128_bins_at_any_width(bits):
    """Of few values, a clip at the first of them has no divergence: the bins below are empty."""
    x = np.random.default_rng(0).integers(-100, 100, size=4096).astype(np.float32)
    seen = statistics.of_tensor(jnp.asarray(x), (1,), with_values=True)
    target = SIGNED._replace(bits=jnp.float32(bits))
    largest = np.abs(x).max()
    found = oracle.modelopt(oracle.magnitudes(x), 1 << (bits - 1))
    want = oracle.last_of_equals(found) * largest / 2048
    assert want > 0.06 * largest
    clip = lambda rule: -ranges.derive(rule, seen, target).low.item()  # noqa: E731
    assert clip(KL_MODELOPT) == pytest.approx(want, rel=1e-3)
    fewer = ranges.kl_tensorrt(dataclasses.replace(MODELOPT, name="fewer", fewest_bins=0))
    if bits < 6:
        assert clip(fewer) < 0.02 * largest


FEW_VALUES = {
    "pixels": lambda draw: draw.integers(0, 17, size=5000) / 16,
    "rounded": lambda draw: np.round(3.0 * draw.normal(size=768)),
    "ternary": lambda draw: draw.choice([-2.0, -1.0, 0.0, 1.0, 2.0], size=5000),
    "normal": lambda draw: draw.normal(size=20_000),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", FEW_VALUES)
@pytest.mark.parametrize("bits", [4, 8])
def test_modelopt_takes_the_widest_of_equal_clips(kind, bits):
    """Pixels of 17 values had a sixteenth of their range: a clip at the first of them has no
    divergence, and neither has keeping all."""
    x = np.float32(FEW_VALUES[kind](np.random.default_rng(0)))
    found = oracle.modelopt(oracle.magnitudes(x), 1 << (bits - 1))
    largest = np.abs(x).max()
    want = oracle.last_of_equals(found) * largest / 2048
    seen = statistics.of_tensor(jnp.asarray(x), (1,), with_values=True)
    target = SIGNED._replace(bits=jnp.float32(bits))
    low, high, _ = ranges.derive(KL_MODELOPT, seen, target)
    assert max(-low.item(), high.item()) == pytest.approx(want, rel=1e-3)


def test_modelopt_starts_at_128_bins_for_256_levels_too():
    """Unsigned codes of 8 bits, and one outlier that leaves most bins empty."""
    x = np.append(np.abs(np.random.default_rng(0).normal(size=20_000)), 60.0).astype(np.float32)
    want = oracle.last_of_equals(oracle.modelopt(oracle.magnitudes(x), 256)) * 60.0 / 2048
    assert want < 5.0
    seen = statistics.of_tensor(jnp.asarray(x), (1,), with_values=True)
    target = Target(integer(signed=False), False, jnp.float32(8))
    assert ranges.derive(KL_MODELOPT, seen, target).high.item() == pytest.approx(want, rel=1e-3)
