"""Tables: costs, totals that count what is shared once, 120 columns, data frames."""

import builtins
from typing import Any

import jax
import jax.numpy as jnp
import pandas
import pytest
from jax import lax

import quantjax as qj
from quantjax import errors
from quantjax.printing import amount
from tests.models import cnn, mlp, normal, planned
from tests.refused import refused

CASE = cnn()
TABLE = qj.sites(CASE.f, CASE.params, CASE.x)


def test_costs_of_rows_and_of_all():
    rows = {site.name: (site.parameters, site.multiply_adds) for site in TABLE}
    assert rows == {
        "params/Conv_0/kernel": (3 * 3 * 3 * 6, 4 * 8 * 8 * 6 * 27),
        "params/Conv_1/kernel": (3 * 3 * 6 * 8, 4 * 4 * 4 * 8 * 54),
        "params/Dense_0/kernel": (32, 4 * 32),
    }
    cost = TABLE.cost
    assert cost.parameters == sum(p for p, _ in rows.values())
    assert cost.multiply_adds == sum(m for _, m in rows.values())
    assert cost.bytes == 4 * cost.parameters


def test_tied_weights_count_once_and_layers_each():
    params = {"stack": normal(0, 3, 6, 6), "shared": normal(1, 6, 6)}

    def f(p: Any, x: jax.Array) -> jax.Array:
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w) @ p["shared"], None), x, p["stack"])[0]
        return x @ p["shared"]

    table = qj.sites(f, params, normal(2, 2, 6))
    assert {site.name: site.parameters for site in table} == {
        "stack": 108,
        "shared": 36,
        "shared#1": 36,
    }
    assert table.cost == qj.sites(f, params, normal(2, 2, 6)).cost
    assert table.cost.parameters == 144
    assert table.cost.multiply_adds == 7 * 2 * 36
    assert "total" in str(table)


def stacked(p: Any, x: jax.Array) -> jax.Array:
    for layer in range(3):
        x = x @ p["w"][layer]
    return x


def fused(p: Any, x: jax.Array) -> jax.Array:
    queries, keys = jnp.split(p["w"], 2, axis=1)
    return (x @ queries) * (x @ keys)


def tied(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] @ p["w"].T @ p["w"]


def repeated(p: Any, x: jax.Array) -> jax.Array:
    return x @ jnp.concatenate([p["w"], p["w"]], axis=1)


@pytest.mark.parametrize(
    ("f", "shape", "parameters"),
    [
        (stacked, (3, 4, 4), 48),
        (fused, (4, 10), 40),
        (tied, (4, 6), 24),
        (repeated, (4, 3), 24),  # larger than what it is made of, and there nonetheless
    ],
)
def test_parts_of_a_parameter_count_each_and_ties_once(f, shape, parameters):
    table = qj.sites(f, {"w": normal(0, *shape)}, normal(1, 2, 4))
    assert table.cost.parameters == parameters
    assert table.cost.bytes == 4 * parameters
    eight = qj.uniform_policy(weight_granularity=qj.PerTensor())
    scales = {stacked: 3, fused: 2, tied: 1, repeated: 1}[f]
    assert qj.plan(eight, table).bytes == parameters + 4 * scales


def test_half_precision_has_half_the_bytes():
    params = {"w": normal(0, 4, 4).astype(jnp.bfloat16)}
    table = qj.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 4), jnp.bfloat16))
    assert table.cost.bytes == 32


