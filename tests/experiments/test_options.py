"""Counts that command lines ask for."""

import doctest
from types import SimpleNamespace

import pytest

from experiments import options


def test_doctests():
    assert doctest.testmod(options).failed == 0


@pytest.mark.parametrize("count", [0, -2])
def test_the_option_and_one_that_works_are_named(count):
    given = SimpleNamespace(test_images=count, steps=1)
    with pytest.raises(options.OptionError, match=f"test_images is {count}") as caught:
        options.check_counts(given, "steps", "test_images")
    assert caught.value.fix == "--test-images 600"
    options.check_counts(given, "steps")
