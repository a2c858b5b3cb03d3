"""What comes after a product: its bias, and its output, quantized as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax.affine import QParams, is_bypassed
from quantjax.interpreter import Addition, Additions, Outcome, Product, Role
from quantjax.products import bias_at_sums, rounded, sums_scale
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.transforms.keys import Key, next_keys
from quantjax.transforms.live import live_qparams


class Sums(NamedTuple):
    """The scale of a product's sums, in the layout of its output, and whether there is one."""

    scale: jax.Array
    bypass: jax.Array


def sums_of(
    entry: SitePlan, product: Product, factors: tuple[Any, Any], bits: tuple[Any, Any]
) -> Sums | None:
    """For a bias in the units of the sums; None where the plan has no such bias.

    Args:
      factors: the scales of both operands, as the product has them.
      bits: their widths.
    """
    if entry.bias is None:
        return None
    bypass = jnp.any(jnp.stack([jnp.any(is_bypassed(jnp.asarray(b))) for b in bits]))
    return Sums(sums_scale(product, *factors), bypass)


def bits_of(entry: SitePlan, qparams: Mapping[str, QParams]) -> tuple[Any, Any]:
    """The widths of left and right operand; of a plan that has both."""
    by_side = {o.operand.side: qparams[o.key].bits for o in entry.operands if o.key in qparams}
    return by_side.get(0, 1.0), by_side.get(1, 1.0)


def additions_of(
    planned: Mapping[str, SitePlan], handler: Callable[[Addition], Outcome]
) -> Additions:
    """The handler for the sites whose bias or output is quantized."""
    return Additions(handler, frozenset(n for n, e in planned.items() if e.after or e.bias))


def finish(
    entry: SitePlan, outcome: Outcome, qparams: Mapping[str, QParams], key: Key | None
) -> Outcome:
    """The outcome with its output quantized, where the plan has a quantizer for it.

    Args:
      key: the site's state as it was ahead of the outcome.
    """
    operand = entry.planned(Role.OUTPUT)
    if operand is None:
        return outcome
    out = _rounded(operand, outcome.out, qparams[operand.key], next_keys(key).output)
    return outcome._replace(out=out)


def sum_with_bias(
    entry: SitePlan, addition: Addition, qparams: Mapping[str, QParams], key: Key | None
) -> Outcome:
    """Product and bias, which is quantized where the plan says so; the output as it comes."""
    keys, bias, operand = next_keys(key), addition.bias, entry.planned(Role.BIAS)
    if operand is not None:
        bias = _rounded(operand, bias, of_one_group(operand, qparams[operand.key]), keys.bias)
    elif entry.bias is not None:
        sums: Sums = addition.kept
        bias = bias_at_sums(bias, sums.scale, sums.bypass)
    return Outcome(addition.add(addition.out, bias), state=keys.after)


def added(
    entry: SitePlan, addition: Addition, qparams: Mapping[str, QParams], key: Key | None
) -> Outcome:
    """Product and bias, and the output of both, as planned."""
    return finish(entry, sum_with_bias(entry, addition, qparams, key), qparams, key)


def of_one_group(operand: OperandPlan, qparams: QParams) -> QParams:
    """Without the axes of the parameter, which the bias that is added may not have."""
    assert operand.quantizer is not None
    one = lambda array: jnp.reshape(array, ())  # noqa: E731
    estimator = operand.quantizer.estimator
    own = {name: one(array) for name, array in estimator.own(qparams.theta).items()}
    rest = operand.quantizer.format.map_groups(estimator.rest(qparams.theta), one)
    theta = {**(rest or {}), **own} if own else rest
    return QParams(one(qparams.scale), one(qparams.zero_point), qparams.bits, theta)


def _rounded(operand: OperandPlan, x: jax.Array, qparams: QParams, key: Key | None) -> jax.Array:
    assert operand.quantizer is not None
    return rounded(x, live_qparams(operand, x, qparams), operand.quantizer.arithmetic, key)
