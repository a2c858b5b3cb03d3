"""The forms of products that models have, each with its list of multiply-adds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantjax as qj
from quantjax.affine import QParams
from tests.models import Case, normal, planned
from tests.oracles.integers import Integers, codes, spread
from tests.products.terms import Terms, Window, conv_terms, einsum_terms, factors, product, same


class Form(NamedTuple):
    """``f(params, x)`` and its terms, ``x`` on the left; the weight as it enters the product."""

    f: Callable[..., jax.Array]
    x: tuple[int, ...]
    w: tuple[int, ...]
    terms: Callable[[], Terms]
    transposed: bool = False

    def case(self, seed: int = 0) -> Case:
        """Operands that use, and leave, the range of 8-bit codes at a scale near 1."""
        w = 90.0 * normal(seed, *self.w)
        w = w.T if self.transposed else w
        return Case(self.f, {"w": w}, 120.0 * normal(seed + 1, *self.x))

    def weight(self, params: Any) -> np.ndarray:
        """The weight operand."""
        w = np.asarray(params["w"])
        return w.T if self.transposed else w


def dot(spec: str, x: tuple[int, ...], w: tuple[int, ...], f: Any = None) -> Form:
    """A form given by an einsum."""
    default = lambda params, x: jnp.einsum(spec, x, params["w"])  # noqa: E731
    return Form(f or default, x, w, lambda: einsum_terms(spec, x, w))


def conv(
    x: tuple[int, ...],
    w: tuple[int, ...],
    *,
    strides: tuple[int, ...] | None = None,
    padding: tuple[tuple[int, int], ...] | str = "VALID",
    lhs_dilation: tuple[int, ...] | None = None,
    rhs_dilation: tuple[int, ...] | None = None,
    layouts: tuple[str, str, str] | None = None,
    groups: int = 1,
) -> Form:
    """A convolution; layouts are channels-last unless given."""
    n = len(x) - 2
    space = "DHW"[-n:]
    layouts = layouts or (f"N{space}C", f"{space}IO", f"N{space}C")
    ones = (1,) * n
    strides, lhs_dilation = strides or ones, lhs_dilation or ones
    rhs_dilation = rhs_dilation or ones
    pairs: Any = padding
    if isinstance(padding, str):
        sizes = [x[layouts[0].index(c)] for c in space]
        kernel = [w[layouts[1].index(c)] for c in space]
        pairs = ((0, 0),) * n if padding == "VALID" else same(sizes, kernel, strides)
    window = Window(strides, pairs, lhs_dilation, rhs_dilation, layouts, groups)

    def f(params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            params["w"],
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=layouts,
            feature_group_count=groups,
        )

    return Form(f, x, w, lambda: conv_terms(x, w, window))


CHANNELS_FIRST = ("NCHW", "OIHW", "NCHW")
DOTS = {
    "plain": dot("mk,kn->mn", (3, 7), (7, 5), lambda p, x: x @ p["w"]),
    "transposed": dot("mk,kn->mn", (3, 7), (7, 5), lambda p, x: x @ p["w"].T)._replace(
        transposed=True
    ),
    "weight_left": dot("km,nk->nm", (7, 3), (5, 7), lambda p, x: p["w"] @ x),
    "vector": dot("k,kn->n", (7,), (7, 5), lambda p, x: x @ p["w"]),
    "batched": dot("bmk,bkn->bmn", (2, 3, 7), (2, 7, 5)),
    "batch_last": dot("mkb,kbn->bmn", (3, 7, 2), (7, 2, 5)),
    "dense_general": dot("abij,ijo->abo", (2, 3, 4, 3), (4, 3, 5)),
    "heads": dot("btd,dhk->bthk", (2, 3, 6), (6, 2, 4)),
    "out_projection": dot("bthk,hkd->btd", (2, 3, 2, 4), (2, 4, 6)),
    "reversed_sum": dot("mkj,jkn->mn", (3, 4, 5), (5, 4, 2)),
}
CONVS = {
    "conv_1d": conv((2, 9, 3), (3, 3, 4), padding="SAME"),
    "conv_2d_same": conv((2, 5, 6, 3), (3, 3, 3, 4), padding="SAME"),
    "conv_2d_valid": conv((2, 5, 6, 3), (3, 2, 3, 4)),
    "conv_3d": conv((1, 3, 4, 3, 2), (2, 2, 2, 2, 3), padding="SAME"),
    "strided": conv((2, 7, 6, 3), (3, 3, 3, 4), strides=(2, 3), padding="SAME"),
    "uneven_padding": conv((1, 4, 4, 2), (3, 3, 2, 3), padding=((2, 0), (0, 3))),
    "cropped": conv((1, 6, 6, 2), (2, 2, 2, 3), padding=((-1, 0), (1, -2))),
    "rhs_dilated": conv((1, 7, 7, 2), (3, 2, 2, 3), rhs_dilation=(2, 3), padding="VALID"),
    "lhs_dilated": conv((1, 3, 4, 2), (3, 3, 2, 3), lhs_dilation=(2, 2), padding=((2, 1), (1, 2))),
    "grouped": conv((2, 4, 4, 6), (3, 3, 2, 9), groups=3, padding="SAME"),
    "depthwise": conv((2, 4, 4, 4), (3, 3, 1, 8), groups=4, padding="SAME"),
    "channels_first": conv((2, 3, 5, 5), (4, 3, 3, 3), padding="SAME", layouts=CHANNELS_FIRST),
    "mixed_layout": conv(
        (5, 2, 3, 5), (3, 4, 3, 2), padding="SAME", layouts=("HNCW", "IOHW", "NHCW")
    ),
}
FORMS = DOTS | CONVS


def hand_made(plan: qj.Plan, seed: int = 0, *, unit: bool = False) -> Any:
    """QParams that no calibration would give: odd scales, zero points anywhere in the range."""
    draw = np.random.default_rng(seed)
    qstate: dict[str, dict[str, QParams]] = {}
    for entry in plan.quantized:
        qstate[entry.site.name] = {}
        for operand in entry.quantized:
            shape, quantizer = operand.scale_shape, operand.quantizer
            assert shape is not None
            assert quantizer is not None
            scale = np.ones(shape) if unit else draw.uniform(0.7, 1.9, shape)
            zero = np.zeros(shape)
            if not quantizer.symmetric:
                low, high = (-128, 127) if quantizer.format.name == "int" else (0, 255)
                zero = draw.integers(low, high + 1, shape)
            qstate[entry.site.name][operand.key] = QParams(
                jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32), jnp.float32(8)
            )
    return qstate


class Quantized(NamedTuple):
    """One operand in NumPy: int64 codes minus zero point, and the scale of each entry."""

    centered: np.ndarray
    scale: np.ndarray


def quantized(x: Any, qparams: QParams, *, signed: bool) -> Quantized:
    """Codes of one operand by the int64 model."""
    x, scale, zero = (np.asarray(a) for a in (x, qparams.scale, qparams.zero_point))
    centered = codes(x, scale, zero, Integers(8, signed)) - spread(np.int64(zero), x.shape)
    return Quantized(centered.astype(np.int64), spread(scale, x.shape))


def expected(form: Form, case: Case, qparams: Any, *, signed: bool = False) -> np.ndarray:
    """``float32(int64 sum) · (s_x · s_w)``."""
    terms = form.terms()
    x = quantized(case.x, qparams["activation"], signed=signed)
    w = quantized(form.weight(case.params), qparams["weight"], signed=True)
    total = product(terms, x.centered, w.centered)
    return total.astype(np.float32) * factors(terms, x.scale, w.scale)


def plan_of(case: Case, weights: Any = None, activations: Any = None) -> qj.Plan:
    """8-bit weights per channel and asymmetric activations, unless told otherwise."""
    scheme = qj.Scheme(
        weights=weights or qj.weight_quantizer(),
        activations=activations or qj.activation_quantizer(),
    )
    return planned(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
