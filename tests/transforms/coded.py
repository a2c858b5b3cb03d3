"""Codes and sums at every site: of ``qj.execute``, of ``qj.fake_quantize``, and in int64 NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax.affine import QParams
from quantjax.data_free import dequantize_params
from quantjax.integers import accumulate
from quantjax.interpreter import Carried, Op, Outcome, Product, Visit, evaluate, trace
from quantjax.planning import Plan
from quantjax.products import Execution, coded, in_float
from quantjax.site_plan import OperandPlan, SitePlan
from quantjax.transforms.execute import _values, executed_product
from quantjax.transforms.executed_codes import integer_operand
from quantjax.transforms.fake_quantize import live_qparams, quantized_product, site_values
from quantjax.transforms.stored import frozen_leaves, stored_weights, with_frozen
from tests.models import Case
from tests.oracles.affine import float32_parameters
from tests.oracles.integers import Integers, codes, spread
from tests.products.forms import Quantized
from tests.products.terms import Terms, Window, conv_terms, einsum_terms


class Recorded(NamedTuple):
    """One run: its result, records by site (a leading axis for each scan), and the equations."""

    out: Any
    records: Mapping[str, Any]
    products: Mapping[str, Product]


def recording_execution(case: Case, plan: Plan) -> Callable[..., Recorded]:
    """``(qstate, qparams, x)``: what ``qj.execute`` computes, with operands and int32 sums."""
    planned = {entry.site.name: entry for entry in plan.quantized}
    stored = {weight.entry.site.name: weight for weight in stored_weights(plan)}
    products: dict[str, Product] = {}

    def handler(visit: Visit) -> Outcome:
        entry = planned[visit.site.name]
        products[visit.site.name] = visit.product
        executed = executed_product(entry, visit)
        sums = None
        if entry.form.execution is Execution.INTEGER:
            quantizers = {o.operand.side: o.quantizer for o in entry.operands}
            pairs = enumerate(executed.operands)
            sums = accumulate(
                visit.product, *(integer_operand(c, quantizers[side]) for side, c in pairs)
            )
        record = {"raw": (visit.lhs, visit.rhs), "operands": executed.operands, "sums": sums}
        return Outcome(executed.out, record={**record, "out": executed.out})

    @jax.jit
    def run(qstate: Any, qparams: Any, x: Any) -> Any:
        params, frozen = dequantize_params(qparams), frozen_leaves(qparams)
        program = trace(case.f, params, x)
        merged = with_frozen(plan, stored, qstate, frozen)
        carried = Carried(_values(plan, program, stored, merged, frozen, params, {}), {})
        found = evaluate(program, handler, frozenset(planned), carried, params, x, collect=True)
        return found.result, found.records

    return lambda *arguments: Recorded(*run(*arguments), products)


def recording_simulation(case: Case, plan: Plan) -> Callable[..., Recorded]:
    """``(qstate, params, x)``: what ``qj.fake_quantize`` computes, with centered codes and sums."""
    planned = {entry.site.name: entry for entry in plan.quantized}
    products: dict[str, Product] = {}

    def side_of(operand: OperandPlan, x: jax.Array, value: Any) -> Any:
        if operand.quantizer is None:
            return in_float(x)
        if operand.is_weight and value.weight is not None:
            return value.weight
        qparams = live_qparams(operand, x, value.qparams[operand.key])
        return coded(x, qparams, operand.quantizer.arithmetic)

    def handler(visit: Visit) -> Outcome:
        entry, raw = planned[visit.site.name], (visit.lhs, visit.rhs)
        products[visit.site.name] = visit.product
        out = quantized_product(entry, visit).out
        sides = sorted(entry.operands, key=lambda operand: operand.operand.side)
        both = [side_of(o, x, visit.value) for o, x in zip(sides, raw, strict=True)]
        sums = visit.product.in_float32(*(side.values for side in both))
        return Outcome(out, record={"raw": raw, "sides": both, "sums": sums, "out": out})

    @jax.jit
    def run(qstate: Any, params: Any, x: Any) -> Any:
        program = trace(case.f, params, x)
        carried = Carried(site_values(plan, program, qstate, params, {}), {})
        found = evaluate(program, handler, frozenset(planned), carried, params, x, collect=True)
        return found.result, found.records

    return lambda *arguments: Recorded(*run(*arguments), products)


def steps_of(entry: SitePlan, record: Any) -> list[tuple[int, ...]]:
    """Indices of the visits of a site."""
    scans = sum(label.startswith("scan") for label in entry.site.loops)
    return list(np.ndindex(record["out"].shape[:scans]))


def at(tree: Any, index: tuple[int, ...]) -> Any:
    """One visit's part of a record, in NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def live_qparams_of(operand: OperandPlan, x: np.ndarray, bits: Any) -> QParams:
    """Min-max of ``x``, or of each of its rows, by the formula."""
    quantizer = operand.quantizer
    by_row = isinstance(quantizer.granularity, qj.PerToken)
    reduced = tuple(a for a in range(x.ndim) if not (by_row and a in operand.operand.free))
    low, high = x.min(axis=reduced, keepdims=True), x.max(axis=reduced, keepdims=True)
    family = Integers(int(bits), quantizer.format.signed)
    found = float32_parameters(low, high, family, symmetric=quantizer.symmetric)
    return QParams(found.scale, found.zero_point, bits)


