"""Data that is no configuration, and values that no file can hold: each is refused and named."""

import dataclasses
import enum
import functools
import json
from typing import NamedTuple

import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import errors, ranges
from quantjax.ranges import MIN_MAX, RangeRule
from quantjax.rounding import HALF_EVEN, Rounding
from quantjax.selectors import Selector
from quantjax.storage.codec import decode, encode
from tests.refused import refused
from tests.storage.cases import DOWN, OWN, Marked, Side, Sided, trip

# What a field that is younger than the file takes


def test_a_missing_field_takes_its_default():
    assert decode({"type": "PerChannel"}) == qj.PerChannel()
    assert decode({"type": "IntegerFormat", "max_bits": 4}) == qj.integer(max_bits=4)


def test_a_missing_field_without_a_default_is_refused():
    data = encode(qj.weight_quantizer(bits=4))
    del data["symmetric"]
    with refused(errors.StorageError, "Quantizer needs the field 'symmetric'", "where: here"):
        decode(data, at="here")


# Refusals when reading


def test_an_unknown_class_is_named():
    data = encode(qj.Policy([qj.rule(Sided(Side.LEFT), qj.Scheme())]))
    with refused(errors.StorageError, "'Sided' is not known", "rules[0].selector", "extra=("):
        decode(data, at="policy")
    with refused(errors.StorageError, "enumeration 'Side' is not known", "selector.side"):
        decode(data, extra=(Sided,), at="policy")
    assert decode(data, extra=(Sided, Side)).rules[0].selector == Sided(Side.LEFT)


@pytest.mark.parametrize("own", OWN[:3], ids=lambda value: value.name)
def test_an_unregistered_value_is_named(own):
    data = encode(own)
    with refused(errors.StorageError, f"'{own.name}' is not known", "known: ", "extra=("):
        decode(data)
    assert decode(data, extra=(own,)) is own


def test_values_stand_for_their_class_in_extra():
    value = Sided(Side.RIGHT)
    assert trip(value, (value, Side.LEFT)) == value
    assert trip(Marked(max_bits=3), (Marked(),)) == Marked(max_bits=3)


def test_a_name_of_another_kind_is_not_found():
    with refused(errors.StorageError, "the estimator 'half_even' is not known"):
        decode({"estimator": "half_even"})


def test_close_names_are_proposed():
    with refused(errors.StorageError, "'PerGroup'"):
        decode({"type": "PerGruop", "size": 3})
    with refused(errors.StorageError, "no field 'sise'", "its fields: size, axis", "'size'"):
        decode({"type": "PerGroup", "sise": 3})
    with refused(errors.StorageError, "member of RangeMode 'LIVELY' is not known", "FIXED, LIVE"):
        decode({"enum": "RangeMode.LIVELY"})


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"PerGroup": 64},
        {"rounding": 3},
        {"rounding": "half_even", "estimator": "clipped"},
        {"float": "huge"},
        {"enum": ["Role", "WEIGHT"]},
        {"__class__": "os.system"},
    ],
)
def test_objects_that_do_not_say_what_they_are(data):
    with refused(errors.StorageError, "what it is", "where: here"):
        decode(data, at="here")


@pytest.mark.parametrize("name", [None, 3, ["PerGroup"], {"type": "PerGroup"}, "os.system", ""])
def test_types_that_are_no_known_name(name):
    with refused(errors.StorageError, "is not known"):
        decode({"type": name})


def test_an_unknown_dtype():
    with refused(errors.StorageError, "no dtype is called 'float12'"):
        decode({"dtype": "float12"})


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"bits": 4', '"bits": "4"', "weights.bits"),
        ('"bits": 4', '"bits": true', "weights.bits"),
        ('"bits": 4', '"bits": 4.0', "weights.bits"),
        ('"symmetric": true', '"symmetric": 1', "weights.symmetric"),
        ('{"rounding": "half_even"}', '{"estimator": "clipped"}', "weights.rounding"),
        ('{"rounding": "half_even"}', "null", "weights.rounding"),
        ('{"enum": "RangeMode.FIXED"}', '"fixed"', "weights.range"),
        ('"optional": false', '"optional": null', "rules[0].optional"),
        ('{"type": "Weighted"}', '{"type": "PerTensor"}', "rules[0].selector"),
        ('"activations": null', '"activations": {"type": "Scheme"}', "scheme.activations"),
    ],
)
def test_values_that_their_field_cannot_hold(old, new, where):
    policy = qj.uniform_policy(weight_bits=4, activation_bits=None)
    text = json.dumps(encode(policy))
    assert old in text
    with refused(errors.StorageError, where, " is no "):
        decode(json.loads(text.replace(old, new, 1)), at="policy")


