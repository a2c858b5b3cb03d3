"""One readable file: policies, plans and QParams come back, another model is found out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quantjax as qj
from quantjax import errors
from quantjax.planning import first_difference
from quantjax.storage import Quantization, load_quantization, plan_from, save_quantization
from tests import models
from tests.refused import refused
from tests.storage import cases
from tests.storage.cases import DOWN, OWN, Side, Sided
from tests.storage.golden import GOLDEN


def golden_policy() -> qj.Policy:
    weights = qj.weight_quantizer(bits=4, granularity=qj.PerGroup(64))
    return qj.Policy(
        [
            qj.rule(qj.path("*/head/kernel"), qj.Scheme(), optional=True),
            qj.rule(qj.weighted(), qj.Scheme(weights=weights)),
        ]
    )


def golden_qstate() -> dict[str, dict[str, qj.QParams]]:
    scale = jnp.asarray([[0.1], [jnp.nan]], jnp.float32)
    zero_point = jnp.asarray([[-0.0], [jnp.inf]], jnp.float32)
    theta = {"step": (jnp.asarray([0.5], jnp.float32), None)}
    return {"dense/kernel": {"weight": qj.QParams(scale, zero_point, jnp.float32(4.0), theta)}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "quantization.json"


def trip(folder: Path, **parts) -> Quantization:
    path = folder / "quantization.json"
    save_quantization(path, **parts)
    return load_quantization(path, extra=OWN)


# Laws


def test_the_golden_file_is_written_literally(path):
    save_quantization(path, policy=golden_policy(), qstate=golden_qstate())
    assert path.read_text(encoding="utf-8") == GOLDEN


def test_a_file_from_before_there_were_gradients_is_read(tmp_path):
    older = GOLDEN.replace(', "gradients": null', "").replace(',\n          "gradients": null', "")
    assert "gradients" not in older
    (tmp_path / "old.json").write_text(older)
    assert load_quantization(tmp_path / "old.json").policy == golden_policy()


def test_the_golden_file_is_read(path):
    path.write_text(GOLDEN, encoding="utf-8")
    policy, sites, qstate = load_quantization(path)
    assert policy == golden_policy()
    assert sites is None
    models.assert_same_bits(qstate, golden_qstate())


@given(st.one_of(cases.library_policies, cases.own_policies))
def test_policies_come_back_equal(tmp_path_factory, policy):
    back = trip(tmp_path_factory.mktemp("policies"), policy=policy)
    assert back == Quantization(policy)


@given(cases.qstates)
def test_qstates_come_back_bit_by_bit(tmp_path_factory, qstate):
    back = trip(tmp_path_factory.mktemp("qstates"), qstate=qstate)
    assert (back.policy, back.sites) == (None, None)
    models.assert_same_bits(back.qstate, qstate)


@given(cases.library_policies)
def test_writing_what_was_read_gives_the_same_file(tmp_path_factory, policy):
    first, second = (tmp_path_factory.mktemp("again") / "a.json" for _ in range(2))
    save_quantization(first, policy=policy, qstate=golden_qstate())
    policy, _, qstate = load_quantization(first)
    save_quantization(second, policy=policy, qstate=qstate)
    assert first.read_bytes() == second.read_bytes()


def test_a_model_computes_the_same_with_what_was_saved(tmp_path):
    case = models.cnn()
    ready = models.ready(case, qj.uniform_policy(weight_bits=3, activation_bits=6))
    back = trip(tmp_path, plan=ready.plan, qstate=ready.qstate)
    table = qj.sites(case.f, case.params, case.x)
    plan = plan_from(back, table)
    assert plan == ready.plan
    models.assert_same_bits(back.qstate, ready.qstate)
    expected = jax.jit(qj.fake_quantize(case.f, ready.plan))(ready.qstate, case.params, case.x)
    actual = jax.jit(qj.fake_quantize(case.f, plan))(back.qstate, case.params, case.x)
    models.assert_same_bits(actual, expected)


def test_paths_may_be_text(tmp_path):
    save_quantization(str(tmp_path / "a.json"), policy=golden_policy())
    assert load_quantization(str(tmp_path / "a.json")).policy == golden_policy()


# Plans


def test_the_rows_of_a_plan_are_its_sites(tmp_path):
    case = models.mlp()
    table = qj.sites(case.f, case.params, case.x)
    back = trip(tmp_path, plan=qj.plan(qj.Policy([]), table))
    assert back.sites == table.sites
    rows = cases.document(tmp_path / "quantization.json")["sites"]
    assert [row["name"] for row in rows] == [site.name for site in table.sites]
    assert rows[0]["operands"][1]["shape"] == [8, 16]


def test_another_batch_size_is_the_same_model(tmp_path):
    case = models.mlp()
    back = trip(tmp_path, plan=models.planned(case, qj.uniform_policy()))
    table = qj.sites(case.f, case.params, models.normal(5, 17, 8))
    assert plan_from(back, table) == qj.plan(qj.uniform_policy(), table)


def test_without_rows_nothing_is_compared(tmp_path):
    back = trip(tmp_path, policy=qj.uniform_policy())
    for case in (models.mlp(), models.cnn()):
        table = qj.sites(case.f, case.params, case.x)
        assert plan_from(back, table) == qj.plan(qj.uniform_policy(), table)


def test_a_weight_of_another_shape_is_named(tmp_path):
    saved = models.dense(features=6, out=5)
    back = trip(tmp_path, plan=models.planned(saved, qj.uniform_policy()))
    other = models.dense(features=6, out=7)
    table = qj.sites(other.f, other.params, other.x)
    with refused(errors.PlanMismatchError, "where: site w (dot_general)", "6x5", "found", "6x7"):
        plan_from(back, table)


def test_a_missing_site_is_named(tmp_path):
    saved, other = models.mlp(), models.dense()
    back = trip(tmp_path, plan=models.planned(saved, qj.uniform_policy()))
    table = qj.sites(other.f, other.params, other.x)
    with refused(
        errors.PlanMismatchError, "site params/Dense_0/kernel", "the model has no such site"
    ):
        plan_from(back, table)


def test_another_contraction_is_named(tmp_path):
    x = models.normal(0, 6, 6)
    params = {"w": models.normal(1, 6, 6)}
    plan = qj.plan(qj.uniform_policy(), qj.sites(lambda p, x: x @ p["w"], params, x))
    table = qj.sites(lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"]), params, x)
    quantization = trip(tmp_path, plan=plan)
    with refused(errors.PlanMismatchError, "site w", "weight 6x6 [1|0|]", "weight 6x6 [0|1|]"):
        plan_from(quantization, table)


def test_the_first_row_that_differs_is_named(tmp_path):
    case = models.mlp()
    plan = models.planned(case, qj.uniform_policy())
    back = trip(tmp_path, plan=plan)
    wide = jax.tree.map(lambda leaf: leaf, case.params)
    wide["params"]["Dense_1"]["kernel"] = jnp.ones((16, 9))
    wide["params"]["Dense_1"]["bias"] = jnp.ones(9)

    def apply(v, x):
        hidden = x @ v["params"]["Dense_0"]["kernel"]
        return hidden @ v["params"]["Dense_1"]["kernel"]

    with refused(errors.PlanMismatchError, "site params/Dense_1/kernel", "16x4", "16x9"):
        plan_from(back, qj.sites(apply, wide, case.x))


def test_sites_that_were_not_saved_are_named(tmp_path):
    case = models.dense()
    back = trip(tmp_path, plan=models.planned(case, qj.uniform_policy()))
    params = {**case.params, "v": jnp.ones((5, 5))}
    table = qj.sites(lambda p, x: x @ p["w"] @ p["v"], params, case.x)
    with refused(errors.PlanMismatchError, "a site that was not saved", "where: site v"):
        plan_from(back, table)


def test_what_is_compared_is_what_transforms_compare():
    case = models.dense()
    wide = case._replace(x=models.normal(1, 9, 6))
    (site,), (other,) = (qj.sites(c.f, c.params, c.x).sites for c in (case, wide))
    assert site != other
    assert first_difference([site], [other]) is None


def test_no_policy_no_plan(tmp_path):
    back = trip(tmp_path, qstate=golden_qstate())
    case = models.dense()
    with refused(errors.StorageError, "there is no policy to plan with"):
        plan_from(back, qj.sites(case.f, case.params, case.x))


# Own values


def test_own_values_have_to_be_given_back(path):
    weights = qj.weight_quantizer(bits=4, rounding=DOWN)
    policy = qj.Policy([qj.rule(Sided(Side.LEFT), qj.Scheme(weights=weights))])
    save_quantization(path, policy=policy)
    with refused(errors.StorageError, "'Sided'", "quantization.json: policy.rules[0].selector"):
        load_quantization(path)
    with refused(errors.StorageError, "rounding 'down'", "scheme.weights.rounding", "extra="):
        load_quantization(path, extra=(Sided, Side))
    assert load_quantization(path, extra=(Sided, Side, DOWN)).policy == policy


# Refusals


def test_nothing_to_write(path):
    with refused(errors.StorageError, "there is nothing to write", "where: quantization.json"):
        save_quantization(path)
    assert not path.exists()


def test_a_plan_of_another_policy(path):
    plan = models.planned(models.dense(), qj.uniform_policy(weight_bits=4))
    with refused(errors.StorageError, "made from another policy", "plan alone"):
        save_quantization(path, policy=qj.uniform_policy(weight_bits=3), plan=plan)
    save_quantization(path, policy=qj.uniform_policy(weight_bits=4), plan=plan)
    assert load_quantization(path).policy == plan.policy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: q._replace(scale=jnp.ones(2, jnp.bfloat16)), "bfloat16 numbers where QParams"),
        (lambda q: q._replace(bits=4.0), "a float is no array of numbers"),
        (lambda q: q._replace(theta=(golden_qstate,)), "a function is no array"),
        (lambda q: q._replace(theta=q), "ok"),
        (lambda q: tuple(q), "a tuple where QParams should be"),
        (lambda q: q._replace(scale=None), "there is no scale"),
        (lambda q: q._replace(zero_point=(q.scale,)), "a tuple is no array of numbers"),
        (lambda q: None, "a NoneType where QParams should be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_that_no_file_can_hold(path, change, reason):
    save_quantization(path, policy=golden_policy())
    before = path.read_bytes()
    state = golden_qstate()
    state["dense/kernel"]["weight"] = change(state["dense/kernel"]["weight"])
    if reason == "ok":  # QParams within theta are as good as any tree
        save_quantization(path, qstate=state)
        models.assert_same_bits(load_quantization(path).qstate, state)
        return
    with refused(errors.StorageError, reason, "where: qstate: dense/kernel, weight"):
        save_quantization(path, qstate=state)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_traced_states_are_refused(path):
    def save(state):
        save_quantization(path, qstate=state)
        return state

    with refused(errors.StorageError, "traced", "dense/kernel, weight, scale"):
        jax.jit(save)(golden_qstate())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"policy"', '"polcy"', "a part that is not known: 'polcy'"),
        ('"version": 1', '"version": 2', "upgrade quantjax"),
        ("quantjax.quantization", "quantjax.params", "the file is no quantjax.quantization"),
        ('"theta"', '"tehta"', "keys scale, zero_point, bits, theta"),
        ('"values": [0.1, "nan"]', '"values": [0.1]', "1 values for an array of shape 2x1"),
        ('"values": [4.0]', '"values": ["four"]', "'four' is no float32 number"),
        ('"shape": [],', "", "keys shape, values"),
        ('{"tuple": [', '{"tupel": [', "keys shape, values"),
        ('"type": "Policy"', '"type": "Rule"', "Rule has no field 'rules'"),
        ('"bits": 4,', '"bits": 4, "bits": 8,', "stands twice"),
        ('"bits": 4,', '"bits": 12,', "12 bits do not fit a container of 8"),
        ('"size": 64,', "", "PerGroup needs the field 'size'"),
        ('"half_even"', '"half_evn"', "'half_even'"),
        ('"optional": true', '"optional": "yes"', "'yes' is no bool"),
    ],
)
def test_files_with_a_mistake(path, old, new, reason):
    path.write_text(GOLDEN, encoding="utf-8")
    with refused(errors.StorageError, reason, "quantization.json"):
        load_quantization(cases.edited(path, old, new))


@pytest.mark.parametrize("field", ["scale", "zero_point", "bits"])
def test_qparams_without_an_array_are_refused(path, field):
    """They were read, with None for a scale."""
    data = json.loads(GOLDEN)
    for held, reason in ((None, f"there is no {field}"), ({"tuple": []}, "keys shape, values")):
        data["qstate"]["dense/kernel"]["weight"][field] = held
        path.write_text(json.dumps(data))
        with refused(errors.StorageError, reason, "quantization.json: qstate, dense/kernel"):
            load_quantization(path)


@pytest.mark.parametrize(
    ("part", "data"),
    [
        ("policy", {"type": "PerTensor"}),
        ("policy", None),
        ("policy", "uniform"),
        ("sites", {"type": "Policy", "rules": []}),
        ("sites", [{"type": "PerTensor"}]),
        ("sites", None),
        ("qstate", []),
        ("qstate", {"site": []}),
        ("qstate", {"site": {"weight": []}}),
    ],
)
def test_parts_that_hold_something_else(path, part, data):
    body = {"schema": "quantjax.quantization", "version": 1, part: data}
    path.write_text(json.dumps(body))
    with refused(errors.StorageError, part, "quantization.json"):
        load_quantization(path)


def test_a_file_of_nothing_holds_nothing(path):
    path.write_text('{"schema": "quantjax.quantization", "version": 1}')
    assert load_quantization(path) == Quantization()


def test_a_file_that_was_cut_short(path):
    path.write_text(GOLDEN[: len(GOLDEN) // 2], encoding="utf-8")
    with refused(errors.StorageError, "no JSON document", "cut short"):
        load_quantization(path)


def test_states_of_stacked_layers(tmp_path):
    qparams = golden_qstate()["dense/kernel"]["weight"]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, leaf * 2]), qparams)
    back = trip(tmp_path, qstate={"layers": {"weight": stacked}})
    models.assert_same_bits(back.qstate["layers"]["weight"], stacked)
    assert np.shape(back.qstate["layers"]["weight"].scale) == (3, 2, 1)


def test_what_is_no_policy_plan_or_qstate_is_refused_and_the_file_stays(path):
    policy = qj.uniform_policy()
    save_quantization(path, policy=policy)
    before = path.read_bytes()
    scheme = qj.Scheme(weights=qj.weight_quantizer())
    for part, fragment in (
        ({"policy": 3}, "policy is an int, and a Policy is needed"),
        ({"policy": scheme}, "policy is a Scheme"),
        ({"plan": policy}, "plan is a Policy, and a Plan is needed"),
        ({"qstate": [1]}, "qstate is a list"),
        ({"qstate": {"w": 3}}, "an entry is an int"),
    ):
        with refused(errors.ArgumentError, fragment):
            save_quantization(path, **part)
    assert path.read_bytes() == before
