"""What a product's own equation says: roles of axes, length of sums, work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.interpreter import Op, trace
from quantjax.interpreter.product import Product, product_of
from tests.products.forms import CONVS, DOTS, FORMS, Form


def product_in(form: Form) -> Product:
    """The one product of a form."""
    spec = jax.ShapeDtypeStruct
    case = form.case()
    program = trace(form.f, case.params, spec(form.x, jnp.float32))
    (found,) = [p for eqn in program.jaxpr.eqns if (p := product_of(eqn)) is not None]
    return found


@pytest.mark.parametrize("name", FORMS)
def test_the_length_of_sums_and_the_work_are_counted(name):
    """Each output sums equally many terms, padding included."""
    form = FORMS[name]
    found, terms = product_in(form), form.terms()
    assert found.op is (Op.DOT if name in DOTS else Op.CONV)
    per_output = np.bincount(terms.out)
    assert set(per_output) == {found.contraction_size()}
    assert found.multiply_adds() == len(terms.out)


@pytest.mark.parametrize("name", FORMS)
def test_axes_have_the_role_that_the_terms_give_them(name):
    """Free axes are those along which two entries never meet in one output."""
    form = FORMS[name]
    found, terms = product_in(form), form.terms()
    side = 1 if tuple(found.rhs.shape) == form.w else 0  # einsum may swap its operands
    free, contracted, window = found.axes(side)
    index = np.unravel_index(terms.rhs, form.w)
    for axis in range(len(form.w)):
        pairs = {(o, i) for o, i in zip(terms.out, index[axis], strict=True)}
        alone = len(pairs) == len({o for o, _ in pairs})  # each output has one index of this axis
        assert alone == (axis in free or form.w[axis] == 1), (axis, free, contracted, window)
    assert sorted(free + contracted + window) == list(range(len(form.w)))


def test_a_batch_in_groups_is_no_free_axis():
    """The weight gradient of a grouped convolution: each output sums over part of the batch."""

    def f(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            batch_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    program = trace(f, {"w": jnp.ones((3, 3, 4, 6))}, jnp.ones((4, 5, 5, 4)))
    (eqn,) = program.jaxpr.eqns
    found = product_of(eqn)
    assert found.axes(0) == ((), (3,), (1, 2))
    assert found.axes(1) == ((3,), (2,), (0, 1))
    assert found.contraction_size() == 36


def test_other_equations_are_no_products():
    program = trace(lambda p, x: jnp.cumsum(x * p["w"]), {"w": jnp.ones(3)}, jnp.ones(3))
    assert all(product_of(eqn) is None for eqn in program.jaxpr.eqns)
    assert program.sites == {}


def test_an_empty_result_has_sums_of_the_same_length():
    found = product_in(DOTS["plain"]._replace(x=(0, 7)))
    assert found.contraction_size() == 7
    assert found.multiply_adds() == 0


@pytest.mark.parametrize("name", ["conv_2d_same", "channels_first", "conv_3d", "depthwise"])
def test_taps_are_the_positions_of_the_window(name):
    form = CONVS[name]
    found = product_in(form)
    _, contracted, window = found.axes(1)
    assert found.taps() == np.prod([form.w[a] for a in window])
    assert found.contraction_size() == found.taps() * np.prod([form.w[a] for a in contracted])


def test_float32_at_the_highest_precision_whatever_the_model_asks_for():
    def f(params, x):
        return jax.lax.dot(x, params["w"], precision="default")

    case = DOTS["plain"].case()
    eqn = trace(f, case.params, case.x).jaxpr.eqns[0]
    bound = jax.make_jaxpr(product_of(eqn).in_float32)(case.x, case.params["w"])
    highest = jax.lax.Precision.HIGHEST
    assert bound.eqns[0].params["precision"] == (highest, highest)
    assert bound.eqns[0].params["preferred_element_type"] == jnp.float32