def test_planned_bytes_are_codes_and_scales():
    plan = planned(mlp(), qj.uniform_policy(weight_bits=4))
    assert [entry.bytes for entry in plan.sites] == [8 * 16 // 2 + 4 * 16, 16 * 4 // 2 + 4 * 4]
    asymmetric = qj.Scheme(weights=qj.weight_quantizer(bits=3, symmetric=False))
    policy = qj.Policy([qj.rule(qj.weighted(), asymmetric)])
    assert planned(mlp(), policy).sites[1].bytes == 64 * 3 // 8 + 8 * 4
    bypassed = qj.uniform_policy(weight_bits=0)
    live = qj.weight_quantizer(bits=4, range=qj.RangeMode.LIVE)
    follows = qj.Policy([qj.rule(qj.weighted(), qj.Scheme(weights=live))])
    for policy in (qj.Policy([]), bypassed, follows):
        assert planned(mlp(), policy).bytes == 4 * 192


def attend(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embed"]["table"][tokens]
    x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    scores = x @ x.T
    return scores @ x @ p["embed"]["table"].T + p["bias"]


ATTENTION = {
    "embed": {"table": normal(0, 7, 4)},
    "layers": normal(1, 3, 4, 4),
    "bias": jnp.ones((1, 7)),
}

TABLE_TEXT = """\
site           op      left   right     output  weights  MACs  bytes  inside  note
embed/table    gather  w 7x4            5x4     28       0     112
layers         dot     a 5x4  w 4x4     5x4     48       240   192    scan×3
dot_general#0  dot     a 5x4  a 4x5     5x5              100
dot_general#1  dot     a 5x5  a 5x4     5x4              100
embed/table#1  dot     a 5x4  w 4x7 +b  5x7     28       140   112
total                                           76       580   304
"""

PLAN_TEXT = """\
site           weight | left  activation | right  bytes  sums   executed       status
embed/table    int4/channel                       42            rows of codes  quantized
layers         int4/channel   uint8/tensor        72     exact  int8           quantized
dot_general#0  float          float                                            float: no rule matches
dot_general#1  float          float                                            float: no rule matches
embed/table#1  int4/channel   uint8/tensor        42     exact  int8           quantized
total: 76 weights, 114 bytes, 304 in float (2.67x); 580 MACs, 66% of them in quantized sites
"""  # noqa: E501


def test_how_it_prints():
    table = qj.sites(attend, ATTENTION, jnp.arange(5))
    assert f"{table}\n" == TABLE_TEXT
    assert f"{qj.plan(qj.presets.w4a8(), table)}\n" == PLAN_TEXT


@pytest.mark.parametrize("layers", [1, 60])
def test_nothing_prints_beyond_120_columns(layers):
    name = "encoder_block_with_a_name/layer_{}/attention/key"
    params = {name.format(n): normal(n, 6, 6) for n in range(layers)}

    def f(p: Any, x: jax.Array) -> jax.Array:
        for w in p.values():
            x = jnp.tanh(x @ w)
        return x

    table = qj.sites(f, params, normal(1, 2, 6))
    plan = qj.plan(qj.presets.w8a8(), table)
    for text in (str(table), str(plan)):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 120
        assert len(lines) <= 2 * layers + 3


def test_data_frames():
    frame = TABLE.to_pandas()
    assert list(frame.index) == [site.name for site in TABLE]
    assert frame.loc["params/Conv_1/kernel", "multiply_adds"] == 4 * 4 * 4 * 8 * 54
    assert frame["parameters"].sum() == TABLE.cost.parameters
    assert frame.loc["params/Dense_0/kernel", "bias"] == "params/Dense_0/bias"
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(bits=4),
        activations=qj.activation_quantizer(bits=8),
        outputs=qj.activation_quantizer(bits=6),
        biases=qj.AccumulatorBias(),
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.op(qj.Op.CONV), scheme)]), TABLE)
    frame = plan.to_pandas()
    first, last = frame.iloc[0], frame.iloc[2]
    assert first["weight_quantizer"] == "int4/channel"
    assert first["output_quantizer"] == "uint6/tensor"
    assert pandas.isna(first["bias_quantizer"]), "it has no bias"
    assert frame.iloc[1]["bias_quantizer"] == "int32/sums"
    assert (first["plan"], last["plan"]) == ("quantized", "float")
    assert pandas.isna(last["weight_quantizer"])
    assert first["planned_bytes"] < first["bytes"]


def test_an_empty_table_is_an_empty_frame():
    table = qj.sites(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    assert len(table.to_pandas()) == 0
    assert str(table).startswith("site")


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    whole = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.MissingPackageError, match=r"quantjax\[pandas\]"):
        TABLE.to_pandas()


def test_amounts_have_three_digits():
    assert [amount(n) for n in (0, 7, 999, 1_000, 1_234, 999_500, 10**15)] == [
        *("0", "7", "999", "1k", "1.23k", "1M", "1000T"),
    ]


def test_a_report_has_a_row_for_each_layer_and_a_plan_its_sites_by_name():
    params = {"w": normal(0, 3, 4, 4), "v": normal(1, 4, 2)}

    def f(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["v"]

    x = normal(2, 5, 4)
    plan = qj.plan(qj.uniform_policy(), qj.sites(f, params, x))
    assert plan["v"].site.name == "v"
    with refused(errors.NotFoundError, "no site 'elsewhere'", "where: sites w, v"):
        plan["elsewhere"]
    with refused(errors.NotFoundError, "no site 'vv'", "try:   ['v']"):
        qj.sites(f, params, x)["vv"]
    _, state = qj.observe(f, plan)(qj.init(plan), params, x)
    report = qj.compare(f, plan)(qj.calibrate(plan, state, params), params, x)
    with refused(errors.NotFoundError, "no site 'W'", "sites w, v"):
        report["W"]
    frame = report.to_pandas()
    assert list(frame.index) == ["w[0]", "w[1]", "w[2]", "v"]
    assert frame.loc["w[1]", "weight_sqnr"] == float(report["w"].operands["weight"].sqnr[1])
    saturation = report["v"].operands["activation"].saturation
    assert frame.loc["v", "activation_saturation"] == float(saturation)
