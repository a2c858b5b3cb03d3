"""``qj.kd_loss`` against a float64 model, its limits, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import quantjax as qj
from quantjax import errors
from tests.oracles import distillation as oracle
from tests.refused import refused

pytestmark = pytest.mark.thinned(2)


def drawn(seed: int, *shape: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of student and teacher, and labels."""
    generator = np.random.default_rng(seed)
    student, teacher = np.float32(scale * generator.normal(size=(2, *shape)))
    return student, teacher, generator.integers(0, shape[-1], shape[:-1])


temperatures = st.floats(0.25, 64.0)
alphas = st.floats(0.0, 1.0)
run = jax.jit(
    lambda s, t, y, temperature, alpha: qj.kd_loss(s, t, y, temperature=temperature, alpha=alpha)
)
slope = jax.jit(jax.grad(lambda *a: run(*a)))


@given(seed=st.integers(0, 999), temperature=temperatures, alpha=alphas)
def test_it_is_the_float64_model(seed, temperature, alpha):
    student, teacher, labels = drawn(seed, 6, 10)
    got = run(student, teacher, labels, temperature, alpha)
    want = oracle.kd_loss(student, teacher, labels, temperature, alpha)
    assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@given(seed=st.integers(0, 999), temperature=temperatures, alpha=alphas)
def test_its_gradient_is_that_of_the_float64_model(seed, temperature, alpha):
    student, teacher, labels = drawn(seed, 6, 10)
    got = slope(student, teacher, labels, temperature, alpha)
    want = oracle.gradient(student, teacher, labels, temperature, alpha)
    assert_allclose(got, want, rtol=1e-4, atol=2e-6 * max(temperature, 1.0))


@given(seed=st.integers(0, 999), temperature=temperatures)
def test_it_is_never_negative_and_zero_for_the_teacher_itself(seed, temperature):
    student, teacher, _ = drawn(seed, 6, 10)
    alone = jax.jit(lambda s, t, temperature: qj.kd_loss(s, t, temperature=temperature, alpha=1.0))
    assert alone(student, teacher, temperature) >= 0.0
    assert alone(teacher, teacher, temperature) == 0.0
    near = teacher + np.float32(1e-4) * student
    want = oracle.kd_loss(near, teacher, None, temperature, 1.0)
    assert_allclose(alone(near, teacher, temperature), want, rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e2, 1e4, 1e6])
def test_hot_it_matches_logits(temperature):
    """``T² KL → Σ (difference of centred logits)² / (2 classes)``, with all of its digits."""
    student, teacher, _ = drawn(1, 8, 10)
    gap = np.float64(student) - np.float64(teacher)
    want = ((gap - gap.mean(-1, keepdims=True)) ** 2).sum(-1).mean() / (2 * 10)
    got = qj.kd_loss(student, teacher, temperature=temperature, alpha=1.0)
    assert_allclose(got, want, rtol=max(3.0 / temperature, 2e-5))
    grad = jax.grad(lambda s: qj.kd_loss(s, teacher, temperature=temperature, alpha=1.0))(student)
    centred = (gap - gap.mean(-1, keepdims=True)) / (10 * 8)
    assert_allclose(grad, centred, rtol=max(30.0 / temperature, 1e-3), atol=1e-4)


def test_without_a_share_of_the_teacher_it_is_cross_entropy():
    student, teacher, labels = drawn(2, 5, 7)
    got = qj.kd_loss(student, teacher, jnp.asarray(labels), alpha=0.0)
    own = oracle.log_softmax(student)[np.arange(5), labels]
    assert_allclose(got, -own.mean(), rtol=1e-6)
    grad = jax.grad(lambda t: qj.kd_loss(student, t, jnp.asarray(labels)))(teacher)
    assert_array_equal(grad, np.zeros_like(grad))


def test_logits_may_be_shifted_and_classes_permuted():
    student, teacher, labels = drawn(3, 4, 6)
    want = run(student, teacher, labels, 3.0, 0.7)
    assert_allclose(run(student + 5.0, teacher - 7.0, labels, 3.0, 0.7), want, rtol=1e-5)
    order = np.random.default_rng(0).permutation(6)
    places = np.argsort(order)[labels]
    assert_allclose(run(student[:, order], teacher[:, order], places, 3.0, 0.7), want, rtol=1e-5)


def test_temperature_and_alpha_are_axes_of_a_sweep():
    student, teacher, labels = drawn(4, 4, 6)
    ts, alphas = jnp.array([1.0, 4.0, 9.0]), jnp.array([0.0, 0.5, 1.0])
    many = jax.jit(jax.vmap(run, (None, None, None, 0, 0)))(student, teacher, labels, ts, alphas)
    each = [run(student, teacher, labels, t, a) for t, a in zip(ts, alphas, strict=True)]
    assert_allclose(many, each, rtol=1e-6)
    assert np.isnan(run(student, teacher, labels, 0.0, 0.5))
    assert np.isnan(run(student, teacher, labels, 2.0, 1.5))


