"""Integer products of a model's own equations, with codes as the model's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.integers import IntegerOperand
from quantjax.interpreter import NOTHING, Outcome, Product, Site, Visit, evaluate, trace
from tests.products.forms import Form

Multiply = Callable[[Product, IntegerOperand, IntegerOperand], jax.Array]


def site_of(form: Form, dtype: Any = jnp.int32) -> Site:
    """The one site of a form; its operands enter as the form has them."""
    w = tuple(reversed(form.w)) if form.transposed else form.w
    program = trace(form.f, {"w": jnp.zeros(w, dtype)}, jnp.zeros(form.x, dtype))
    (site,) = program.sites.values()
    assert {o.key: o.shape for o in site.operands} == {"weight": form.w, "activation": form.x}
    return site


def run(
    form: Form, multiply: Multiply, x: Any, w: Any, found: Mapping[str, Any], dtype: Any = jnp.int32
) -> jax.Array:
    """``form.f`` on codes, its product replaced.

    Args:
      x, w: int8 codes, the weight as it enters the product.
      found: ``(zero point, factor)`` of ``activation`` and ``weight``.
      dtype: of the equation; a sum in int32 is returned as it is.
    """
    w = w.T if form.transposed else w
    arguments = {"w": w.astype(dtype)}, x.astype(dtype)
    program = trace(form.f, *arguments)
    (site,) = program.sites.values()

    def handler(visit: Visit) -> Outcome:
        operands = []
        for operand, codes in zip(site.operands, (visit.lhs, visit.rhs), strict=True):
            zero_point, factor = found[operand.key]
            operands.append(IntegerOperand(codes.astype(jnp.int8), zero_point, factor))
        return Outcome(multiply(visit.product, *operands))

    return evaluate(program, handler, frozenset([site.name]), NOTHING, *arguments).result


EXTREMES = np.array([-128, 127, -127, 126, 0, -1, 1])


def int8(seed: int, *shape: int) -> np.ndarray:
    """Codes of the whole range, half of them at its ends."""
    draw = np.random.default_rng(seed)
    ends = draw.choice(EXTREMES, shape)
    return np.where(draw.random(shape) < 0.5, ends, draw.integers(-128, 128, shape)).astype(np.int8)


def kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Full size along ``axes``, 1 along all others."""
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a program and of the programs in it; of those by platform, the default's."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        programs = list(jax.extend.core.jaxprs_in_params(eqn.params))
        is_by_platform = eqn.params.get("branches_platforms") is not None
        for inner in programs[-1:] if is_by_platform else programs:
            found += equations(inner)
    return found


def product_dtypes(jaxpr: Any) -> list[tuple[str, str, str, str]]:
    """``(primitive, left, right, result)`` of each product; dots with rows of ones are sums."""
    names, every = ("dot_general", "conv_general_dilated"), equations(jaxpr)
    ones = {eqn.outvars[0] for eqn in every if _fills(eqn)}
    products = [eqn for eqn in every if eqn.primitive.name in names]
    is_sum = lambda eqn: eqn.primitive.name == "dot_general" and eqn.invars[0] in ones  # noqa: E731
    variables = [
        (eqn.primitive.name, *eqn.invars, *eqn.outvars) for eqn in products if not is_sum(eqn)
    ]
    return [(name, *(str(v.aval.dtype) for v in rest)) for name, *rest in variables]


def _fills(eqn: Any) -> bool:
    """Whether it makes an array of one number that the program holds."""
    fills = eqn.primitive.name == "broadcast_in_dim"
    return fills and isinstance(eqn.invars[0], jax.extend.core.Literal)
