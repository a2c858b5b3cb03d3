"""One layer of a library, what it is given, and which sites it has to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import quantjax as qj
from quantjax.interpreter import SiteStatus


class Layer(NamedTuple):
    """A function of ``(params, *inputs)`` with arguments for it.

    Attributes:
      f, params, inputs: returns one array.
      sites: a line each, in the program's order; see :func:`said`.
    """

    f: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    sites: tuple[str, ...]


Build = Callable[[], Layer]
Row = Mapping[str, Build] | str
"""The builders of a class, by variant; or why it owns no kernel."""

DOT = "dot_general activation weight"
DOT_LEFT = "dot_general weight activation"
CONV = "conv_general_dilated activation weight"
LOOKUP = "gather weight"
NO_WEIGHT = "dot_general activation activation"


OPAQUE = " opaque"


def said(site: qj.Site) -> str:
    """``kernel: dot_general activation weight``; without parameters no name, which is a scope."""
    words = " ".join([site.op.value, *(operand.role.value for operand in site.operands)])
    words += "" if site.status is SiteStatus.REWRITABLE else OPAQUE
    return f"{site.name}: {words}" if site.weight is not None and site.weight.paths else words


def variants(rows: Mapping[str, Row]) -> dict[str, Build]:
    """All builders of a table: ``Conv/strided``."""
    return {
        f"{name}/{variant}": build
        for name, row in rows.items()
        if not isinstance(row, str)
        for variant, build in row.items()
    }


def named(kind: str, text: str, pattern: str = "{}") -> tuple[str, ...]:
    """Lines of one kind: each word of the text, put into the pattern."""
    return tuple(f"{pattern.format(word)}: {kind}" for word in text.split())
