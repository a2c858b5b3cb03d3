"""Formats, rules and selectors of a user's own that are not what they have to be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import contract, errors
from quantjax.formats import LevelFormat, width_table
from tests.models import normal
from tests.refused import refused

F = lambda p, x: x @ p["w"]  # noqa: E731
PARAMS, X = {"w": normal(0, 8, 4)}, normal(1, 3, 8)


class Power(LevelFormat):
    """No dataclass, so that its exponent is none of its fields."""

    name = "power"

    def __init__(self, gamma: float) -> None:
        super().__init__(max_bits=3)
        object.__setattr__(self, "gamma", gamma)

    def levels(self, bits: Any, theta: Any = ()) -> Any:
        """Powers of eighths."""
        u = jnp.arange(-4.0, 4.0) / 4.0
        return jnp.sign(u) * jnp.abs(u) ** self.gamma


class Hidden(qj.selectors.Selector):
    """A selector with the same fault."""

    def __init__(self, least: int) -> None:
        object.__setattr__(self, "least", least)

    def matches(self, site: qj.Site) -> bool:
        """By the size of the weight."""
        return site.parameters >= self.least

    def __str__(self) -> str:
        return "hidden"


def test_state_that_equality_does_not_see_is_refused():
    """Two such formats are equal: the second one was computed by the programs of the first."""
    assert Power(1.0) == Power(3.0)
    qparams = qj.QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(3.0))
    for use in (
        lambda: qj.fake_quant(X, 1.0, bits=3, format=Power(3.0)),
        lambda: qj.encode(X, qparams, Power(3.0)),
        lambda: qj.weight_quantizer(bits=3, format=Power(3.0)),
        lambda: contract.check_format(Power(3.0)),
    ):
        with refused(errors.ArgumentError, "Power holds 'gamma'", "dataclass(frozen=True)"):
            use()
    for selector in (Hidden(3), ~Hidden(3), qj.first(Hidden(3)), qj.weighted() & Hidden(3)):
        with refused(errors.ArgumentError, "Hidden holds 'least'", "dataclass(frozen=True)"):
            qj.rule(selector, qj.Scheme())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared(LevelFormat):
    """The same levels, with the exponent in a field, and as a NumPy array."""

    max_bits: int = 3
    gamma: float = 1.0
    name = "declared"

    def levels(self, bits: Any, theta: Any = ()) -> Any:
        """Powers of eighths."""
        u = np.arange(-4.0, 4.0) / 4.0
        return np.sign(u) * np.abs(u) ** self.gamma


class Equal(Hidden):
    """With an equality of its own."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and other.least == self.least

    def __hash__(self) -> int:
        return hash(self.least)


@dataclasses.dataclass(frozen=True)
class Derived(qj.selectors.Selector):
    """It keeps what follows from its field."""

    least: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", 2 * self.least)

    def matches(self, site: qj.Site) -> bool:
        """By the size of the weight."""
        return site.parameters >= self.twice

    def __str__(self) -> str:
        return f"{self.least}"


@pytest.mark.parametrize("kind", [Equal, Derived])
def test_what_is_compared_rightly_is_taken(kind):
    rules = [qj.rule(kind(n), qj.Scheme()) for n in (3, 3, 4)]
    assert rules[0] == rules[1] != rules[2]


def test_fields_are_seen():
    x = jnp.linspace(-1.0, 1.0, 9)
    for gamma in (1.0, 3.0):
        levels = Declared(gamma=gamma).levels(None)
        want = [levels[np.abs(levels - v).argmin()] for v in np.asarray(x)]
        got = qj.fake_quant(x, 1.0, bits=3, format=Declared(gamma=gamma))
        assert np.mean(np.abs(np.asarray(got) - want) < 1e-6) > 0.7  # but for ties
    assert Declared(gamma=1.0) != Declared(gamma=3.0)