def test_rules_are_rules():
    with refused(errors.StorageError, "policy.rules", "is no "):
        decode({"type": "Policy", "rules": [{"type": "PerTensor"}]}, at="policy")
    with refused(errors.StorageError, "policy.rules", "is no "):
        decode({"type": "Policy", "rules": "all"}, at="policy")


def test_what_a_class_refuses_is_said_with_its_place_in_the_file():
    with refused(errors.StorageError, "integer containers hold 1 to 16 bits", "where: x.format"):
        decode({"type": "IntegerFormat", "max_bits": 40}, at="x.format")
    data = encode(qj.weight_quantizer(bits=4)) | {"bits": 9}
    with refused(errors.StorageError, "Quantizer cannot exist: 9 bits do not fit"):
        decode(data)


# Refusals when writing


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, {1}, Pair(1, 2), b"x", 1j, object(), len, qj.PerTensor, jnp.ones(2)],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_no_configuration(value):
    with refused(errors.StorageError, "cannot be written to a file", "where: policy[1]"):
        encode((0, value), at="policy")


def test_a_rule_of_a_sweep_is_no_configuration():
    indexed = ranges.stack([MIN_MAX])[0]
    with refused(errors.StorageError, "IndexedRule cannot be written", "where: value.rule"):
        encode(indexed, at="value.rule")


def test_own_values_with_names_of_the_library():
    impostor = Rounding("half_even", jnp.floor, is_nearest=False)
    with refused(errors.StorageError, "rounding half_even is not the library's", "rename"):
        encode(impostor)
    with refused(errors.StorageError, "two things are called rounding half_even", "rename"):
        decode(None, extra=(impostor,))
    assert decode(None, extra=(HALF_EVEN,)) is None  # the library's own, once more


def test_own_classes_with_names_of_the_library():
    impostor = dataclasses.make_dataclass("PerTensor", [], frozen=True)
    with refused(errors.StorageError, "PerTensor is not the library's"):
        encode(impostor())
    with refused(errors.StorageError, "two things are called PerTensor"):
        decode(None, extra=(impostor,))
    role = enum.Enum("Role", ["WEIGHT"])
    with refused(errors.StorageError, "Role is not the library's"):
        encode(role.WEIGHT)


def test_two_of_the_user_s_own_with_one_name():
    other = DOWN._replace(apply=jnp.ceil)
    with refused(errors.StorageError, "two things are called rounding down"):
        decode(None, extra=(DOWN, other))
    assert decode({"rounding": "down"}, extra=(DOWN, DOWN)) is DOWN


@pytest.mark.parametrize("value", [3, "down", len, object, RangeRule])
def test_extra_that_has_no_name_in_a_file(value):
    with refused(errors.StorageError, "cannot be named in a file", "where: extra"):
        decode(None, extra=(value,))


class Hidden(Selector):
    """Undecorated, with state that no field tells of."""

    def __init__(self, names: tuple[str, ...]) -> None:
        object.__setattr__(self, "names", names)

    def matches(self, site: qj.Site) -> bool:
        return site.name in self.names

    def __str__(self) -> str:
        return "hidden"


class Bare(Selector):
    """Undecorated, without state."""

    def matches(self, site: qj.Site) -> bool:
        return bool(site.name)

    def __str__(self) -> str:
        return "bare"


def test_state_outside_of_fields_would_be_lost():
    with refused(errors.StorageError, "Hidden holds 'names'", "dataclass"):
        encode(Hidden(("a",)))
    assert trip(Bare(), (Bare,)) == Bare()


@dataclasses.dataclass(frozen=True)
class Cached(Selector):
    """A selector that remembers something it computed."""

    pattern: str

    @functools.cached_property
    def parts(self) -> list[str]:
        return self.pattern.split("/")

    def matches(self, site: qj.Site) -> bool:
        return site.name.split("/") == self.parts

    def __str__(self) -> str:
        return self.pattern


def test_what_a_class_can_compute_again_is_not_written():
    value = Cached("a/b")
    assert value.parts == ["a", "b"]
    assert trip(value, (Cached,)) == value


def test_a_field_named_like_the_tag():
    cls = dataclasses.make_dataclass("Typed", [("type", str)], frozen=True)
    with refused(errors.StorageError, "Typed holds 'type'", "taken"):
        encode(cls("x"))