class Model(NamedTuple):
    """One operand in NumPy: its codes, and what a product needs."""

    codes: np.ndarray
    operand: Quantized


def modelled(operand: OperandPlan, x: np.ndarray, qparams: QParams) -> Model:
    """int64 codes of one operand, from its floats."""
    family = Integers(int(qparams.bits), operand.quantizer.format.signed)
    found = codes(x, qparams.scale, qparams.zero_point, family)
    zero = spread(np.int64(np.rint(qparams.zero_point)), x.shape)
    return Model(found, Quantized(found - zero, spread(np.asarray(qparams.scale), x.shape)))


@functools.lru_cache
def _dot_terms(left: Any, right: Any, numbers: Any) -> Terms:
    (contracted, batch), letters = numbers, iter("abcdefghijklmnopqrstuvwxyz")
    labels = [dict.fromkeys(range(len(left)), ""), dict.fromkeys(range(len(right)), "")]
    for pairs in (batch, contracted):
        for first, second in zip(*pairs, strict=True):
            labels[0][first] = labels[1][second] = next(letters)
    for label in labels:
        label.update({axis: next(letters) for axis, known in label.items() if not known})
    free = [
        "".join(c for axis, c in label.items() if axis not in (*summed, *shared))
        for label, summed, shared in zip(labels, contracted, batch, strict=True)
    ]
    output = "".join(labels[0][axis] for axis in batch[0]) + free[0] + free[1]
    inputs = ",".join("".join(label.values()) for label in labels)
    return einsum_terms(f"{inputs}->{output}", left, right)


@functools.lru_cache
def _conv_terms(left: Any, right: Any, numbers: Any, *rest: Any) -> Terms:
    strides, padding, lhs_dilation, rhs_dilation, groups = rest
    space = "DHW"[-len(strides) :]
    orders = ("NC" + space, "OI" + space, "NC" + space)

    def layout(spec: Any, order: str) -> str:
        return "".join(c for _, c in sorted(zip(spec, order, strict=True)))

    layouts = tuple(layout(spec, order) for spec, order in zip(numbers, orders, strict=True))
    window = Window(strides, padding, lhs_dilation, rhs_dilation, layouts, groups)
    return conv_terms(left, right, window)


def terms_of(product: Product) -> Terms:
    """The multiply-adds of an equation, from its parameters."""
    shapes, params = (product.lhs.shape, product.rhs.shape), product.params
    if product.op is Op.DOT:
        return _dot_terms(*shapes, params["dimension_numbers"])
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")
    rest = [params[name] for name in names]
    rest[1] = tuple(map(tuple, rest[1]))
    return _conv_terms(*shapes, params["dimension_numbers"], *rest)


def blocks_of(product: Product, size: int) -> np.ndarray:
    """Which group each term is in: runs of ``size`` along the sum, of the right operand."""
    if product.op is Op.DOT:
        axes = product.params["dimension_numbers"][0][1]
    else:
        axes = (product.params["dimension_numbers"].rhs_spec[1],)
    shape = product.rhs.shape
    position = np.zeros(shape, int)
    for axis in axes:
        position = position * shape[axis] + np.indices(shape)[axis]
    return (position // size).ravel()[terms_of(product).rhs]


def frozen_and_floats(qparams: Any) -> tuple[list[qj.QTensor], list[Any]]:
    """Leaves of a frozen tree by kind."""
    is_quantized = lambda leaf: isinstance(leaf, qj.QTensor)  # noqa: E731
    leaves = jax.tree.leaves(qparams, is_leaf=is_quantized)
    quantized = [leaf for leaf in leaves if is_quantized(leaf)]
    return quantized, [leaf for leaf in leaves if not is_quantized(leaf)]


def as_int64(x: Any) -> np.ndarray:
    """Whole numbers, whatever they are held in."""
    wide = np.asarray(x, np.float64)
    assert np.array_equal(wide, np.rint(wide))
    return wide.astype(np.int64)


def small(x: jnp.ndarray) -> np.ndarray:
    """Where a float32 sum of integers is exact for certain."""
    return np.abs(x) < 2**24
