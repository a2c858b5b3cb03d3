"""Numbers of schedules and bounds that mean nothing: errors where known, NaN where traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import errors, training
from quantjax.affine import QParams
from tests.models import dense, planned, ready

NAN = float("nan")
ONE = QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(4.0), {"alpha": jnp.float32(0.25)})
PUSHED = ONE._replace(scale=jnp.float32(-3.0), theta={"alpha": jnp.float32(-3.0)})


def positive(fraction):
    tx = training.keep_positive(fraction)
    return tx.update(PUSHED, tx.init(ONE), ONE)[0].scale


def between(bounds):
    tx = training.keep_between(bounds[0], bounds[1], names=("alpha",))
    return tx.update(PUSHED, tx.init(ONE), ONE)[0].theta["alpha"]


CASES = {
    "fraction": (positive, [0.5], [NAN, 0.0, -1.0, 1.5]),
    "bounds": (between, [(0.02, 0.5), (-np.inf, 0.5)], [(NAN, 0.5), (0.5, NAN), (0.5, 0.02)]),
    "steps": (lambda n: training.error_decay(n)(10), [100.0], [0.0, -5.0, NAN, np.inf]),
    "smallest": (lambda t: training.error_decay(100, smallest=t)(10), [0.1], [-0.1, 0.0, NAN]),
    "largest": (lambda t: training.error_decay(100, largest=t)(10), [10.0], [-10.0, NAN]),
    "start": (lambda n: training.delayed_bits(n, 4)(10), [5.0, 50.0, np.inf], [NAN]),
    "boundaries": (
        lambda b: training.progressive_bits(b, [8, 4, 2])(10),
        [(5.0, 20.0), (5.0, 5.0)],
        [(20.0, 5.0), (NAN, 5.0), (5.0, NAN)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_traced_number_that_means_nothing_is_nan(name):
    f, good, bad = CASES[name]
    found = jax.jit(jax.vmap(f))(jnp.asarray([*good, *bad], jnp.float32))
    for number, got in zip(good, found, strict=False):
        np.testing.assert_allclose(got, f(np.float32(number)), rtol=1e-6)
    assert np.isnan(found[len(good) :]).all(), found


@pytest.mark.parametrize("name", CASES)
def test_one_that_is_known_is_refused(name):
    f, _, bad = CASES[name]
    for number in bad:
        with pytest.raises(errors.TrainingError, match="try"):
            f(np.asarray(number) if isinstance(number, tuple) else number)


@pytest.mark.parametrize(
    "call",
    [
        lambda: training.keep_positive("a"),
        lambda: training.keep_positive(True),
        lambda: training.keep_between("a", 1.0, names=("alpha",)),
        lambda: training.error_decay("a"),
        lambda: training.delayed_bits("a", 4),
        lambda: training.delayed_bits(5, "four"),
        lambda: training.progressive_bits("a", [8, 4]),
        lambda: training.progressive_bits([1], "ab"),
    ],
)
def test_what_is_no_number_is_refused_by_name(call):
    with pytest.raises(errors.ArgumentError, match=r" is .*needed"):
        call()


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: training.error_decay(jnp.array([100.0, -3.0])), "steps = -3"),
        (lambda: training.keep_positive(jnp.array([0.5, 2.0])), "a fraction of 2"),
        (
            lambda: training.keep_between(jnp.zeros(2), jnp.array([1.0, -7.0]), names=("alpha",)),
            "bounds from 0 to -7",
        ),
    ],
)
def test_of_several_the_wrong_one_is_named(call, wrong):
    with pytest.raises(errors.TrainingError, match=wrong):
        call()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"threshold": NAN}, "a threshold that is NaN"),
        ({"threshold": 0.1, "momentum": jnp.array([0.1, 2.0])}, "a momentum of 2"),
        ({"threshold": 0.1, "momentum": NAN}, "a momentum of nan"),
    ],
)
def test_numbers_of_oscillation(options, wrong):
    case = dense()
    plan = planned(case, qj.uniform_policy(weight_granularity=qj.PerChannel()))
    with pytest.raises(errors.TrainingError, match=wrong):
        training.freeze_oscillations(plan, **options)


def test_traced_numbers_of_oscillation_make_updates_nan():
    case = dense()
    plan, _, qstate = ready(case, qj.uniform_policy(weight_granularity=qj.PerChannel()))
    still = jax.tree.map(jnp.zeros_like, case.params)

    def update(numbers):
        tx = training.freeze_oscillations(plan, numbers[0], momentum=numbers[1])
        return tx.update(still, tx.init(case.params), case.params, qstate=qstate)[0]

    pairs = [(0.1, 0.01), (0.1, 1.0), (NAN, 0.01), (0.1, NAN), (0.1, 0.0), (0.1, 2.0)]
    (found,) = jax.tree.leaves(jax.jit(jax.vmap(update))(jnp.asarray(pairs)))
    is_nan = np.isnan(found).reshape(len(pairs), -1)
    assert not is_nan[:2].any()
    assert is_nan[2:].all()
