"""Plans: what is decided where, how it prints, and what does not fit."""

import copy
import pickle

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax import errors
from quantjax.products import Exactness
from quantjax.site_plan import PlanStatus
from tests.models import cnn, dense, mlp, normal, planned, policy
from tests.refused import refused

W, A = qj.weight_quantizer, qj.activation_quantizer


def test_the_site_table_prints():
    case = mlp()
    lines = str(qj.sites(case.f, case.params, case.x)).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    assert rows == [
        "site op left right output weights MACs bytes inside note",
        "params/Dense_0/kernel dot a 6x8 w 8x16 +b 6x16 128 768 512",
        "params/Dense_1/kernel dot a 6x16 w 16x4 +b 6x4 64 384 256",
        "total 192 1.15k 768",
    ]
    assert (
        len(
            {
                line.index(text)
                for line, text in zip(lines, ("MACs", "768", "384", "1.15k"), strict=True)
            }
        )
        == 1
    )


def test_the_plan_prints():
    plan = planned(mlp(), qj.uniform_policy(weight_bits=4))
    rows = [" ".join(line.split()) for line in str(plan).splitlines()]
    assert rows == [
        "site weight | left activation | right bytes sums executed status",
        "params/Dense_0/kernel int4/channel uint8/tensor 128 exact int8 quantized",
        "params/Dense_1/kernel int4/channel uint8/tensor 48 exact int8 quantized",
        "total: 192 weights, 176 bytes, 768 in float (4.36x); 1.15k MACs, "
        "100% of them in quantized sites",
    ]


def test_a_reason_of_several_sites_is_said_once_under_the_table():
    two = planned(mlp(), qj.presets.fp8())
    lines = str(two).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[1:3]] == ["quantized (1)"] * 2
    assert lines[3:4] == ["(1) the levels of e4m3fn are no integers"]
    assert lines[4].startswith("total:")
    first = qj.Policy([qj.rule(qj.path("*Dense_0*"), qj.presets.fp8().rules[0].scheme)])
    alone = str(planned(mlp(), first))
    assert "quantized (1)" not in alone
    assert "the levels of e4m3fn are no" in alone
    assert {entry.reason for entry in two.quantized} == {"the levels of e4m3fn are no integers"}


@pytest.mark.parametrize("depth", [1, 12])
def test_nothing_prints_beyond_120_columns(depth):
    params: dict = {"w": normal(0, 6, 6)}
    for _ in range(depth):
        params = {"a_rather_long_name_of_a_module": params}

    def f(params, x):
        return (
            jax.lax.scan(lambda c, _: (c @ jax.tree.leaves(params)[0], None), x, None, 2)[0]
            @ (jax.tree.leaves(params)[0])
        )

    table = qj.sites(f, params, normal(1, 4, 6))
    plan = qj.plan(qj.uniform_policy(), table)
    for text in (str(table), str(plan)):
        assert max(map(len, text.splitlines())) <= 120
    assert "scan×2" in str(table)


@pytest.mark.parametrize("granularity", [qj.PerChannel(), qj.PerGroup(2)], ids=str)
def test_a_sum_of_no_terms_stays_in_float(granularity):
    def f(params, x):
        return x @ params["w"] + 1.0

    params, x = {"w": jnp.zeros((0, 5))}, jnp.zeros((3, 0))
    live = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
    plan = qj.plan(policy(W(granularity=granularity), live), qj.sites(f, params, x))
    (entry,) = plan.sites
    assert (entry.status, entry.reason) == (PlanStatus.FLOAT, "float: a sum of no terms")
    qstate = qj.calibrate(plan, qj.init(plan), params)
    frozen = qj.freeze(plan, qstate, params)
    for y in (qj.fake_quantize(f, plan)(qstate, params, x), qj.execute(f, plan)(qstate, frozen, x)):
        assert (y == jnp.ones((3, 5))).all()


