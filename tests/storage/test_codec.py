"""Configuration as JSON data: it comes back equal, and nothing else comes back at all."""

import enum
import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantjax as qj
from quantjax import errors, estimators, formats, granularity, ranges, rounding, selectors
from quantjax.estimators import CLIPPED
from quantjax.interpreter import Op, Role, SiteStatus
from quantjax.ranges import MIN_MAX
from quantjax.rounding import HALF_AWAY
from quantjax.storage.codec import decode, encode
from quantjax.storage.known import BUILT_IN, DATACLASSES, ENUMS, KINDS, NAMED, kind_of
from tests import models
from tests.refused import refused
from tests.storage import cases
from tests.storage.cases import OWN, Side, trip

# Laws


@given(cases.library_policies)
def test_policies_come_back_equal(policy):
    back = trip(policy)
    assert back == policy
    assert hash(back) == hash(policy)
    assert str(back) == str(policy)


@given(cases.own_policies)
def test_policies_of_own_classes_come_back_equal(policy):
    assert trip(policy, OWN) == policy


@given(cases.library_policies)
def test_encoding_again_gives_the_same_data(policy):
    assert encode(trip(policy)) == encode(policy)


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8))
def test_plain_values_come_back_equal_and_of_the_same_type(value):
    back = trip(value)
    assert back == value
    assert repr(back) == repr(value)  # tells 1, 1.0 and True apart, and 0.0 from -0.0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_floats_that_json_lacks(value):
    assert repr(trip(value)) == repr(value)


@pytest.mark.parametrize("cls", ENUMS)
def test_every_member_of_every_enumeration(cls):
    for member in cls:
        assert trip(member) is member


@pytest.mark.parametrize("value", NAMED, ids=lambda value: value.name)
def test_named_functions_come_back_as_the_very_ones(value):
    back = trip(value)
    assert type(back) is type(value)
    assert all(a is b for a, b in zip(back, value, strict=True))


@pytest.mark.parametrize("name", ["int8", "uint4", "bfloat16", "float8_e4m3fn", "float64", "bool"])
def test_dtypes(name):
    assert trip(np.dtype(name)) == np.dtype(name)


@pytest.mark.parametrize("case", [models.cnn, models.mlp, models.dense])
def test_the_sites_of_a_model(case):
    case = case()
    sites = qj.sites(case.f, case.params, case.x).sites
    assert trip(sites) == sites
    assert all(field in encode(sites)[0] for field in ("name", "op", "scope", "operands", "steps"))


def test_what_a_plan_derives_is_no_configuration():
    plan = models.planned(models.dense(), qj.uniform_policy())
    with refused(errors.StorageError, "the class 'SitePlan' is not known"):
        trip(plan.sites[0])


def test_numpy_numbers_become_python_s():
    assert trip((np.int64(3), np.bool_(True), np.float32(0.5))) == (3, True, 0.5)
    assert trip(qj.PerGroup(np.int32(32))) == qj.PerGroup(32)


# The form


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (
            qj.PerGroup(64),
            {
                "type": "PerGroup",
                "size": 64,
                "axis": None,
                "remainder": {"enum": "Remainder.REFUSE"},
            },
        ),
        (qj.PerTensor(), {"type": "PerTensor"}),
        (qj.RangeMode.LIVE, {"enum": "RangeMode.LIVE"}),
        (Op.DOT, {"enum": "Op.DOT"}),
        (Role.WEIGHT, {"enum": "Role.WEIGHT"}),
        (SiteStatus.OPAQUE, {"enum": "SiteStatus.OPAQUE"}),
        (HALF_AWAY, {"rounding": "half_away"}),
        (CLIPPED, {"estimator": "clipped"}),
        (MIN_MAX, {"range_rule": "min_max"}),
        ((1, (2.5, "x"), None), [1, [2.5, "x"], None]),
        (float("-inf"), {"float": "-inf"}),
        (np.dtype("int8"), {"dtype": "int8"}),
        (
            qj.integer(max_bits=4, signed=False),
            {
                "type": "IntegerFormat",
                "max_bits": 4,
                "signed": False,
                "scale_rule": {"scale_rule": "real"},
                "narrow": False,
            },
        ),
        (Side.LEFT, {"enum": "Side.LEFT"}),
    ],
)
def test_how_it_is_written(value, data):
    assert encode(value) == data


def test_every_public_value_of_a_room_can_be_written():
    """What somebody adds to a room and not to the table is found here."""
    rooms = (estimators, formats, granularity, ranges, rounding, selectors, qj)
    for room in rooms:
        for name, value in vars(room).items():
            if isinstance(value, tuple(KINDS.values())):
                assert trip(value) == value, name
            named = inspect.isclass(value) and not inspect.isabstract(value)
            static = (formats.Format, granularity.Granularity, selectors.Selector)
            if named and issubclass(value, static) and value is not granularity.Granularity:
                assert BUILT_IN.classes.get(value.__name__) is value, name
            other = formats.Law | estimators.Need | enum.IntEnum
            described = issubclass(value, other) if named else True
            if named and issubclass(value, enum.Enum) and not described:
                assert BUILT_IN.enums.get(value.__name__) is value, name


def test_every_known_class_is_frozen():
    for cls in DATACLASSES:
        assert cls.__dataclass_params__.frozen, cls


SETTINGS = [
    ranges.admm(rho=3.0),
    ranges.admm(iterations=7, inner=1),
    ranges.hqo(solved=ranges.Solved.SCALE, p=0.5),
    ranges.hqo(solved=ranges.Solved.ZERO_POINT, iterations=4),
    ranges.k_means(iterations=3),
    ranges.kl_tensorrt(ranges.Variant(name="coarse", bins=512, stride=4, copies_first_bin=True)),
    ranges.kl_onnxruntime(bins=513),
    ranges.least_squares(iterations=3),
    ranges.ttq(threshold=0.1),
]


@pytest.mark.parametrize("rule", SETTINGS, ids=lambda rule: rule.name)
def test_rules_with_settings_come_back(rule):
    """They were written by their names, and could not be read."""
    assert trip(rule) == rule
    assert encode(rule).keys() == {kind_of(rule), "settings"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"fit_rule": "admm", "settings": {"rho": -1.0}}, "no settings of admm"),
        ({"fit_rule": "admm", "settings": {"speed": 1}}, "no settings of admm"),
        ({"fit_rule": "admm", "settings": [1]}, "no settings of admm"),
        ({"range_rule": "admm", "settings": {"rho": 3.0}}, "admm is no range rule"),
        ({"fit_rule": "magic", "settings": {}}, "magic"),
    ],
)
def test_settings_that_no_rule_has_are_refused(data, said):
    with refused(errors.StorageError, said):
        decode(data)