def test_padding_does_not_count():
    student, teacher, labels = drawn(5, 3, 4, 6)
    mask = np.arange(4) < np.array([[4], [2], [0]])
    labels[~mask], student[~mask] = -1, np.nan
    loss = lambda s: qj.kd_loss(s, teacher, jnp.where(mask, labels, 0), where=mask)  # noqa: E731
    want = oracle.kd_loss(student[mask], teacher[mask], labels[mask], 4.0, 0.9)
    assert_allclose(loss(student), want, rtol=1e-5)
    assert qj.kd_loss(teacher, teacher, where=np.zeros((3, 4), bool)) == 0.0
    finite = np.where(mask[..., None], student, 0.0)
    assert_array_equal(jax.grad(loss)(jnp.asarray(finite))[~mask], 0.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_taken_to_float32(dtype):
    student, teacher, labels = (jnp.asarray(a) for a in drawn(6, 4, 6))
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    got = qj.kd_loss(student, teacher, labels)
    assert got.dtype == jnp.float32
    wide = (a.astype(jnp.float32) for a in (student, teacher))
    assert_array_equal(got, qj.kd_loss(*wide, labels))
    assert jax.grad(qj.kd_loss)(student, teacher, labels).dtype == dtype


def test_logits_far_apart_and_masked_classes():
    student, teacher = jnp.array([[0.0, 200.0, -200.0]]), jnp.array([[200.0, 0.0, -jnp.inf]])
    got = qj.kd_loss(student, teacher, temperature=1.0, alpha=1.0)
    assert_allclose(got, 200.0, rtol=1e-6)
    grad = jax.grad(lambda s: qj.kd_loss(s, teacher, temperature=1.0, alpha=1.0))(student)
    assert_allclose(grad, [[-1.0, 1.0, 0.0]], atol=1e-6)
    both = jnp.array([[1.0, 2.0, -jnp.inf]])
    assert qj.kd_loss(both, both) == 0.0
    assert qj.kd_loss(both, jnp.zeros((1, 3))) == jnp.inf


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "problem"),
    [
        (((4, 3), (4, 2)), {}, errors.DataError, "logits of 4x3 and of 4x2"),
        (((4, 3), (4, 3)), {"labels": np.zeros(3, int)}, errors.DataError, "labels of int"),
        (((4, 3), (4, 3)), {"labels": np.zeros(4)}, errors.DataError, "labels of float"),
        (((4, 3), (4, 3)), {"labels": np.full(4, 3)}, errors.DataError, "a label of 3"),
        (((4, 3), (4, 3)), {"where": np.ones(3, bool)}, errors.DataError, "a mask of 3"),
        (((4, 3), (4, 3)), {"temperature": 0.0}, errors.DistillationError, "temperature of 0"),
        (((4, 3), (4, 3)), {"temperature": 1e-19}, errors.DistillationError, "its square"),
        (((4, 3), (4, 3)), {"temperature": np.inf}, errors.DistillationError, "temperature of inf"),
        (((4, 3), (4, 3)), {"alpha": 1.1}, errors.DistillationError, "alpha = 1.1"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, options, kind, problem):
    with refused(kind, problem, "kd_loss"):
        qj.kd_loss(*map(jnp.zeros, arguments), **options)


@pytest.mark.parametrize("name", ["temperature", "alpha"])
def test_an_array_of_temperatures_or_shares_names_vmap(name):
    logits = jnp.zeros((4, 3))
    with refused(errors.DistillationError, f"a {name} of shape (3,)", "jax.vmap"):
        qj.kd_loss(logits, logits, **{name: jnp.ones(3)})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_a_mask_of_numbers_is_refused(dtype):
    """A mask of twos would count its examples twice above the line, and once below."""
    logits = jnp.zeros((4, 3))
    with refused(errors.DataError, f"a mask of 4, {jnp.dtype(dtype)}", "a boolean"):
        qj.kd_loss(logits, logits, where=jnp.ones(4, dtype))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_does_not_count_does_not_reach_the_gradient(odd):
    student, teacher, labels = drawn(3, 4, 5)
    where = jnp.array([True, False, True, True])
    labels = np.where(np.asarray(where), labels, -100)

    def loss(weight, x):
        return qj.kd_loss(x @ weight, teacher, labels, where=where)

    x, weight = jnp.asarray(student).at[1].set(odd), jnp.eye(5)
    value, gradient = jax.value_and_grad(lambda s: qj.kd_loss(s, teacher, labels, where=where))(x)
    clean = student.copy()
    clean[1] = 0.0
    want, slope = jax.value_and_grad(lambda s: qj.kd_loss(s, teacher, labels, where=where))(clean)
    assert float(value) == float(want)
    assert_array_equal(gradient, slope)
    assert_array_equal(gradient[1], jnp.zeros(5))
    # Through what made the logits, an odd input still counts: 0 · NaN of the user's own product.
    assert np.isfinite(jax.grad(loss)(weight, jnp.asarray(clean))).all()


def test_labels_of_padding_may_be_anything():
    student, teacher, labels = drawn(4, 3, 5)
    where = jnp.array([True, True, False])
    padded = np.array([labels[0], labels[1], -100])
    got = qj.kd_loss(student, teacher, padded, where=where)
    assert_allclose(got, qj.kd_loss(student[:2], teacher[:2], labels[:2]), rtol=1e-6)
    with refused(errors.DataError, "a label of -100"):
        qj.kd_loss(student, teacher, padded, where=~where | where)
    with refused(errors.DataError, "a label of -100"):
        qj.kd_loss(student, teacher, padded)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
@pytest.mark.parametrize("classes", [128, 256])
def test_labels_of_any_integers_are_taken(dtype, classes):
    """A byte vocabulary: 256 is no number of 8 bits."""
    student, teacher, _ = drawn(5, 3, classes)
    labels = jnp.array([3, 127, 0])
    narrow = labels.astype(dtype)
    for run in (lambda f: f, jax.jit):
        got, want = (run(qj.kd_loss)(student, teacher, each) for each in (narrow, labels))
        assert np.isfinite(want)
        assert_array_equal(got, want)


@pytest.mark.parametrize("temperature", [1e12, 1e19, 1e25, 1e30])
def test_however_hot_it_matches_logits(temperature):
    student, teacher, _ = drawn(1, 8, 10)
    gap = np.float64(student) - np.float64(teacher)
    want = ((gap - gap.mean(-1, keepdims=True)) ** 2).sum(-1).mean() / (2 * 10)
    loss = lambda s, t: qj.kd_loss(s, teacher, temperature=t, alpha=1.0)  # noqa: E731
    value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, temperature)
    assert_allclose(value, want, rtol=1e-4)
    assert np.isfinite(slopes[0]).all()
    assert np.isfinite(slopes[1])


