"""Which numbers a code can stand for: one family a file."""

from quantjax.formats.base import Format
from quantjax.formats.integer import IntegerFormat, integer

__all__ = ["Format", "IntegerFormat", "integer"]