def test_levels_may_be_a_numpy_array():
    weights = qj.weight_quantizer(bits=3, format=Declared(gamma=2.0))
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(F, PARAMS, X))
    qstate = qj.calibrate(plan, {}, PARAMS)
    frozen = qj.freeze(plan, qstate, PARAMS)
    simulated = qj.fake_quantize(F, plan)(qstate, PARAMS, X)
    assert_array_equal(qj.execute(F, plan)(qstate, frozen, X), simulated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(LevelFormat):
    """Levels of a parameter that its rule finds."""

    max_bits: int = 3
    name = "fitted"

    def levels(self, bits: Any, theta: Any = ()) -> Any:
        """Powers by ``gamma``."""
        u = jnp.arange(-4.0, 4.0) / 4.0
        return jnp.sign(u) * jnp.abs(u) ** theta["gamma"]


def half(x, shape, format, bits):
    """An exponent of 2, and the largest magnitude."""
    scale = jnp.full(shape, jnp.max(jnp.abs(x)))
    return qj.QParams(scale, jnp.zeros(shape), bits, {"gamma": jnp.float32(2.0)})


def test_a_format_waits_for_the_parameters_that_a_rule_finds():
    weights = qj.weight_quantizer(
        bits=3,
        format=Fitted(),
        rule=qj.ranges.FitRule("half", half),
        granularity=qj.PerTensor(),
    )
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(F, PARAMS, X))
    qstate = qj.calibrate(plan, {}, PARAMS)
    scale = float(np.abs(PARAMS["w"]).max())
    levels = np.sign(u := np.arange(-4.0, 4.0) / 4.0) * np.abs(u) ** 2.0 * scale
    w = np.float64(PARAMS["w"])
    want = X @ levels[np.abs(w[..., None] - levels).argmin(-1)].astype(np.float32)
    assert_allclose(qj.fake_quantize(F, plan)(qstate, PARAMS, X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError):  # where there are none, its own error is seen
        qj.fake_quant(X, 1.0, bits=3, format=Fitted())


def test_a_fit_has_the_width_that_it_is_asked_for():
    """One of 8 bits for 2 was believed: a sweep over widths had one result."""

    def stubborn(x, shape, format, bits):
        return qj.QParams(jnp.full(shape, 0.1), jnp.zeros(shape), jnp.float32(8.0))

    weights = qj.weight_quantizer(bits=4, rule=qj.ranges.FitRule("stubborn", stubborn))
    policy = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=weights))])
    plan = qj.plan(policy, qj.sites(F, PARAMS, X))
    assert float(qj.calibrate(plan, {}, PARAMS, weight_bits=8)["w"]["weight"].bits) == 8.0
    with refused(errors.PolicyError, "stubborn returned another width", "8.0 bits", "4.0"):
        qj.calibrate(plan, {}, PARAMS)

    def traced(bits):
        return qj.calibrate(plan, {}, PARAMS, weight_bits=bits)["w"]["weight"]

    found = jax.jit(jax.vmap(traced))(jnp.float32([2.0, 8.0]))
    assert np.isnan(found.scale[0]).all()
    assert np.isfinite(found.scale[1]).all()
    assert found.bits.tolist() == [2.0, 8.0]


def test_tables_that_cannot_be_are_refused():
    for rows, most, said in (
        ({2: (1, 2, 3, 4, 5)}, 2, "5 levels for a width of 2 bits"),
        ({-1: (0, 1), 2: (0, 1)}, 2, "a width of -1 bits"),
        ({2: (1, 0, -1, 2)}, 2, "ascending"),
        ({1: (0, 1)}, 2, "no levels for 2 bits"),
        ({2: ()}, 2, "0 levels"),
    ):
        with refused(errors.FormatError, said):
            width_table(rows, most)


def test_functions_are_not_rules():
    def mine(statistics, target):
        raise AssertionError

    with refused(errors.PolicyError, 'qj.RangeRule("mine", mine)'):
        qj.weight_quantizer(rule=mine)
    with refused(errors.PolicyError, "call it: qj.ranges.percentile(...)"):
        qj.weight_quantizer(rule=qj.ranges.percentile)
    loose = qj.ranges.RangeRule("loose", mine, parameters=3.0)
    with refused(errors.PolicyError, "loose are no tuple", "(3.0,)"):
        qj.weight_quantizer(rule=loose)


def test_a_longer_table_serves_a_smaller_container():
    rows = {0: (0,), 1: (0, 1), 2: (0, 1, 4), 3: (0, 1, 2, 3, 4)}
    assert_array_equal(width_table(rows, 2)[2], [0, 1, 4, 4])