def test_equal_plans_are_equal_and_serve_as_static_arguments():
    case = mlp()
    first, second = (planned(case, qj.uniform_policy(weight_bits=4)) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != planned(case, qj.uniform_policy(weight_bits=3))
    traces = []

    def f(plan, x):
        traces.append(plan)
        return x

    static = jax.jit(f, static_argnums=0)
    static(first, 1.0)
    static(second, 1.0)
    assert len(traces) == 1


def test_scale_shapes_follow_roles():
    case = cnn()
    channel = planned(case, policy(W(), A()))
    shapes = [tuple(o.scale_shape for o in site.operands) for site in channel.sites]
    assert shapes == [
        ((1, 1, 1, 1), (1, 1, 1, 6)),
        ((1, 1, 1, 1), (1, 1, 1, 8)),
        ((1, 1), (1, 4)),
    ]
    grouped = qj.Scheme(weights=W(granularity=qj.PerGroup(2)))
    groups = planned(case, qj.Policy([qj.rule(qj.path("*Conv_1*"), grouped)]))
    assert groups.sites[1].operands[1].scale_shape == (1, 1, 3, 8)


def test_a_weight_on_the_left_has_its_channels_there():
    plan = qj.plan(
        qj.uniform_policy(),
        qj.sites(lambda p, x: p["w"] @ x, {"w": normal(0, 5, 6)}, normal(1, 6, 4)),
    )
    weight = next(o for o in plan.sites[0].operands if o.is_weight)
    assert (weight.operand.side, weight.scale_shape) == (0, (5, 1))


@pytest.mark.parametrize(
    ("features", "weights", "activations", "exactness"),
    [
        (514, W(bits=8), A(bits=8), Exactness.EXACT),
        (515, W(bits=8), A(bits=8), Exactness.CHUNKED),
        (1029, W(bits=7, format=qj.integer(max_bits=7)), A(bits=8), Exactness.CHUNKED),
        (1028, W(bits=7, format=qj.integer(max_bits=7)), A(bits=8), Exactness.EXACT),
        (515, W(bits=8, granularity=qj.PerGroup(5)), A(bits=8), Exactness.EXACT),
        (64, W(bits=16), A(bits=16), Exactness.ROUNDED),
        (64, W(bits=8), None, Exactness.FLOAT),
        (64, None, A(bits=8), Exactness.FLOAT),
    ],
)
def test_the_plan_says_how_exact_sums_are(features, weights, activations, exactness):
    plan = planned(dense(features=features), policy(weights, activations))
    (site,) = plan.sites
    assert site.sizing is not None
    assert site.sizing.exactness is exactness
    assert (exactness is Exactness.ROUNDED) == ("rounded to float32" in site.reason)
    assert exactness.value in str(plan)


def test_a_plan_fits_other_batch_sizes():
    case = dense()
    plan = planned(case, qj.uniform_policy())
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    qstate = qj.calibrate(plan, state, case.params)
    assert qj.fake_quantize(case.f, plan)(qstate, case.params, normal(9, 11, 6)).shape == (11, 5)


def test_the_identity_quantizes_nothing_and_says_so():
    plan = planned(mlp(), qj.Policy([]))
    assert plan.quantized == ()
    assert {site.status for site in plan.sites} == {PlanStatus.FLOAT}
    assert "no rule matches" in str(plan)
    assert qj.init(plan) == {}


def test_groups_that_do_not_divide_name_the_site_and_a_size_that_does():
    with pytest.raises(errors.GranularityError, match=r"site w \(dot_general\), weight 6x5") as e:
        planned(dense(), policy(W(granularity=qj.PerGroup(4))))
    assert "qj.PerGroup(3)" in e.value.why
    planned(dense(), policy(W(granularity=qj.PerGroup(3))))
    planned(dense(), policy(W(granularity=eval(e.value.fix, {"qj": qj}))))


def test_fixed_activation_groups_are_refused_since_rows_are_the_batch():
    grouped = A(granularity=qj.PerGroup(3))
    with pytest.raises(errors.GranularityError, match=r"activation 4x6[\s\S]*RangeMode\.LIVE"):
        planned(dense(), policy(None, grouped))


def test_weights_have_no_tokens():
    with pytest.raises(errors.GranularityError, match="no tokens"):
        planned(
            dense(),
            qj.Policy(
                [
                    qj.rule(
                        qj.weighted(),
                        qj.Scheme(weights=A(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)),
                    )
                ]
            ),
        )


def test_plans_are_copied_as_they_are_and_pickled_without_equations():
    """Equations of JAX, which a plan with computed weights or biases holds, cannot be pickled."""
    case = dense()
    plan = planned(case, qj.uniform_policy())
    assert pickle.loads(pickle.dumps(plan)) == plan
    case = mlp()  # its biases are broadcast before they are added
    plan = planned(case, qj.uniform_policy())
    assert copy.deepcopy(plan) == plan
    assert copy.deepcopy(qj.sites(case.f, case.params, case.x)) == qj.sites(*case)
    with refused(errors.StorageError, "cannot be pickled", "save_quantization"):
        pickle.dumps(plan)


def test_its_representation_is_short():
    """Notebooks, debuggers and failed assertions print it; ``print`` has the table."""
    case = dense()
    plan = qj.plan(qj.uniform_policy(), qj.sites(case.f, case.params, case.x))
    assert repr(plan) == "Plan(1 site, 2 operands quantized)"
