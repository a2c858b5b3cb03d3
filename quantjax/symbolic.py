"""Sizes that are letters: those of programs that are exported for any batch."""

from __future__ import annotations

from jax.errors import InconclusiveDimensionOperation


def at_most(size: int, most: int) -> bool | None:
    """``size <= most``, or None where that depends on a size that is not known.

    >>> at_most(3, 4)
    True
    >>> from jax import export
    >>> batch, tokens = export.symbolic_shape("b, t", constraints=["t <= 128"])
    >>> at_most(tokens, 128), at_most(batch, 128)
    (True, None)
    """
    try:
        return bool(size <= most)
    except InconclusiveDimensionOperation:
        return None
