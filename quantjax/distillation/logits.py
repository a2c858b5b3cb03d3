"""``qj.kd_loss``: distillation by softened logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.arguments import expect
from quantjax.meshes import automatic, spec_of
from quantjax.printing import shape_text

_SERIES = 0.1  # below it, the remainder of the exponential series beyond d^6 is under float32
_NOTHING = -1e30  # a logit without mass
_LARGEST = 1e18  # whose square is a number
_SMALLEST = 1e-18  # whose square is no zero


def kd_loss(
    student_logits: Float[Array, "... classes"],
    teacher_logits: Float[Array, "... classes"],
    labels: Int[Array, "..."] | None = None,
    *,
    temperature: float | Float[Array, ""] = 4.0,
    alpha: float | Float[Array, ""] = 0.9,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """``α T² KL(softmax(t/T) ‖ softmax(s/T)) + (1 - α) CE(s, labels)``, the mean over examples.

    The teacher is a constant: no gradient flows into its logits. ``T²`` keeps the gradient of the
    first term at one size for all temperatures; as ``T → ∞`` it becomes that of matching logits,
    ``Σ ((s - mean s) - (t - mean t))² / (2 classes)``, and its value stays exact on the way there.

    Args:
      student_logits, teacher_logits: of one shape, classes last; half precision is taken to
        float32.
      labels: class numbers, the shape without classes. Without them the second term is left out,
        and ``α`` stays a factor of the first.
      temperature: ``T``, 1e-18 or more; may be traced, so that it can be an axis of a sweep.
      alpha: ``α``, from 0 to 1; may be traced.
      where: True for examples that count (tokens that are no padding), the shape of ``labels``.

    Returns:
      A float32 scalar; 0 where no example counts.

    Raises:
      DataError: shapes that do not fit, labels that are no integers, or concrete ones outside of
        the classes, where they count.
      DistillationError: a concrete temperature that is smaller or not finite, an ``alpha``
        outside [0, 1]. Traced ones give NaN.

    Sharp edges: traced labels outside of the classes give NaN where they count. The value is exact
    up to ``T = 1e30``. A student at ``-inf`` where the teacher has mass makes the loss infinite.

    >>> student, teacher = jnp.array([[2.0, 0.0, -2.0]]), jnp.array([[1.0, 1.0, -2.0]])
    >>> round(float(kd_loss(student, teacher, jnp.array([0]), temperature=2.0)), 4)
    0.4056
    >>> float(kd_loss(teacher, teacher))
    0.0

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, section 2.
    """
    student, teacher = (jnp.asarray(logits) for logits in (student_logits, teacher_logits))
    where = None if where is None else jnp.asarray(where)
    _check_shapes(student, teacher, labels, where)
    _check_numbers(temperature, alpha)
    labels = None if labels is None else jnp.asarray(labels)
    t, a = (jnp.asarray(number, jnp.float32) for number in (temperature, alpha))
    return _loss(student, teacher, labels, where, t, a)


@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _loss(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None,
    where: jax.Array | None,
    t: jax.Array,
    a: jax.Array,
) -> jax.Array:
    student = student.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    if where is not None:  # ahead of all arithmetic, whose derivatives would make 0 · NaN of it
        counted = where[..., None]
        student, teacher = (jnp.where(counted, logits, 0.0) for logits in (student, teacher))
    t = jnp.where((t >= _SMALLEST) & jnp.isfinite(t), t, jnp.nan)
    a = jnp.where((a >= 0.0) & (a <= 1.0), a, jnp.nan)
    loss = _share(a, _divergence(teacher, student, t))
    if labels is not None:
        rows = lambda _: P(*spec_of(student)[:-1])  # noqa: E731
        entropy = automatic(_cross_entropy, student, labels, specs=rows)
        loss += _share(1.0 - a, entropy)
    if where is None:
        return jnp.mean(loss) if loss.size else jnp.zeros((), jnp.float32)
    counted = jnp.broadcast_to(where, loss.shape)
    total = jnp.sum(jnp.where(counted, loss, 0.0))
    return total / jnp.maximum(jnp.sum(counted.astype(jnp.float32)), 1.0)


def _share(share: jax.Array, loss: jax.Array) -> jax.Array:
    """A part of the loss; none of it where the share is 0, be it infinite."""
    return share * jnp.where((share == 0.0) & ~jnp.isfinite(loss), 0.0, loss)


def _kl(teacher: jax.Array, student: jax.Array, t: jax.Array) -> jax.Array:
    """``T² KL(softmax(teacher/T) ‖ softmax(student/T))`` along the last axis, exact near zero.

    ``Σ p (e^-d - 1 + d)`` with ``d = log p - log q``: the sum of terms that are not negative,
    because ``Σ p e^-d = Σ q = 1``. ``T²`` joins ``d²``, which would vanish.
    """
    teacher, student = _softened(teacher, student, t)
    p = jax.nn.softmax(teacher)
    gap = _log_ratio(teacher, student)
    near = jnp.abs(gap) < _SERIES
    small = jnp.where(near, gap, 0.0)
    scaled = small * t
    series = scaled * scaled * (0.5 - small * (1 / 6 - small * (1 / 24 - small * (1 / 120))))
    large = jnp.where(near | (p == 0.0), 0.0, gap)
    q = jax.nn.softmax(student)  # p e^-d, whose exponential may overflow where p vanishes
    far = jnp.where(near, 0.0, q - p + p * large)
    square = jnp.minimum(t, _LARGEST) ** 2  # beyond it nothing is far
    return jnp.sum(jnp.where(near, p * series, square * far), axis=-1)


_divergence = jax.custom_jvp(_kl)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """``T (q - p)`` by the student's logits: one array to keep, where what autodiff keeps are ten.

    The teacher's have none.
    """
    teacher, student, t = primals
    _, along, of_t = tangents
    out = _divergence(teacher, student, t)
    moved = jnp.zeros_like(out)
    if not isinstance(along, SymbolicZero):
        soft = _softened(teacher, student, t)
        p, q = (jax.nn.softmax(logits) for logits in soft)
        gap = _log_ratio(*soft)
        near = jnp.abs(gap) < _SERIES
        close = p * jnp.expm1(-jnp.where(near, gap, 0.0))
        moved += jnp.sum(t * jnp.where(near, close, q - p) * along, axis=-1)
    if not isinstance(of_t, SymbolicZero):
        by_t = functools.partial(_kl, teacher, student)
        moved += jax.jvp(by_t, (t,), (of_t,))[1]
    return out, moved


def _softened(teacher: jax.Array, student: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both over ``T``; a class that neither has is a number for both, so that its difference is."""
    neither = jnp.isneginf(teacher) & jnp.isneginf(student)

    def softened(logits: jax.Array) -> jax.Array:
        return jnp.where(neither, _NOTHING, jnp.where(neither, 0.0, logits) / t)

    return softened(teacher), softened(student)


