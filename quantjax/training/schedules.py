"""Numbers that change over training: widths, and the sharpness of a surrogate gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import NUMBERS, expect, first_wrong

FLOAT_BITS = 32
"""Widths from here on mean float, which is 0 bits everywhere else."""

Schedule = Callable[[int | Int[Array, ""] | Float[Array, ""]], jax.Array]
"""From the number of the step to a float32 value, as optax has it."""


def progressive_bits(
    boundaries: Sequence[int] | Int[Array, " n"] | Float[Array, " n"],
    widths: Sequence[float] | Float[Array, "n+1 ..."],
) -> Schedule:
    """Widths that fall in stages, for instance 32, 8, 4, 2: ``widths[i]`` from boundary ``i`` on.

    ``bits(step) = widths[#{b : step >= b}]``. 32 or more stands for float and becomes 0, which
    passes through. Give the result to :func:`quantjax.training.with_bits` in each step.

    Args:
      boundaries: ascending steps at which the width changes; may be traced.
      widths: one more than boundaries, each an integer of 0 or more; may be traced, so that a sweep
        has a schedule for each cell.

    Raises:
      ArgumentError: text, say.
      TrainingError: concrete boundaries that do not ascend, where traced ones make NaN; widths that
        are no whole numbers of 0 or more; as many widths as boundaries.

    Sharp edges: steps are compared in float32, which holds whole numbers up to 2^24.

    >>> bits = progressive_bits([100, 200], [32, 8, 4])
    >>> [float(bits(step)) for step in (0, 99, 100, 200, 10_000)]
    [0.0, 0.0, 8.0, 4.0, 4.0]

    Source: Zhuang et al., Towards effective low-bitwidth convolutional neural networks, 2018,
    section 3.3, progressive quantization.
    """
    where = "qj.training.progressive_bits"
    kinds = (list, tuple, range, jax.Array, np.ndarray)
    for name, given, usual in (("boundaries", boundaries, "[100]"), ("widths", widths, "[8, 4]")):
        expect(given, kinds, argument=name, where=where, fix=f"{name}={usual}")
    starts = jnp.asarray(boundaries, jnp.float32)
    stages = jnp.asarray(widths, jnp.float32)
    if starts.ndim != 1 or stages.ndim == 0 or stages.shape[0] != starts.shape[0] + 1:
        raise errors.TrainingError(
            f"widths of shape {stages.shape} for boundaries of shape {starts.shape}",
            where=where,
            why="there is a width before the first boundary and one from each on",
            fix="progressive_bits([1000, 2000], [32, 8, 4])",
        )
    known = concrete(starts)
    if known is not None and not np.all(np.diff(known) >= 0.0):
        raise errors.TrainingError(
            f"boundaries {known.tolist()} that do not ascend",
            where=where,
            fix=f"boundaries={sorted(known.tolist())}",
        )
    _check_widths(stages, where)

    def bits(step: int | jax.Array) -> jax.Array:
        stage = jnp.sum((jnp.asarray(step, jnp.float32) >= starts).astype(jnp.int32))
        ascend = jnp.all(starts[1:] >= starts[:-1]) & ~jnp.any(jnp.isnan(starts))
        return jnp.where(ascend, _float_is_zero(stages[stage]), jnp.nan)

    return bits


def delayed_bits(start: int | Int[Array, ""], bits: float | Float[Array, "..."]) -> Schedule:
    """Float until step ``start``, then ``bits``: ``0`` before, ``bits`` from it on.

    Calibrate at the final width, and call :func:`quantjax.training.with_bits` with this in each
    step: a step at 0 bits keeps the scales for later.

    Args:
      start: the first quantized step; may be traced.
      bits: a width, or an array of them; 32 or more becomes 0.

    Raises:
      ArgumentError: no number.
      TrainingError: a concrete width that is no whole number of 0 or more; a start that is NaN, of
        which widths are NaN where it is traced.

    >>> bits = delayed_bits(500, 4)
    >>> float(bits(499)), float(bits(500))
    (0.0, 4.0)

    Source: Jacob et al., Quantization and training of neural networks for efficient
    integer-arithmetic-only inference, 2018, section 3.1 (activations are quantized with a delay).
    """
    where = "qj.training.delayed_bits"
    expect(start, NUMBERS, argument="start", where=where, fix="start=500")
    expect(bits, NUMBERS, argument="bits", where=where, fix="bits=4")
    width = jnp.asarray(bits, jnp.float32)
    _check_widths(width, where)
    first = jnp.asarray(start, jnp.float32)
    if first_wrong(first, lambda n: ~np.isnan(n)) is not None:
        raise errors.TrainingError("a start that is NaN", where=where, fix="start=500")

    def delayed(step: int | jax.Array) -> jax.Array:
        begun = jnp.asarray(step, jnp.float32) >= first
        bits = jnp.where(begun, _float_is_zero(width), 0.0)
        return jnp.where(jnp.isnan(first), jnp.nan, bits)

    return delayed


def error_decay(
    steps: int | float | Float[Array, ""],
    *,
    smallest: float | Float[Array, ""] = 0.1,
    largest: float | Float[Array, ""] = 10.0,
) -> Schedule:
    """The sharpness of IR-Net's surrogate: ``t = smallest · (largest/smallest)^(i/N)`` at step i.

    It grows geometrically and stays at ``largest`` after ``N`` steps. Give it to
    ``with_parameter(qstate, "sharpness", t(step))``.

    Args:
      steps: ``N``, positive.
      smallest, largest: positive. All may be traced.

    Raises:
      ArgumentError: no number.
      TrainingError: a concrete number that is not positive; one that is traced gives NaN.

    >>> t = error_decay(100)
    >>> [round(float(t(step)), 4) for step in (0, 50, 100, 200)]
    [0.1, 1.0, 10.0, 10.0]

    Source: Qin et al., Forward and backward information retention for accurate binary neural
    networks (IR-Net), 2020, section 3.
    """
    for name, number in (("steps", steps), ("smallest", smallest), ("largest", largest)):
        where = "qj.training.error_decay"
        expect(number, NUMBERS, argument=name, where=where, fix=f"{name}=10.0")
        wrong = first_wrong(number, lambda n: (n > 0) & np.isfinite(n))
        if wrong is not None:
            raise errors.TrainingError(
                f"{name} = {wrong:g}",
                where=where,
                why="the sharpness grows geometrically over the steps",
                fix="error_decay(10_000, smallest=0.1, largest=10.0)",
            )

    def sharpness(step: int | jax.Array) -> jax.Array:
        first, last, count = (
            jnp.where((n > 0.0) & jnp.isfinite(n), n, jnp.nan)
            for n in (jnp.asarray(n, jnp.float32) for n in (smallest, largest, steps))
        )
        done = jnp.clip(jnp.asarray(step, jnp.float32) / count, 0.0, 1.0)
        return first * jnp.exp(done * jnp.log(last / first))

    return sharpness


def _float_is_zero(bits: jax.Array) -> jax.Array:
    return jnp.where(bits >= float(FLOAT_BITS), 0.0, bits)


def _check_widths(widths: jax.Array, where: str) -> None:
    wrong = first_wrong(widths, lambda n: (n >= 0.0) & (n == np.floor(n)))
    if wrong is not None:
        raise errors.TrainingError(
            f"a width of {wrong:g} bits",
            where=where,
            why="widths are whole numbers; 0, or 32 and more, is float",
            fix="widths such as 32, 8, 4",
        )
