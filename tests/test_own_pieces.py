"""Pieces of a user's own that are none: refused where a quantizer is made, or NaN; never silent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, ranges
from quantjax.formats import LevelFormat, ScaleRule
from quantjax.rounding import ROUNDINGS, Rounding, expect_whole
from tests.models import dense, planned, policy
from tests.refused import refused

CASE = dense()
WRONG = {
    "halves": (lambda v: jnp.round(v * 2) / 2, "makes -130.5 of -130.5"),
    "a sum": (jnp.sum, "makes float32[scalar] of float32[10]"),
    "integers": (lambda v: jnp.round(v).astype(jnp.int32), "makes int32[10] of float32[10]"),
    "noise without a word": (lambda v, noise: jnp.floor(v + noise), "without is_random=True"),
    "by the others": (lambda v: jnp.round(v - v.mean() / 10.0), "of -130.5"),
    "too far": (lambda v: jnp.floor(v) - 1.0, "makes -132 of -130.5"),
}
RIGHT = [
    *ROUNDINGS,
    Rounding("half_up", lambda v: jnp.floor(v + 0.5), is_nearest=True),
    Rounding("toward_zero", jnp.trunc, is_nearest=False),
    Rounding("dithered", lambda v, noise: jnp.floor(v + noise), is_nearest=False, is_random=True),
]


@pytest.mark.parametrize("name", WRONG)
def test_a_rounding_that_is_none_is_refused_where_a_quantizer_is_made(name):
    apply, problem = WRONG[name]
    own = Rounding("mine", apply, is_nearest=False)
    for make in (qj.weight_quantizer, qj.activation_quantizer):
        with refused(errors.QuantizerError, "the rounding mine", problem):
            make(rounding=own)
    with refused(errors.QuantizerError, problem):
        jax.jit(lambda x: (qj.weight_quantizer(rounding=own), x)[1])(1.0)


def test_one_that_is_not_nearest_does_not_claim_it():
    with refused(errors.QuantizerError, "the rounding down makes 6 of 6.9"):
        qj.weight_quantizer(rounding=Rounding("down", jnp.floor, is_nearest=True))


@pytest.mark.parametrize("rounding", RIGHT, ids=lambda rounding: rounding.name)
def test_roundings_are_taken(rounding):
    expect_whole(rounding, where="here")
    assert qj.weight_quantizer(rounding=rounding).rounding == rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed(LevelFormat):
    """Levels in the order that is given."""

    max_bits: int = 2
    rows: tuple[float, ...] = (-1.0, 0.0, 1.0, 1.0)
    name = "listed"

    def levels(self, bits, theta=()):
        return jnp.asarray(self.rows, jnp.float32) if not theta else theta["levels"]


def test_levels_that_descend_are_refused():
    """In the order of two's complement, say: simulation and codes differed by several units."""
    with refused(errors.FormatError, "the level -2 comes behind 1", "Listed.levels at 2 bits"):
        qj.weight_quantizer(bits=2, format=Listed(rows=(0.0, 1.0, -2.0, -1.0)))
    assert qj.weight_quantizer(bits=2, format=Listed()).format == Listed()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen(Listed):
    """Levels by the width, with an if."""

    def levels(self, bits, theta=()):
        return super().levels(bits) if bits > 1 else super().levels(bits) * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched(Listed):
    """Levels of a table of NumPy's."""

    def levels(self, bits, theta=()):
        return jnp.asarray(np.float32([[0, 0, 0, 1]] * 3)[np.asarray(bits).astype(int)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing(Listed):
    """No levels."""

    def levels(self, bits, theta=()):
        return None


def test_levels_that_are_none_or_depend_on_a_python_if_are_refused():
    wrong = ((Chosen(), "the number of a width"), (Fetched(), "the number of a width"))
    for format, problem in (*wrong, (Nothing(), "levels makes None")):
        with refused(errors.FormatError, problem, f"{type(format).__name__}.levels"):
            qj.weight_quantizer(bits=2, format=format)
        with refused(errors.FormatError, problem):
            qj.check_format(format)


MADE = {
    "negative": lambda span: -span.quotient,
    "zero": lambda span: 0.0 * span.quotient,
    "infinite": lambda span: jnp.inf * span.quotient,
    "nan": lambda span: jnp.nan * span.quotient,
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_a_scale_rule_that_makes_no_scale_is_not_taken_for_one(name, symmetric):
    """It was clipped to the nearest normal number: a layer of zeros, and nothing said so."""
    format = qj.integer(scale_rule=ScaleRule("mine", MADE[name]))
    plan = planned(CASE, policy(qj.weight_quantizer(bits=4, format=format, symmetric=symmetric)))
    with refused(errors.DataError, "site w, weight", "a scale rule of yours"):
        qj.calibrate(plan, {}, CASE.params)
    traced = jax.jit(lambda params: qj.calibrate(plan, {}, params))(CASE.params)
    assert np.isnan(traced["w"]["weight"].scale).all()
    # Of nothing but zeros no rule is asked.
    zeros = jax.tree.map(jnp.zeros_like, CASE.params)
    assert (qj.calibrate(plan, {}, zeros)["w"]["weight"].scale == 1.0).all()


def test_a_scale_rule_may_be_any_that_makes_scales():
    doubled = qj.integer(scale_rule=ScaleRule("doubled", lambda span: 2.0 * span.quotient))
    tiny = jax.tree.map(lambda leaf: leaf * jnp.float32(1e-37), CASE.params)

    def scale(format, params):
        plan = planned(CASE, policy(qj.weight_quantizer(format=format)))
        return np.asarray(qj.calibrate(plan, {}, params)["w"]["weight"].scale)

    want = 2.0 * scale(qj.integer(), CASE.params)
    np.testing.assert_allclose(scale(doubled, CASE.params), want, rtol=1e-6)
    assert (scale(doubled, tiny) > 0.0).all()


def test_a_range_rule_is_named_by_its_own_name():
    def whole(statistics, target):
        reach = jnp.abs(statistics.sample[0])
        return ranges.Range(-reach, reach, jnp.asarray(True))

    own = qj.RangeRule("mine", whole, reads_distribution=True)
    for rule in (own, ranges.stack([ranges.MSE, own])[1]):
        plan = planned(CASE, policy(qj.weight_quantizer()))
        with refused(errors.PolicyError, "the rule mine returned a bound of shape"):
            qj.calibrate(plan, {}, CASE.params, rule=rule)


def soft(point):
    return jnp.where(point.is_inside, 1.0, 0.1)


def begun(qparams, format):
    return {"a": qparams.scale}


MEANT = {
    "a name in place of names": ({"parameters": "a", "start": begun}, "parameters 'a'"),
    "a slope of two": ({"slope": 2.0}, "a slope that is no function"),
}
MADE_WRONG = {
    "no slope": ({"slope": lambda point: None}, "slope .* makes None"),
    "a sum of slopes": (
        {"slope": lambda point: jnp.stack([soft(point)] * 2)},
        r"slope .* makes float32\[2, ",
    ),
    "nothing to start from": ({"parameters": ("a",)}, "mine has no start for a"),
    "text for a slope": ({"slope": lambda point: "one"}, "slope .* makes a str"),
    "another name": (
        {"parameters": ("a",), "start": lambda qparams, format: {"b": qparams.scale}},
        "start .* makes a dict, and arrays by the names a are",
    ),
    "a start for each of seven": (
        {"parameters": ("a",), "start": lambda qparams, format: {"a": jnp.ones(7)}},
        r"start .* makes float32\[7\]",
    ),
    "a scale in place of QParams": (
        {"parameters": ("a",), "start": begun, "resolve": lambda q, own, format, shape: own["a"]},
        "resolve .* and QParams are needed",
    ),
    "a row": (
        {
            "parameters": ("a",),
            "start": begun,
            "transform": lambda x, q, own, format: jnp.stack([x, x]),
        },
        "transform .* makes float32",
    ),
}


@pytest.mark.parametrize("name", MEANT)
def test_an_estimator_that_is_none_is_refused_where_a_quantizer_is_made(name):
    fields, problem = MEANT[name]
    own = qj.estimators.Estimator(**{"name": "mine", "slope": soft, **fields})
    with refused(errors.EstimatorError, "the estimator mine has", problem):
        qj.weight_quantizer(estimator=own)


@pytest.mark.parametrize("name", MADE_WRONG)
def test_what_an_estimator_makes_is_looked_at_where_it_is_used(name):
    fields, problem = MADE_WRONG[name]
    own = qj.estimators.Estimator(**{"name": "mine", "slope": soft, **fields})
    plan = planned(CASE, policy(qj.weight_quantizer(estimator=own)))

    def loss(params):
        return qj.fake_quantize(CASE.f, plan)(qj.calibrate(plan, {}, params), params, CASE.x).sum()

    with pytest.raises(errors.EstimatorError, match=problem) as caught:
        jax.grad(loss)(CASE.params)
    assert "the estimator mine" in str(caught.value)


def test_a_slope_may_be_one_number_for_all():
    x = jnp.linspace(-1.0, 1.0, 9)
    for number in (0.5, 1, True, np.float32(2.0), np.int64(3), jnp.int32(4)):
        own = qj.estimators.Estimator("mine", lambda point, n=number: n)
        slope = jax.grad(lambda x, e=own: qj.fake_quant(x, 0.1, bits=8, estimator=e).sum())(x)
        np.testing.assert_allclose(slope, number)


def test_masks_are_slopes_and_further_parameters_are_kept():
    x = jnp.array([0.2, 9.0])
    own = qj.estimators.Estimator("mine", lambda point: point.is_inside)
    slope = jax.grad(lambda x: qj.fake_quant(x, 1.0, bits=2, estimator=own).sum())(x)
    np.testing.assert_array_equal(slope, [1.0, 0.0])
    begin = lambda qparams, format: {"a": jnp.int32(1), "b": [[2.0]]}  # noqa: E731
    own = qj.estimators.Estimator("mine", soft, ("a",), start=begin)
    plan = planned(CASE, policy(qj.weight_quantizer(estimator=own)))
    theta = qj.calibrate(plan, {}, CASE.params)["w"]["weight"].theta
    assert {name: float(leaf.mean()) for name, leaf in theta.items()} == {"a": 1.0, "b": 2.0}


def test_levels_may_be_a_list():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plain(Listed):
        def levels(self, bits, theta=()):
            return [-1.0, 0.0, 1.0, 2.0]

    x = jnp.array([-3.0, 0.4, 1.7])
    assert qj.weight_quantizer(bits=2, format=Plain()).format == Plain()
    assert qj.fake_quant(x, 1.0, bits=2, format=Plain()).tolist() == [-1.0, 0.0, 2.0]


def test_parameters_may_have_the_shape_of_the_weight():
    """Those of AdaRound, say."""

    def begin(qparams, format):
        return {"v": jnp.zeros(CASE.params["w"].shape, jnp.float32)}

    own = qj.estimators.Estimator("mine", soft, ("v",), start=begin)
    plan = planned(CASE, policy(qj.weight_quantizer(estimator=own)))
    found = qj.calibrate(plan, {}, CASE.params)["w"]["weight"].theta["v"]
    assert found.shape == CASE.params["w"].shape
