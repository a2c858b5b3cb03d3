"""Settings of every test and doctest; at the root, because the doctests of quantjax/ need them too.

The persistent compilation cache needs nothing here: JAX reads JAX_COMPILATION_CACHE_DIR and its
companions, which scripts/test sets.
"""

import collections
import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# No silent promotion: an operand of another dtype or rank is a mistake until it is spelled out.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, because a first call compiles; derandomized, so that a failure on CI fails here too.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
# Looks further, at new places each time: pytest --hypothesis-profile=search
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("ci")

MAPS = Path("/proc/self/maps")
LONG = Path(__file__).with_name("tests") / "long_tests.txt"
ENOUGH_MAPS = 20_000  # Linux stops a process at 65,530, and each compiled program has some


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go() -> Iterator[None]:
    """A worker goes through many files; compiled programs stay mapped until they are cleared."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > ENOUGH_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def own_programs() -> Iterator[None]:
    """For modules that pretend another backend, whose traces are not for others, or that count."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def pytest_collection_finish() -> None:
    """Leave alone what stays to the end, some million objects, and look through the rest seldom.

    Full collections of garbage were a tenth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--thin N``: only every N-th parameter set of each test, besides what is thinned already."""
    parser.addoption("--thin", type=int, default=1, help="keep every N-th parameter set")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """What scripts/long_tests.py found to take long, with nothing compiled yet."""
    test = item.nodeid.partition("[")[0]
    if {test, test.partition("::")[0]} & _long_ones():
        item.add_marker(pytest.mark.long)


@functools.cache
def _long_ones() -> frozenset[str]:
    return frozenset(LONG.read_text(encoding="utf-8").splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What ``thinned(n)`` and ``--thin`` leave out is slow.

    Every n-th parameter set stays, counted over the sets that a module's tests share, so that all
    tests of one set stay together. Of a product of two parameters each value stays with some of the
    others where the step shares no factor with the length of the one that runs faster; other steps
    lose some of its values, and lists of one parameter always do. A test of which nothing would
    stay keeps its first set.
    """
    places: dict[object, dict[str, int]] = collections.defaultdict(dict)
    tests: dict[object, list[tuple[pytest.Item, bool]]] = collections.defaultdict(list)
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None:
            continue
        marker = item.get_closest_marker("thinned")
        step = config.getoption("--thin") * (marker.args[0] if marker else 1)
        seen = places[item.path, frozenset(callspec.params)]
        is_kept = seen.setdefault(callspec.id, len(seen)) % step == 0
        tests[item.nodeid.partition("[")[0]].append((item, is_kept))
    for sets in tests.values():
        nothing_stays = not any(is_kept for _, is_kept in sets)
        for item, is_kept in sets[1:] if nothing_stays else sets:
            if not is_kept:
                item.add_marker(pytest.mark.slow)