def _log_ratio(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """``log softmax(teacher) - log softmax(student)``, without cancellation where both are close.

    The difference of the two normalizers is ``log Σ q e^u``, ``u = teacher - student``.
    """
    u = teacher - student
    close = jnp.max(jnp.abs(u), axis=-1, keepdims=True) < 1.0
    small = jnp.where(close, u, 0.0)
    shift = jnp.log1p(jnp.sum(jax.nn.softmax(student) * jnp.expm1(small), -1, keepdims=True))
    return jnp.where(
        close, small - shift, jax.nn.log_softmax(teacher) - jax.nn.log_softmax(student)
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    classes = logits.shape[-1]
    if labels.dtype.itemsize < 4:  # of which 256 may be none
        labels = labels.astype(jnp.int32)
    inside = (labels >= 0) & (labels < classes)
    index = jnp.where(inside, labels, 0)[..., None]
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1)[..., 0]
    return jnp.where(inside, -found, jnp.nan)


def _check_shapes(student: jax.Array, teacher: jax.Array, labels: Any, where: Any) -> None:
    if student.shape != teacher.shape or student.ndim == 0:
        raise errors.DataError(
            f"logits of {shape_text(student.shape)} and of {shape_text(teacher.shape)}",
            where="qj.kd_loss",
            why="student and teacher have a logit for each class and example",
            fix="logits of one shape, classes last",
        )
    examples = student.shape[:-1]
    if where is not None and (where.dtype != jnp.bool_ or where.shape != examples):
        raise errors.DataError(
            f"a mask of {shape_text(where.shape)}, {where.dtype}",
            where=f"qj.kd_loss with logits of {shape_text(student.shape)}",
            fix=f"a boolean for each example, of shape {examples}",
        )
    if labels is not None:
        given = jnp.asarray(labels)
        if given.shape != examples or not jnp.issubdtype(given.dtype, jnp.integer):
            raise errors.DataError(
                f"labels of {given.dtype}, {shape_text(given.shape)}",
                where=f"qj.kd_loss with logits of {shape_text(student.shape)}",
                fix=f"class numbers, integers of shape {examples}",
            )
        known, counted = concrete(given), np.True_ if where is None else concrete(where)
        if known is None or counted is None:
            return
        bad = ((known < 0) | (known >= student.shape[-1])) & counted
        if bad.any():
            raise errors.DataError(
                f"a label of {known[bad][0]}",
                where=f"qj.kd_loss with {student.shape[-1]} classes",
                fix="class numbers from 0; where= leaves out padding",
            )


def _check_numbers(temperature: Any, alpha: Any) -> None:
    for name, number, usual in (("temperature", temperature, 4.0), ("alpha", alpha, 0.9)):
        kinds = int, float, np.number, np.ndarray, jax.Array, list, tuple
        expect(number, kinds, argument=name, where="qj.kd_loss", fix=f"{name}={usual}")
        if jnp.ndim(number):
            raise errors.DistillationError(
                f"a {name} of shape {jnp.shape(number)}, where one number is needed",
                where="qj.kd_loss",
                fix=f"jax.vmap(lambda v: qj.kd_loss(student, teacher, {name}=v))({name}s)",
            )
    t, a = concrete(temperature), concrete(alpha)
    if t is not None and not (np.all(t >= _SMALLEST) and np.all(np.isfinite(t))):
        raise errors.DistillationError(
            f"a temperature of {float(t):g}",
            where="qj.kd_loss",
            why="logits are divided by it, and the loss is multiplied by its square",
            fix="temperature=4.0",
        )
    if a is not None and not np.all((a >= 0) & (a <= 1)):
        raise errors.DistillationError(
            f"alpha = {float(a):g}",
            where="qj.kd_loss",
            why="it is the teacher's share of the loss",
            fix="alpha=0.9",
        )
