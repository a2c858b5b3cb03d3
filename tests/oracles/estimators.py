"""Values and gradients of the published estimators in float64, entry by entry.

Each function takes ``x`` (any shape), one scale, one zero point, the width and its own parameters
as Python numbers, and returns what one entry's ``y`` is and its derivatives: by ``x``, and by each
parameter. Written from the papers' equations, without the library's decomposition into slopes,
transforms and resolved scales.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """``y``, ``∂y/∂x``, and ``∂y/∂p`` by the name of ``p``; arrays of the shape of ``x``."""

    y: np.ndarray
    x: np.ndarray
    others: dict[str, np.ndarray]


def bounds(bits: int, *, signed: bool) -> tuple[int, int]:
    if signed:
        return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return 0, 2**bits - 1


def clipped(x, scale, zero_point, bits, *, signed) -> Entry:
    """torch.fake_quantize_per_tensor_affine: a gradient passes where the rounded code is inside."""
    low, high = bounds(bits, signed=signed)
    q = np.rint(x / scale) + zero_point
    return _of_scale(x, scale, zero_point, low, high, (q >= low) & (q <= high))


def lsq(x, scale, zero_point, bits, *, signed, factor=1.0, of_zero=1.0) -> Entry:
    """Esser et al., 2020, equations 1 to 3 and 5, times the gradient scale; zero points as in LSQ+.

    A gradient passes where ``v = x/s``, not rounded, is between the bounds and on neither.
    """
    low, high = bounds(bits, signed=signed)
    v = x / scale + zero_point
    entry = _of_scale(x, scale, zero_point, low, high, (v > low) & (v < high))
    factors = {"scale": factor, "zero_point": of_zero}
    return entry._replace(others={name: factors[name] * entry.others[name] for name in factors})


def _of_scale(x, scale, zero_point, low, high, passes) -> Entry:
    q = np.clip(np.rint(x / scale) + zero_point, low, high) - zero_point
    others = {
        "scale": np.where(passes, q - x / scale, q),
        "zero_point": np.where(passes, 0.0, -scale),
    }
    return Entry(scale * q, np.float64(passes), others)


def straight_through(x, scale, zero_point, bits, *, signed) -> Entry:
    """Bengio et al., 2013: the rounding and the clipping are not there in the backward pass."""
    low, high = bounds(bits, signed=signed)
    q = np.clip(np.rint(x / scale) + zero_point, low, high) - zero_point
    return Entry(
        scale * q,
        np.ones(x.shape),
        {"scale": q - x / scale, "zero_point": np.zeros(x.shape)},
    )


def pact(x, scale, zero_point, bits, *, signed, clip) -> Entry:
    """Choi et al., 2018, equations 1 to 3; symmetric where codes have signs."""
    del scale, zero_point
    high = bounds(bits, signed=signed)[1]
    lower = -clip if signed else 0.0
    clipped = np.where(x >= clip, clip, np.where(x <= lower, lower, x))
    y = np.rint(clipped * high / clip) * clip / high
    to_x = np.float64((x < clip) & (x > lower))
    to_clip = np.float64(x >= clip) - (np.float64(x <= lower) if signed else 0.0)
    return Entry(y, to_x, {"clip": to_clip})


def dorefa_weights(x, scale, zero_point, bits, *, signed) -> Entry:
    """Zhou et al., 2016: ``y = s · round(high · tanh(x)/max|tanh(x)|)``; the gradient of one output
    by all inputs is summed over outputs with weight 1."""
    del zero_point
    high = bounds(bits, signed=signed)[1]
    t = np.tanh(x)
    at, m = np.argmax(np.abs(t)), np.max(np.abs(t))
    y = scale * np.rint(t / m * high)
    jacobian = np.diag((1 - t.ravel() ** 2) / m)
    jacobian[:, at] -= t.ravel() / m**2 * np.sign(t.ravel()[at]) * (1 - t.ravel()[at] ** 2)
    to_x = scale * high * jacobian.sum(axis=0).reshape(x.shape)
    return Entry(y, to_x, {"scale": np.rint(t / m * high)})


def dorefa_activations(x, scale, zero_point, bits, *, signed) -> Entry:
    """Zhou et al., 2016: the gradient passes where x itself lies in the range."""
    low, high = bounds(bits, signed=signed)
    v = x / scale
    q = np.clip(np.rint(v) + zero_point, low, high) - zero_point
    inside = (v + zero_point >= low) & (v + zero_point <= high)
    return Entry(scale * q, np.float64(inside), {"scale": np.where(inside, q - v, q)})


def surrogate(function: Callable[..., np.ndarray]) -> Callable[..., Entry]:
    """A binary estimator: ``y = s · sign(x)``, with the derivative of ``function`` for the sign's,
    taken by central differences."""

    def model(x, scale, zero_point, bits, *, signed, **own) -> Entry:
        assert bits == 1
        assert signed
        assert zero_point == 0
        u, step = x / scale, 1e-6
        slope = (function(u + step, **own) - function(u - step, **own)) / (2 * step)
        sign = np.where(x >= 0, 1.0, -1.0)
        return Entry(scale * sign, slope, {"scale": sign - slope * u})

    return model


def approx_sign(u):
    """Liu et al., 2018: parabolas between -1 and 1."""
    inner = np.where(u < 0, 2 * u + u**2, 2 * u - u**2)
    return np.where(u < -1, -1.0, np.where(u > 1, 1.0, inner))


def swish_sign(u, beta):
    """Darabi et al., 2019: ``2σ(βu)(1 + βu(1 - σ(βu))) - 1``."""
    sigma = 1 / (1 + np.exp(-beta * u))
    return 2 * sigma * (1 + beta * u * (1 - sigma)) - 1


def error_decay(u, sharpness):
    """Qin et al., 2020: ``k tanh(t u)``."""
    return max(1 / sharpness, 1.0) * np.tanh(sharpness * u)


def magnitude_aware(x, scale, zero_point, bits, *, signed) -> Entry:
    """Liu et al., 2018: ``s`` within -1..1, nothing outside."""
    del bits, signed, zero_point
    slope = scale * (np.abs(x) < 1)
    sign = np.where(x >= 0, 1.0, -1.0)
    return Entry(scale * sign, slope, {"scale": sign - slope * x / scale})


def dsq(x, scale, zero_point, bits, *, signed, alpha) -> Entry:
    """Gong et al., 2019: central differences of the staircase ``l + Δ (i + (φ + 1)/2)``."""
    low, high = bounds(bits, signed=signed)

    def staircase(v, a):
        i = np.floor(v)
        k = math.log(2 / a - 1)
        return i + (np.tanh(k * (v - i - 0.5)) / (1 - a) + 1) / 2

    delta = 2 if bits == 1 and signed else 1  # from -1 to 1, or from level to level
    v, step = (x / scale + zero_point - low) / delta, 1e-6
    q = np.clip(np.rint(x / scale) + zero_point, low, high) - zero_point
    q = np.where(x >= 0, 1.0, -1.0) if delta == 2 else q
    within = (v >= 0) & (v <= (high - low) / delta)
    slope = np.where(within, (staircase(v + step, alpha) - staircase(v - step, alpha)), 0.0)
    slope = slope / (2 * step)
    to_alpha = (staircase(v, alpha + step) - staircase(v, alpha - step)) / (2 * step)
    to_alpha = np.where(within, scale * delta * to_alpha, 0.0)
    return Entry(scale * q, slope, {"scale": q - slope * x / scale, "alpha": to_alpha})


def tqt(x, scale, zero_point, bits, *, signed, log2_threshold) -> Entry:
    """Jain et al., 2020: a power of two above the threshold, straight through the ceiling."""
    del scale
    low, high = bounds(bits, signed=signed)
    s = 2.0 ** (math.ceil(log2_threshold) - (bits - 1 if signed else bits))
    v = x / s
    q = np.rint(v) + zero_point
    inside = (q >= low) & (q <= high)
    q = np.clip(q, low, high) - zero_point
    to_threshold = s * math.log(2) * np.where(inside, q - v, q)
    return Entry(s * q, np.float64(inside), {"log2_threshold": to_threshold})


def qil(x, scale, zero_point, bits, *, signed, center, distance, gamma) -> Entry:
    """Jung et al., 2019: the transformer's central differences; rounding straight through."""
    del zero_point
    high = bounds(bits, signed=signed)[1]

    def transformer(x, c, d, g):
        linear = 0.5 / d * np.abs(x) + 0.5 - 0.5 * c / d
        t = np.where(np.abs(x) < c - d, 0.0, np.where(np.abs(x) > c + d, 1.0, 0.0))
        between = (np.abs(x) >= c - d) & (np.abs(x) <= c + d)
        t = np.where(between, np.abs(linear) ** g, t)
        return np.sign(x) * t if signed else np.where(x > 0, t, 0.0)

    own, step = [center, distance, gamma], 1e-6
    q = np.rint(transformer(x, *own) * high)

    def central(index: int) -> np.ndarray:
        up, down = ([*own[:index], own[index] + h, *own[index + 1 :]] for h in (step, -step))
        return scale * high * (transformer(x, *up) - transformer(x, *down)) / (2 * step)

    to_x = (transformer(x + step, *own) - transformer(x - step, *own)) / (2 * step)
    others = {"center": central(0), "distance": central(1), "gamma": central(2), "scale": q}
    return Entry(scale * q, scale * high * to_x, others)


