"""Programs exported for any batch: what the float model exports, its quantized forms do too."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from tests.models import Case, dense, normal, ready

pytestmark = pytest.mark.thinned(2)

TOKENS = qj.activation_quantizer(granularity=qj.PerToken(), range=qj.RangeMode.LIVE)
W8A8 = qj.uniform_policy()


class Exported(NamedTuple):
    """A quantized model, and its inputs' sizes of which some are letters."""

    case: Case
    policy: qj.Policy
    shape: str


def by(selector: qj.Selector, activations: qj.Quantizer) -> qj.Policy:
    scheme = qj.Scheme(weights=qj.weight_quantizer(), activations=activations)
    return qj.Policy([qj.rule(selector, scheme)])


def attention(p: Any, x: jax.Array) -> jax.Array:
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ p["q"], x))
    return jnp.einsum("bqk,bkd->bqd", scores, x) @ p["o"]


def convolved(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )


def strided(p: Any, x: jax.Array) -> jax.Array:
    """Padding by a size that is not known."""
    y = lax.conv_general_dilated(x, p["w"], (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return y.sum(1)


def recurrent(p: Any, x: jax.Array) -> jax.Array:
    """A loop of a length that is not known, and one without products."""

    def step(h: jax.Array, xt: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.clip(xt @ p["in"] + h @ p["rec"], -1.0, 1.0)
        return h, h

    start = jnp.zeros((x.shape[0], 4))
    ys = lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1]
    mean = lambda c, y: (0.5 * c + 0.5 * y, None)  # noqa: E731
    return lax.scan(mean, start, ys)[0] @ p["out"]


def two_layers(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["a"]) @ p["b"]


LONG = Case(lambda p, x: x @ p["w"], {"w": normal(0, 600, 7)}, normal(1, 2, 600))
LAYERS = Case(two_layers, {"a": normal(0, 8, 4), "b": normal(1, 4, 2)}, normal(2, 3, 8))
HEADS = Case(attention, {"q": normal(0, 4, 4), "o": normal(1, 4, 3)}, normal(2, 2, 5, 4))
RECURRENT = Case(
    recurrent,
    {"in": normal(0, 3, 4), "rec": normal(1, 4, 4), "out": normal(2, 4, 2)},
    normal(3, 2, 5, 3),
)
PADDED = Case(convolved, {"w": normal(0, 3, 2, 4)}, normal(1, 3, 4, 2))

CASES = {
    "sums in chunks": Exported(LONG, W8A8, "b, 600"),
    "layers": Exported(LAYERS, W8A8, "b, 8"),
    "tokens": Exported(dense(features=32), qj.presets.w8a8_dynamic(), "b, 32"),
    "blocks": Exported(dense(features=32), qj.presets.mxfp4(), "b, 32"),
    "padded tokens": Exported(PADDED, by(qj.weighted(), TOKENS), "b, 4, 2"),
    "any width": Exported(PADDED._replace(f=strided), W8A8, "b, t, 2"),
    "any length": Exported(RECURRENT, W8A8, "b, t, 3"),
    "attention": Exported(HEADS, by(qj.everything(), qj.activation_quantizer()), "b, t, 4"),
}


def prepared(one: Exported) -> tuple[qj.Plan, Any]:
    found = ready(one.case, one.policy)
    return found.plan, found.qstate


def exported(run: Any, one: Exported, **given: Any) -> Any:
    shape = jax.export.symbolic_shape(one.shape, **given)
    return jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_any_batch_is_simulated_and_executed_as_that_batch_is(name):
    one = CASES[name]
    (f, params, x), (plan, qstate) = one.case, prepared(one)
    frozen = qj.freeze(plan, qstate, params)
    for verb, given in ((qj.fake_quantize, params), (qj.execute, frozen)):
        run = lambda x, verb=verb, given=given: verb(f, plan)(qstate, given, x)  # noqa: E731
        program = exported(run, one)
        for some in (x, x[:1], jnp.concatenate([x, x])):
            assert_array_equal(program.call(some), jax.jit(run)(some))


@pytest.mark.parametrize("name", ["layers", "attention"])
def test_gradients_of_any_batch_are_those_of_that_batch(name):
    one = CASES[name]
    (f, params, x), (plan, qstate) = one.case, prepared(one)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(qj.fake_quantize(f, plan)(qstate, params, x) ** 2)

    gradients = lambda x: jax.grad(loss, (0, 1))(params, x)  # noqa: E731
    program = exported(gradients, one)
    for some in (x, x[:1]):
        want = jax.jit(gradients)(some)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), program.call(some), want
        )


def test_one_tensor_of_any_length():
    """Also where the scales are as many as the rows."""

    def total(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(qj.fake_quant(x, scale, jnp.zeros_like(scale), bits=8) ** 2)

    rows = jax.export.symbolic_shape("b, 8")
    x = normal(0, 3, 8)
    for scale, size in ((jnp.float32(0.1), ()), (jnp.full((3, 1), 0.1), (rows[0], 1))):
        gradient = jax.jit(jax.grad(total, (0, 1)))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (rows, size)]
        program = jax.export.export(gradient)(*shapes)
        jax.tree.map(assert_array_equal, program.call(x, scale), gradient(x, scale))


def test_a_bound_of_the_length_keeps_sums_exact():
    """Of 128 tokens no sum leaves float32's integers: the product is one of int8."""
    one = CASES["attention"]
    (f, params, _), (plan, qstate) = one.case, prepared(one)
    frozen = qj.freeze(plan, qstate, params)
    run = lambda x: qj.execute(f, plan)(qstate, frozen, x)  # noqa: E731
    bounded = exported(run, one, constraints=["t <= 128"]).mlir_module()
    free = exported(run, one).mlir_module()
    assert bounded.count("i8>") > free.count("i8>")


def test_a_table_of_unknown_sizes_prints():
    one = CASES["any length"]
    shape = jax.export.symbolic_shape(one.shape)
    table = qj.sites(one.case.f, one.case.params, jax.ShapeDtypeStruct(shape, jnp.float32))
    shown = str(table)
    assert "scan×t" in shown
    assert "12*b*t" in shown
    assert "28*b*t + 8*b MACs" in str(qj.plan(W8A8, table))
