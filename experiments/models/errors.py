"""What can go wrong with the networks of experiments."""

from __future__ import annotations

from quantjax.errors import QuantjaxError


class ModelShapeError(QuantjaxError, ValueError):
    """Sizes of a network that do not fit one another, or an input that does not fit the network.

    ``DecoderShape(width=64, heads=7, ...)`` fails: 7 heads do not divide 64 features. Use
    ``heads=8``.
    """
