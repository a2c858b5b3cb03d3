"""The contract finds what is wrong with a format: each test breaks one thing of a good one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.contract import Trial, check_format, counterexamples, widths
from quantjax.formats import ALL_LAWS, E4M3FN, NF4, Format, IntegerFormat, Law, Snapped, ternary
from quantjax.rounding import FLOOR, HALF_AWAY, HALF_EVEN, STOCHASTIC
from tests.refused import refused

ZERO = jnp.float32(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Format):
    """Integers from -8 to 8 in 5 bits; a good format, for the others to break."""

    max_bits: int = 5

    @property
    def name(self):
        return "whole"

    @property
    def laws(self):
        return ALL_LAWS

    @property
    def storage_dtype(self):
        return jnp.dtype(jnp.int8)

    def level_range(self, bits, theta=()):
        ends = jnp.full_like(bits, 8.0)
        return -ends, ends

    def valid_bits(self, bits, theta=()):
        return (bits == 0.0) | (bits == 5.0)

    def snap(self, scaled, zero_point, bits, rounding, theta=()):
        unclipped = rounding.apply(scaled)
        return Snapped(jnp.clip(unclipped, -8.0, 8.0), unclipped)


class Breaks(Whole):
    """A base for formats whose snap is another."""

    def level(self, level, scaled):
        raise NotImplementedError

    def snap(self, scaled, zero_point, bits, rounding, theta=()):
        level, unclipped = super().snap(scaled, zero_point, bits, rounding, theta)
        return Snapped(jnp.clip(self.level(level, scaled), -8.0, 8.0), unclipped)


class Creeping(Breaks):
    """Rounds half of the levels on."""

    def level(self, level, scaled):
        return jnp.where(scaled == level, level + jnp.where(level == 3.0, 1.0, 0.0), level)


class Jumping(Breaks):
    """Steps back at one border."""

    def level(self, level, scaled):
        return jnp.where((scaled > 2.4) & (scaled < 2.5), 1.0, level)


class Floored(Breaks):
    """Rounds down whatever it is told."""

    def level(self, level, scaled):
        return jnp.floor(scaled)


class Lifted(Breaks):
    """Has no zero."""

    def level(self, level, scaled):
        return jnp.where(level == 0.0, 1.0, level)


class Lopsided(Breaks):
    """Has a level less below zero."""

    def level(self, level, scaled):
        return jnp.maximum(level, -7.0)


class Halved(Breaks):
    """Has levels between the integers."""

    def level(self, level, scaled):
        return jnp.where(jnp.abs(scaled) < 1.0, jnp.round(2.0 * scaled) / 2.0, level)

    def encode(self, levels, bits, theta=()):
        return (2.0 * levels).astype(jnp.int8)

    def decode(self, codes, bits, theta=()):
        return codes.astype(jnp.float32) / 2.0


class Unscaled(Breaks):
    """Looks at the size of what it quantizes, as no format can in earnest: snap sees quotients."""

    def level(self, level, scaled):
        return level


class Renumbered(Whole):
    """Gives the highest level the code of another that decodes to the same."""

    def encode(self, levels, bits, theta=()):
        return jnp.where(levels == 8.0, 9, levels).astype(jnp.int8)

    def decode(self, codes, bits, theta=()):
        return jnp.minimum(codes, 8).astype(jnp.float32)


class Forgetful(Whole):
    """Encodes what it does not decode."""

    def encode(self, levels, bits, theta=()):
        return (levels + jnp.where(levels == 5.0, 1.0, 0.0)).astype(jnp.int8)


class Numb(Whole):
    """Loses NaN."""

    def snap(self, scaled, zero_point, bits, rounding, theta=()):
        level, unclipped = super().snap(scaled, zero_point, bits, rounding)
        return Snapped(jnp.nan_to_num(level), unclipped)


class Boastful(Whole):
    """Has a range that is too small."""

    def level_range(self, bits, theta=()):
        return jnp.full_like(bits, -8.0), jnp.full_like(bits, 7.0)


class Endless(Whole):
    """Has no end."""

    def level_range(self, bits, theta=()):
        return jnp.full_like(bits, -jnp.inf), jnp.full_like(bits, 8.0)


class Lonely(Whole):
    """Has a single level."""

    def snap(self, scaled, zero_point, bits, rounding, theta=()):
        return Snapped(jnp.zeros_like(scaled), scaled)


class Crowded(Whole):
    """Has more levels than codes."""

    def valid_bits(self, bits, theta=()):
        return (bits == 0.0) | (bits == 4.0)


class Nowhere(Whole):
    """Has no width."""

    def valid_bits(self, bits, theta=()):
        return bits == 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(Whole):
    """Cannot be hashed."""

    levels: list = dataclasses.field(default_factory=list)


def test_a_good_format_passes():
    assert check_format(Whole()) == ALL_LAWS


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Creeping, Law.IDEMPOTENT),
        (Jumping, Law.MONOTONE),
        (Floored, Law.NEAREST),
        (Lifted, Law.ZERO),
        (Lopsided, Law.ODD),
        (Halved, Law.INTEGER),
        (Renumbered, Law.ROUND_TRIP),
    ],
)
def test_a_broken_law_is_found_and_named(broken, law):
    found = counterexamples(broken(), 5)
    assert law in found
    with refused(errors.FormatError, "whole5 breaks its law"):
        check_format(broken())


@pytest.mark.parametrize("law", [law for law in Law if law is not Law.RESCALED])
def test_each_law_is_broken_by_some_format_here(law):
    family = (Creeping, Jumping, Floored, Lifted, Lopsided, Halved, Renumbered)
    assert any(law in counterexamples(broken(), 5) for broken in family)


def test_a_format_cannot_see_the_scale_unless_its_rule_does():
    # RESCALED speaks of float32: no format sees more than the quotient, which is the same.
    assert counterexamples(Unscaled(), 5) == {}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Forgetful, "codes do not stand for what is simulated"),
        (Numb, "makes a number of NaN"),
        (Boastful, "has levels from -8 to 8"),
        (Endless, "has levels from -8 to 8"),
        (Lonely, "has 1 levels"),
        (Crowded, "has 17 levels at 4 bits"),
        (Nowhere, "has no width"),
        (Listed, "must be hashable"),
    ],
)
def test_what_no_format_may_do(broken, message):
    with refused(errors.FormatError, message):
        check_format(broken())


def test_a_counterexample_can_be_reproduced():
    text = counterexamples(qj.integer(), 4)[Law.ODD]
    real, scale = (float(text.split(word)[1].split()[0]) for word in ("x = ", "scale "))
    x = jnp.float32(real)
    there, back = (float(qj.fake_quant(side * x, scale, bits=4)) for side in (1.0, -1.0))
    assert there != -back
    assert f"{there:.9g}" in text


def test_widths():
    assert widths(Whole()) == [5]
    assert widths(NF4) == [4]
    assert widths(qj.integer(max_bits=3)) == [1, 2, 3]
    theta = {"exponent_bits": jnp.float32(2.0)}
    assert widths(E4M3FN, theta) == [3, 4, 5, 6, 7, 8]


def test_laws_that_a_rounding_does_not_keep_are_not_asked_for():
    broken = counterexamples(qj.integer(), 4, Trial(FLOOR))
    assert not broken
    with_real_scale = Trial(FLOOR, np.full((1, 1), 1.3, np.float32))
    assert Law.IDEMPOTENT not in with_real_scale.laws
    # For a reason: a quotient falls below its level.
    again = qj.fake_quant(qj.fake_quant(X, 0.1, rounding=FLOOR), 0.1, rounding=FLOOR)
    assert (again != qj.fake_quant(X, 0.1, rounding=FLOOR)).any()


X = jnp.linspace(-9.0, 9.0, 1001)


@pytest.mark.parametrize("rounding", [HALF_EVEN, HALF_AWAY, STOCHASTIC])
def test_trials_of_a_granularity(rounding):
    scales = np.float32([[1.0, 2.0, 4.0]])
    trial = Trial(rounding, scales, (2, 3))
    assert trial.is_exact
    narrow = IntegerFormat(max_bits=8, narrow=True)
    assert check_format(narrow, trials=[trial]) >= narrow.laws
    assert not trial._replace(scales=1.3 * scales).is_exact
    assert not trial._replace(dtype=jnp.bfloat16).is_exact


def test_parameters_are_those_of_the_trial():
    near = {"threshold": jnp.float32(0.5)}
    far = {"threshold": jnp.float32(0.9)}
    assert Law.NEAREST not in counterexamples(ternary(), 2, Trial(theta=near))
    assert Law.NEAREST in counterexamples(ternary(), 2, Trial(theta=far))


class Apart(Whole):
    """Has codes of its own outside of programs, as where a table is computed otherwise there."""

    def encode(self, levels, bits, theta=()):
        codes = super().encode(levels, bits, theta)
        moved = jnp.where(levels == 5.0, codes - 1, codes)
        return codes if isinstance(levels, jax.core.Tracer) else moved


def test_codes_that_depend_on_the_program_are_found():
    with refused(errors.FormatError, "eagerly", "the nearest level"):
        check_format(Apart())
