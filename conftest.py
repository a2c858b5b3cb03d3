"""Settings of every test and doctest; at the root, because the doctests of quantjax/ need them too.

The persistent compilation cache needs nothing here: JAX reads JAX_COMPILATION_CACHE_DIR and its
companions, which scripts/test sets.
"""

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
ENOUGH_MAPS = 20_000  # Linux stops a process at 65,530, and each compiled program has some


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go() -> Iterator[None]:
    """A worker goes through many files; compiled programs stay mapped until they are cleared."""
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > ENOUGH_MAPS:
        jax.clear_caches()