def test_a_share_of_zero_leaves_nothing_of_an_infinite_term():
    student = jnp.array([[0.0, -jnp.inf, 1.0]])
    teacher, labels = jnp.array([[1.0, 2.0, 0.0]]), jnp.array([2])
    alone = qj.kd_loss(student, teacher, labels, alpha=0.0)
    assert_allclose(alone, -jax.nn.log_softmax(student)[0, 2], rtol=1e-6)
    finite = jnp.array([[0.0, 0.5, 1.0]])
    label = jnp.array([1])
    with_infinite_label = qj.kd_loss(student, student, label, alpha=1.0)
    assert float(with_infinite_label) == 0.0
    assert np.isinf(float(qj.kd_loss(student, teacher, labels, alpha=0.5)))
    assert np.isfinite(float(qj.kd_loss(finite, teacher, labels, alpha=0.5)))


def test_classes_that_neither_has_take_part_in_no_derivative():
    student = jnp.array([[0.0, -jnp.inf, 1.0, 0.5]])
    teacher = jnp.array([[1.0, -jnp.inf, 0.0, 0.2]])
    loss = lambda s, t: qj.kd_loss(s, teacher, temperature=t, alpha=1.0)  # noqa: E731
    rest = lambda s, t: qj.kd_loss(  # noqa: E731
        s, jnp.delete(teacher, 1, axis=1), temperature=t, alpha=1.0
    )
    for temperature in (0.1, 4.0, 1e6):
        value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(student, temperature)
        want, wanted = jax.value_and_grad(rest, argnums=(0, 1))(
            jnp.delete(student, 1, axis=1), temperature
        )
        assert_allclose(value, want, rtol=1e-5, atol=1e-7)
        assert_allclose(jnp.delete(slopes[0], 1, axis=1), wanted[0], rtol=1e-4, atol=1e-6)
        assert_allclose(slopes[1], wanted[1], rtol=1e-3, atol=1e-6)
        assert float(slopes[0][0, 1]) == 0.0


def test_an_empty_batch_is_a_float32_zero():
    with jax.enable_x64(True):
        empty = qj.kd_loss(jnp.zeros((0, 3), jnp.float32), jnp.zeros((0, 3), jnp.float32))
    assert empty.dtype == jnp.float32
    assert float(empty) == 0.0


@pytest.mark.parametrize("apart", [3.0, 0.01], ids=["far", "near"])
@pytest.mark.parametrize("temperature", [0.7, 4.0])
def test_second_derivatives_are_those_of_the_softmax(temperature, apart):
    """``diag(q) - q qᵀ`` of each example, over the number of examples."""
    student, teacher, _ = drawn(0, 3, 5)
    teacher = student + apart * teacher
    found = jax.hessian(lambda s: qj.kd_loss(s, teacher, temperature=temperature, alpha=1.0))(
        jnp.asarray(student)
    )
    q = np.asarray(jax.nn.softmax(student / temperature))
    for first in range(3):
        for second in range(3):
            own = np.diag(q[first]) - np.outer(q[first], q[first])
            want = own / 3 if first == second else np.zeros((5, 5))
            assert_allclose(found[first, :, second], want, atol=1e-6)


def test_a_gradient_keeps_few_arrays_of_the_size_of_logits():
    logits = jax.ShapeDtypeStruct((16, 8192), jnp.float32)
    program = jax.jit(jax.grad(qj.kd_loss)).lower(logits, logits).compile()
    assert program.memory_analysis().temp_size_in_bytes < 7 * 4 * logits.size
