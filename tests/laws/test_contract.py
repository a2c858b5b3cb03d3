"""Every format of the library keeps what it declares, in any granularity, rounding and dtype."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from quantjax.contract import Trial, check_format, counterexamples
from quantjax.formats import ALL_LAWS, BUILT_IN, example_theta
from quantjax.rounding import ROUNDINGS
from tests.laws.contract_cases import DTYPES, GRANULARITIES, Row, pairwise, some_widths

pytestmark = pytest.mark.thinned(9)


def label(format):
    return format.label(format.max_bits)


@pytest.mark.parametrize("format", BUILT_IN, ids=label)
def test_declared_laws_hold_and_all_others_have_a_counterexample(format):
    theta = example_theta(format)
    assert check_format(format, theta=theta, trials=[Trial(theta=theta)]) == format.laws


def broken_laws(row: Row, *, exact: bool, bits: int) -> dict:
    broken = counterexamples(row.format, bits, row.trial(exact=exact))
    return {law: text for law, text in broken.items() if law in row.format.laws}


@pytest.mark.parametrize("row", pairwise(), ids=lambda row: row.name)
def test_declared_laws_hold_pairwise(row):
    # One kind of scale a row, so that each needs one program.
    exact = bool(len(row.name) % 2)
    for bits in some_widths(row.format):
        assert not broken_laws(row, exact=exact, bits=bits)


@pytest.fixture(scope="module", params=BUILT_IN, ids=label)
def one_format(request):
    """One after another; the programs of all of them are more than a process may map."""
    yield request.param
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda granularity: granularity.name)
def test_declared_laws_hold_in_full(one_format, granularity, rounding, dtype):
    row = Row(one_format, granularity, rounding, dtype)
    for exact in (True, False):
        for bits in some_widths(one_format):
            assert not broken_laws(row, exact=exact, bits=bits)


def test_any_two_meet():
    rows = pairwise()
    columns = (BUILT_IN, GRANULARITIES, ROUNDINGS, DTYPES)
    for (i, first), (j, second) in itertools.combinations(enumerate(columns), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(first, second))
    # Both kinds of scale meet every rounding.
    assert len({(len(row.name) % 2, row.rounding) for row in rows}) == 2 * len(ROUNDINGS)


def test_what_can_be_asked_of_a_trial():
    lost = {
        rounding.name: {law.name for law in ALL_LAWS - Trial(rounding).laws}
        for rounding in ROUNDINGS
    }
    directed = {"NEAREST", "ODD"}
    assert lost == {
        "half_even": set(),
        "half_away": set(),
        "floor": directed,
        "ceil": directed,
        "stochastic": directed | {"MONOTONE"},
    }
    floor = Trial(ROUNDINGS[2], dtype=jnp.bfloat16)
    assert {law.name for law in ALL_LAWS - floor.laws} == directed | {"IDEMPOTENT"}