def differentiable_quantization(x, scale, zero_point, bits, *, signed, clip) -> Entry:
    """Uhlich et al., 2020, parametrization U3."""
    del zero_point, bits
    lower = -clip if signed else 0.0
    inside = (x < clip) & (x > lower)
    q = np.rint(np.clip(x, lower, clip) / scale)
    to_scale = np.where(inside, q - x / scale, q - np.clip(x, lower, clip) / scale)
    to_clip = np.float64(x >= clip) - (np.float64(x <= lower) if signed else 0.0)
    return Entry(scale * q, np.float64(inside), {"scale": to_scale, "clip": to_clip})


def rounded_width(x, scale, zero_point, bits, *, signed, clip, width) -> Entry:
    """The scale is ``clip / (2^(w-1) - 1)`` (``2^w - 1`` unsigned), whose rounding has slope 1."""
    del zero_point, bits, scale
    power = 2.0 ** (np.rint(width) - (1 if signed else 0))
    s = clip / (power - 1)
    lower = -clip if signed else 0.0
    clipped = np.clip(x, lower, clip)
    q = np.rint(clipped / s)
    of_scale = q - clipped / s
    outside = np.float64(x >= clip) - (np.float64(x <= lower) if signed else 0.0)
    return Entry(
        s * q,
        np.float64((x < clip) & (x > lower)),
        {
            "clip": outside + of_scale / (power - 1),
            "width": of_scale * -clip * power * math.log(2) / (power - 1) ** 2,
        },
    )


def ewgs(g, x, scale, zero_point, bits, *, signed, delta) -> tuple[np.ndarray, ...]:
    """Lee et al., 2021: gradients by x, scale and zero point of ``Σ g y``, entry by entry."""
    low, high = bounds(bits, signed=signed)
    v = x / scale + zero_point
    q = np.rint(x / scale) + zero_point
    inside = (q >= low) & (q <= high)
    q = np.clip(q, low, high)
    normalized = (v - low) / (high - low)
    discrete = (q - low) / (high - low)
    scaled = g * (1 + delta * np.sign(g) * (normalized - discrete))  # by the latent value
    to_x = np.where(inside, scaled, 0.0)
    to_scale = g * (q - zero_point) - to_x * x / scale
    return scale * (q - zero_point), to_x, to_scale, scale * (to_x - g)
