"""Programs that are traced on one backend and lowered for another: the platform has its forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

import quantjax as qj
from quantjax.integers import accumulate, gpu
from tests.integers.test_accumulate import ALL
from tests.integers.visiting import int8, run
from tests.models import dense, normal, ready
from tests.products.forms import CONVS
from tests.products.terms import product

pytestmark = pytest.mark.thinned(3)

OPERAND = r"tensor<([0-9x?]+)xi8>"
DOT = re.compile(rf"stablehlo\.dot_general.*: \({OPERAND}, {OPERAND}\)")


def sums(name: str) -> Callable[..., Any]:
    """Sums of a form, with a zero point on either side."""
    form = ALL[name]
    zeros = [np.full((1,) * len(shape), 3, np.int32) for shape in (form.x, form.w)]
    found = {"activation": (zeros[0], None), "weight": (zeros[1], None)}
    return lambda x, w: run(form, accumulate, x, w, found)


def exported(f: Callable[..., Any], platforms: Sequence[str], *args: Any) -> export.Exported:
    return export.export(jax.jit(f), platforms=platforms)(*args)


def int8_dots(text: str) -> set[tuple[tuple[int, ...], ...]]:
    """The shapes of both operands of each product of int8."""
    return {
        tuple(tuple(int(size) for size in shape.split("x")) for shape in match.groups())
        for match in DOT.finditer(text)
    }


@pytest.mark.parametrize("name", ALL)
def test_lowered_for_a_gpu_all_int8_dots_are_filled_up(name):
    """Whatever backend traced it: others are seen to be multiplied wrongly there."""
    form = ALL[name]
    text = exported(sums(name), ["cuda"], int8(1, *form.x), int8(2, *form.w)).mlir_module()
    for operands in int8_dots(text):
        for _, rows, terms in operands:
            assert rows > 0 == rows % gpu.ROWS
            assert terms > 0 == terms % gpu.TERMS
    assert not re.search(rf"stablehlo\.convolution.*{OPERAND}", text)


@pytest.mark.parametrize("name", ALL)
def test_a_program_for_two_platforms_has_the_sums_of_int64(name):
    form = ALL[name]
    x, w = int8(1, *form.x), int8(2, *form.w)
    program = exported(sums(name), ["cpu", "cuda"], x, w)
    want = product(form.terms(), x.astype(np.int64) - 3, w.astype(np.int64) - 3)
    np.testing.assert_array_equal(program.call(x, w), want)


def test_a_program_for_one_platform_holds_its_forms_alone():
    """Those of the other are traced and not lowered."""
    name = next(name for name in ALL if name not in CONVS)
    args = int8(1, *ALL[name].x), int8(2, *ALL[name].w)
    one, other, both = (
        int8_dots(exported(sums(name), platforms, *args).mlir_module())
        for platforms in (["cpu"], ["cuda"], ["cpu", "cuda"])
    )
    assert one
    assert other
    assert not one & other
    assert one | other == both


def test_an_executed_model_is_exported_for_another_platform_and_any_batch():
    case = dense()
    model = ready(case, qj.uniform_policy())
    f = qj.execute(case.f, model.plan)
    frozen = qj.freeze(model.plan, model.qstate, case.params)
    batch = export.symbolic_shape("b")[0]
    x = jax.ShapeDtypeStruct((batch, *case.x.shape[1:]), case.x.dtype)
    program = exported(lambda x: f(model.qstate, frozen, x), ["cpu", "cuda"], x)
    for rows in (1, 5):
        given = normal(rows, rows, *case.x.shape[1:])
        want = jax.jit(f)(model.qstate, frozen, given)
        np.testing.assert_array_equal(program.call(given), want)
