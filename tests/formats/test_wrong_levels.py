"""What ``check_format`` says of tables of levels that newcomers write."""

import dataclasses

import jax.numpy as jnp
import pytest

from quantjax import errors
from quantjax.contract import check_format
from quantjax.formats import LevelFormat
from tests.refused import refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descending(LevelFormat):
    """The highest level first."""

    max_bits: int = 2

    @property
    def name(self):
        return "wrong"

    def levels(self, bits, theta=()):
        one, two = jnp.float32([1.0, 0.0, 0.0, 0.0]), jnp.float32([3.0, 2.0, 1.0, 0.0])
        return jnp.where(bits == 1.0, one, two)


class Fixed(Descending):
    """The same levels at every width."""

    def levels(self, bits, theta=()):
        return jnp.float32([0.0, 1.0, 2.0, 3.0])


class Lost(Descending):
    """Levels that are no numbers."""

    def levels(self, bits, theta=()):
        return jnp.full(4, jnp.nan, jnp.float32)


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (Descending, ("the level 2 comes behind 3", "they have to ascend")),
        (Fixed, ("has ", "a width that has fewer codes has fewer of them")),
        (Lost, ("has ", "decodes to NaN")),
    ],
)
def test_it_says_what_is_wrong_with_them(format, words):
    with refused(errors.FormatError, *words):
        check_format(format())
