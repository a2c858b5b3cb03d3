"""Selectors: by primitive, role, scope, size; the first, the last, the costliest; combinations."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantjax as qj
from quantjax import errors
from quantjax.selectors import Named
from tests.models import cnn, normal
from tests.refused import refused

CASE = cnn()
TABLE = qj.sites(CASE.f, CASE.params, CASE.x)
NAMES = ["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel"]


def chosen(selector: qj.Selector, table: qj.SiteTable = TABLE) -> list[str]:
    resolved = selector.resolved(table.sites)
    return [site.name for site in table if resolved.matches(site)]


def attend(p, i):
    x = p["table"][i]
    hidden = jnp.tanh(x @ p["w"])
    return (hidden @ hidden.T) @ x @ p["table"].T


PARAMS = {"table": normal(0, 7, 4), "w": normal(1, 4, 4)}
ATTEND = qj.sites(attend, PARAMS, jnp.arange(5))


@pytest.mark.parametrize(
    ("selector", "places"),
    [
        (qj.op(qj.Op.CONV), [0, 1]),
        (qj.op(qj.Op.CONV, qj.Op.DOT), [0, 1, 2]),
        (qj.op(qj.Op.GATHER), []),
        (qj.role(qj.Role.WEIGHT), [0, 1, 2]),
        (qj.role(qj.Role.GRADIENT), []),
        (qj.scope("*/Conv_*"), [0, 1]),
        (qj.at_least(parameters=400), [1]),
        (qj.at_least(multiply_adds=1), [0, 1, 2]),
        (qj.first(), [0]),
        (qj.last(), [2]),
        (qj.first(count=2), [0, 1]),
        (qj.last(count=9), [0, 1, 2]),
        (qj.last(qj.op(qj.Op.CONV)), [1]),
        (qj.first() | qj.last(), [0, 2]),
        (qj.weighted() & ~qj.first(), [1, 2]),
        (~qj.everything(), []),
        (qj.any_of(), []),
        (qj.all_of(), [0, 1, 2]),
        (qj.not_(qj.path("*Dense*")), [0, 1]),
        (qj.costliest(1.0), [0, 1, 2]),
        (qj.costliest(0.01), [0]),
    ],
    ids=str,
)
def test_what_they_choose(selector, places):
    assert chosen(selector) == [NAMES[place] for place in places]


def test_lookups_and_products_of_activations():
    names = [site.name for site in ATTEND]
    assert len(names) == 5
    assert chosen(qj.op(qj.Op.GATHER), ATTEND) == ["table"]
    assert chosen(~qj.weighted(), ATTEND) == names[2:4]
    products = qj.weighted() & ~qj.op(qj.Op.GATHER)
    assert chosen(qj.first(products), ATTEND) == ["w"]
    assert chosen(qj.last(products), ATTEND) == ["table#1"]


@given(st.floats(0.01, 1.0))
def test_the_costliest_are_the_fewest_that_have_the_share(share):
    found = [TABLE[name].multiply_adds for name in chosen(qj.costliest(share))]
    whole = sum(site.multiply_adds for site in TABLE)
    assert sum(found) >= share * whole - 1e-6
    assert sum(found) - min(found) < share * whole
    left_out = [site.multiply_adds for site in TABLE if site.multiply_adds not in found]
    assert all(cost <= min(found) for cost in left_out)


def test_opaque_sites_are_not_counted():
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))
    f = lambda p, x: own(p["b"], own(p["a"], x) @ p["c"])  # noqa: E731
    params = {name: normal(n, 4, 4) for n, name in enumerate("abc")}
    table = qj.sites(f, params, normal(5, 2, 4))
    assert chosen(qj.first(), table) == chosen(qj.last(), table) == ["c"]


GRADIENT = qj.sites(
    jax.grad(jax.checkpoint(lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)),
    {"a": normal(0, 4, 4), "b": normal(1, 4, 4)},
    normal(2, 2, 4),
)


def test_uses_of_a_weight():
    assert chosen(qj.first_use()) == NAMES
    assert chosen(qj.first_use(), ATTEND) == ["table", "w"]
    assert chosen(qj.first_use(qj.op(qj.Op.DOT)), ATTEND) == ["w", "table#1"]
    assert chosen(qj.every_use(qj.last()), ATTEND) == ["table", "table#1"]
    assert chosen(qj.every_use(qj.everything()), ATTEND) == [site.name for site in ATTEND]
    assert chosen(qj.every_use(qj.path("no such")), ATTEND) == []
    assert chosen(qj.first_use(), GRADIENT) == ["a", "b"]
    assert len(chosen(qj.weighted(), GRADIENT)) > 2
    assert chosen(qj.every_use(qj.first_use()), GRADIENT) == chosen(qj.weighted(), GRADIENT)


def test_a_weight_of_several_parameters_shares_each():
    def f(p, x):
        return x @ jnp.concatenate([p["q"], p["k"]], axis=1) @ p["o"] @ p["k"]

    params = {"q": normal(0, 4, 4), "k": normal(1, 4, 4), "o": normal(2, 8, 4)}
    table = qj.sites(f, params, normal(3, 2, 4))
    fused, out, again = [site.name for site in table]
    assert chosen(qj.every_use(qj.path(again)), table) == [fused, again]
    assert chosen(qj.first_use(), table) == [fused, out]


@pytest.mark.parametrize("table", [TABLE, ATTEND, GRADIENT], ids=["cnn", "tied", "gradient"])
@pytest.mark.parametrize(
    "inner", [qj.weighted(), qj.first(), qj.last(), qj.backward(), qj.costliest(0.5)], ids=str
)
def test_uses_are_closed(inner, table):
    some, every = chosen(inner, table), chosen(qj.every_use(inner), table)
    assert set(some) <= set(every)
    assert chosen(qj.every_use(qj.every_use(inner)), table) == every
    new = chosen(qj.first_use(inner), table)
    assert set(new) <= set(some)
    assert chosen(qj.first_use(qj.first_use(inner)), table) == new
    if inner == qj.weighted():
        assert chosen(qj.every_use(qj.first_use(inner)), table) == every


def test_one_row_does_not_tell():
    whole = (qj.first(), qj.last(), qj.costliest(0.5), qj.first_use(), qj.every_use(qj.weighted()))
    for selector in (*whole, qj.first() & qj.weighted()):
        with pytest.raises(errors.PolicyError, match="needs the whole table"):
            selector.matches(TABLE.sites[0])


@pytest.mark.parametrize("bad", [lambda: qj.first(count=0), lambda: qj.costliest(0.0)])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(errors.PolicyError):
        bad()


def test_sizes_print_what_was_asked():
    assert str(qj.at_least(parameters=3)) == "at least 3 parameters"
    assert str(qj.at_least(multiply_adds=2000, parameters=3)) == (
        "at least 2,000 multiply-adds, 3 parameters"
    )
    assert str(qj.at_least()) == "at least nothing"


def test_they_are_values():
    assert qj.first() == qj.first()
    assert hash(qj.first() | qj.last()) == hash(qj.first() | qj.last())
    assert qj.costliest(0.5) != qj.costliest(0.6)
    assert str(qj.first() | ~qj.op(qj.Op.CONV)) == (
        "(first 1 of weighted | ~op conv_general_dilated)"
    )
    assert str(Named(frozenset("ba"))) == "a, b"


def test_a_policy_by_place_and_cost():
    eight = qj.uniform_policy().rules[0].scheme
    two = qj.Scheme(weights=qj.weight_quantizer(bits=2))
    policy = qj.Policy([qj.rule(qj.first() | qj.last(), eight), qj.rule(qj.weighted(), two)])
    plan = qj.plan(policy, TABLE)
    assert [str(entry.operands[1].quantizer) for entry in plan.sites] == [
        "int8/channel",
        "int2/channel",
        "int8/channel",
    ]
    assert plan.policy == policy, "the policy stays what it was, for other models"


def test_a_rule_that_the_table_leaves_empty_raises():
    policy = qj.Policy([qj.rule(qj.first(qj.op(qj.Op.GATHER)), qj.Scheme())])
    with pytest.raises(errors.PolicyError, match="matches no site"):
        qj.plan(policy, TABLE)


def test_without_a_model_places_are_those_of_the_tree():
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerTensor())
    policy = qj.Policy([qj.rule(qj.last(), qj.Scheme(weights=weights))])
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    frozen = qj.quantize_params(params, policy)
    assert [type(leaf).__name__ for leaf in frozen.values()] == [
        "ArrayImpl",
        "QTensor",
        "ArrayImpl",
    ]


def test_taps_and_masks_take_them():
    taps = qj.tap(CASE.f, qj.last())(CASE.params, CASE.x)
    assert list(taps) == [NAMES[2]]


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: a and b,
        lambda a, b: a or b,
        lambda a, b: not a,
        lambda a, b: b if a else a,
    ],
)
def test_selectors_are_neither_true_nor_false(combine):
    """``and`` and ``or`` return one of the two, and a policy spoke of other layers."""
    with refused(errors.ArgumentError, "neither true nor false", "a & b, a | b, ~a"):
        combine(qj.path("a"), qj.path("b"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: qj.any_of([qj.path("a"), qj.path("b")]),
        lambda: qj.all_of(qj.path("a"), "b"),
        lambda: qj.path("a") & "b",
        lambda: qj.not_("a"),
        lambda: qj.first("0/w"),
        lambda: qj.costliest(0.5, "0/w"),
        lambda: qj.op("dot"),
        lambda: qj.role("weight"),
    ],
)
def test_text_and_lists_are_no_selectors(make):
    with refused(errors.ArgumentError, " is a ", "qj."):
        make()
