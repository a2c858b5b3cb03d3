"""What XLA is given: int8 operands, an int32 result, and no float on the way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from quantjax.integers import accumulate, integer_product, lowering
from quantjax.interpreter import Op
from tests.integers.test_by_group import FORMS as GROUPED
from tests.integers.test_by_group import of_groups
from tests.integers.visiting import equations, product_dtypes, run, site_of
from tests.products.forms import CONVS, FORMS, Form

BACKENDS = ("cpu", "gpu", "tpu")


PRODUCTS = [op for op in Op if not op.is_lookup]


@pytest.fixture
def direct(monkeypatch):
    """The default forms, whatever backend the tests run on, and whatever they are lowered for."""
    monkeypatch.setitem(lowering.TABLE, jax.default_backend(), lowering.DEFAULT)
    monkeypatch.setattr(lowering, "GPU", lowering.DEFAULT)


@pytest.mark.parametrize("backend", [*BACKENDS, "abacus"])
@pytest.mark.parametrize("op", PRODUCTS)
def test_a_backend_has_its_own_form_or_the_default_and_may_be_lowered_for_a_gpu(
    backend, op, monkeypatch
):
    """Traced for a GPU there is its form alone; for others, theirs and that of GPUs."""
    seen = []

    def named(name: str) -> Any:
        def form(lhs: Any, rhs: Any, **_: Any) -> Any:
            seen.append(name)
            return jnp.zeros((), jnp.int32)

        return form

    forms = {name: dict.fromkeys(Op, named(name)) for name in BACKENDS}
    monkeypatch.setattr(lowering, "TABLE", forms)
    monkeypatch.setattr(lowering, "GPU", forms["gpu"])
    monkeypatch.setattr(lowering, "DEFAULT", dict.fromkeys(Op, named("default")))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    codes = jnp.ones((4, 4), jnp.int8)
    jax.make_jaxpr(lowering.lowering(op))(codes, codes)
    own = backend if backend in BACKENDS else "default"
    assert set(seen) == {own, "gpu"}


def test_accumulate_takes_the_form_of_the_table(monkeypatch):
    """A form that is put into the table is used, for dots and convolutions."""
    for op, name in ((Op.DOT, "plain"), (Op.CONV, "strided")):
        seen = []

        def recorded(
            lhs: Any, rhs: Any, op: Op = op, seen: list[Any] = seen, **numbers: Any
        ) -> Any:
            seen.append((lhs.dtype, rhs.dtype))
            return lowering.DEFAULT[op](lhs, rhs, **numbers)

        monkeypatch.setitem(lowering.TABLE, jax.default_backend(), {op: recorded})
        traced(FORMS[name], zeros=True)
        assert (jnp.int8, jnp.int8) in seen


def traced(form: Form, *, zeros: bool) -> Any:
    """The jaxpr of a sum, all operands traced."""
    zero = [jnp.zeros((1,) * len(shape), jnp.int32) for shape in (form.x, form.w)]

    def sums(x: Any, w: Any, left: Any, right: Any) -> Any:
        found = {"activation": (left, None), "weight": (right, None)}
        return run(form, accumulate, x, w, found if zeros else dict.fromkeys(found, (None, None)))

    codes = jnp.zeros(form.x, jnp.int8), jnp.zeros(form.w, jnp.int8)
    return jax.make_jaxpr(sums)(*codes, *zero).jaxpr


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_products_are_int8_into_int32(name, zeros):
    jaxpr = traced(FORMS[name], zeros=zeros)
    op = "conv_general_dilated" if name in CONVS else "dot_general"
    # A zero point of the weight needs the sums over each window of a convolution's input.
    count = 2 if zeros and name in CONVS else 1
    assert product_dtypes(jaxpr) == [(op, "int8", "int8", "int32")] * count
    dtypes = {str(v.aval.dtype) for eqn in equations(jaxpr) for v in (*eqn.invars, *eqn.outvars)}
    assert dtypes <= {"int8", "int32", "bool"}  # no float, nothing wider


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("name", GROUPED)
def test_products_by_group_are_int8_into_int32(name):
    form, contracted = GROUPED[name]
    scales = jnp.ones(of_groups(form, contracted, 2))
    (site,) = [site_of(form)]

    def scaled(x: Any, w: Any, scales: Any) -> Any:
        found = {"activation": (None, jnp.ones((1,) * x.ndim)), "weight": (None, scales)}
        return run(form, integer_product, x, w, found, dtype=jnp.float32)

    codes = jnp.zeros(form.x, jnp.int8), jnp.zeros(form.w, jnp.int8)
    jaxpr = jax.make_jaxpr(scaled)(*codes, scales).jaxpr
    assert product_dtypes(jaxpr) == [(site.op.value, "int8", "int8", "int32")]
