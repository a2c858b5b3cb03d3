"""Policies are values: they print, compare, hash, and refuse contradictions."""

import pytest

import quantjax as qj
from quantjax import errors
from quantjax.interpreter import SiteStatus
from tests.models import cnn, dense, mlp


def test_uniform_policies_print_short():
    assert str(qj.uniform_policy(weight_bits=4)) == "weighted: w=int4/channel a=uint8/tensor"
    assert str(qj.uniform_policy(activation_bits=None)) == "weighted: w=int8/channel"
    assert str(qj.uniform_policy(weight_bits=None, activation_bits=6)) == "weighted: a=uint6/tensor"
    grouped = qj.uniform_policy(
        weight_bits=4,
        weight_granularity=qj.PerGroup(128),
        activation_granularity=qj.PerToken(),
    )
    assert str(grouped) == "weighted: w=int4/group128 a=uint8/token/live"


def test_no_bits_at_all_is_the_identity():
    assert qj.uniform_policy(weight_bits=None, activation_bits=None) == qj.Policy([])
    assert str(qj.Policy([])) == "identity"


def test_equal_policies_are_equal_and_hash_alike():
    assert qj.uniform_policy(weight_bits=4) == qj.uniform_policy(weight_bits=4)
    assert hash(qj.uniform_policy(weight_bits=4)) == hash(qj.uniform_policy(weight_bits=4))
    assert qj.uniform_policy(weight_bits=4) != qj.uniform_policy(weight_bits=5)
    assert qj.Policy([]) == qj.Policy(())


def test_policies_are_frozen():
    with pytest.raises(AttributeError):
        qj.uniform_policy().rules = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        qj.weight_quantizer().bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(("bits", "container"), [(1, 8), (8, 8), (9, 9), (16, 16)])
def test_containers_hold_a_sweep_up_to_eight_bits_or_what_is_asked(bits, container):
    assert qj.weight_quantizer(bits=bits).format.max_bits == container
    assert qj.activation_quantizer(bits=bits).format.max_bits == container


def test_defaults_are_those_of_the_design():
    weights, activations = qj.weight_quantizer(), qj.activation_quantizer()
    assert weights.format == qj.integer(signed=True, narrow=False)
    assert weights.symmetric
    assert activations.format == qj.integer(signed=False)
    assert not activations.symmetric
    assert qj.activation_quantizer(symmetric=True).format.signed


@pytest.mark.parametrize(
    ("bits", "match"),
    [(9, "9 bits do not fit a container of 8"), (-1, "-1 bits are no width of int8")],
)
def test_other_bits_than_the_container_holds_raise(bits, match):
    with pytest.raises(errors.BitsError, match=match):
        qj.weight_quantizer(bits=bits, format=qj.integer(max_bits=8))


def test_a_fixed_range_per_token_raises():
    with pytest.raises(errors.QuantizerError, match=r"RangeMode\.LIVE"):
        qj.activation_quantizer(granularity=qj.PerToken())


def test_the_first_rule_that_matches_decides():
    case = mlp()
    table = qj.sites(case.f, case.params, case.x)
    policy = qj.Policy(
        [
            qj.rule(qj.path("*Dense_1*"), qj.Scheme()),
            qj.rule(qj.weighted(), qj.Scheme(weights=qj.weight_quantizer(bits=4))),
        ]
    )
    first, second = qj.plan(policy, table).sites
    assert str(first.operands[1].quantizer) == "int4/channel"
    assert second.operands[1].quantizer is None
    assert second.reason == "float: float by rule"


ALL = ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        (qj.path("params/Conv_?/kernel"), ["params/Conv_0/kernel", "params/Conv_1/kernel"]),
        (qj.path("*[Dd]ense*"), ["params/Dense_0/kernel"]),
        (qj.path("params/conv_0/kernel"), []),
        (qj.path("Conv_0"), []),
        (
            qj.everything(),
            ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"],
        ),
        (qj.weighted(), ALL),
    ],
)
def test_selectors(selector, names):
    case = cnn()
    table = qj.sites(case.f, case.params, case.x)
    assert [site.name for site in table if selector.matches(site)] == names


def test_weighted_leaves_products_of_activations_alone():
    def attend(params, x):
        hidden = x @ params["w"]
        return hidden @ hidden.T

    case = dense()
    table = qj.sites(attend, case.params, case.x)
    assert [qj.weighted().matches(site) for site in table] == [True, False]
    assert [qj.everything().matches(site) for site in table] == [True, True]
    assert [site.status for site in table] == [SiteStatus.REWRITABLE] * 2
    keys = [[operand.key for operand in site.operands] for site in table]
    assert keys == [["activation", "weight"], ["lhs", "rhs"]]
