"""How many arrays of the size of ``x`` a quantizer writes: each is a pass over memory."""

import re

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax.affine import QParams
from quantjax.arithmetic import Arithmetic
from quantjax.simulation import apply
from tests.models import normal

ROWS, COLUMNS = 64, 48


def written(f, *arguments) -> list[str]:
    """Instructions of the compiled program, outside of its fusions, that fill such an array."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    found = re.findall(rf"%(\S+) = f32\[{ROWS},{COLUMNS}\]\S* (\w[\w-]*)\(", entry)
    return [name for name, op in found if op not in ("parameter", "bitcast")]


@pytest.fixture(params=["scale of a tensor", "scales of columns"])
def qparams(request) -> QParams:
    shape = (1, COLUMNS) if request.param == "scales of columns" else (1, 1)
    return QParams(jnp.full(shape, 0.05), jnp.zeros(shape), jnp.float32(8), ())


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_quantizing_is_one_pass_and_so_is_its_derivative(qparams, signed):
    arithmetic = Arithmetic(qj.integer(signed=signed))
    x, cotangent = normal(1, ROWS, COLUMNS), normal(2, ROWS, COLUMNS)

    def back(x, qparams, cotangent):
        return jax.vjp(lambda x: apply(x, qparams, arithmetic), x)[1](cotangent)

    assert len(written(lambda x, q: apply(x, q, arithmetic), x, qparams)) == 1
    assert len(written(back, x, qparams, cotangent)) == 1


def test_what_makes_an_activation_is_computed_where_its_codes_are(qparams):
    """Codes take the place of the activation, which is not written out for the derivative."""
    arithmetic = Arithmetic(qj.integer(signed=False))
    x, w = normal(1, ROWS, COLUMNS), normal(2, COLUMNS, COLUMNS)

    def loss(x, qparams, w):
        return jnp.sum(jnp.sin(apply(jax.nn.relu(x + 0.5), qparams, arithmetic) @ w))

    def in_float(x, w):
        return jnp.sum(jnp.sin(jax.nn.relu(x + 0.5) @ w))

    own = written(jax.value_and_grad(in_float), x, w)
    assert len(written(jax.value_and_grad(loss), x, qparams, w)) == len(own)
