"""Statistics-aware weight binning: the scale follows the weights."""

from __future__ import annotations

from quantjax.estimators.base import Estimator
from quantjax.estimators.straight_through import ones

SAWB = Estimator("sawb", ones)
"""Straight through, with a range that is found anew from the weights in every forward pass.

``α = c1 · sqrt(E[w²]) - c2 · E[|w|]``, with coefficients for each width, is the range rule
``qj.ranges.SAWB``: the quantizer is ``weight_quantizer(estimator=SAWB, rule=qj.ranges.SAWB,
range=qj.RangeMode.LIVE, granularity=qj.PerTensor(), format=qj.formats.midrise())``. The
coefficients are for ``2^b`` levels from ``-α`` to ``α``, none of them 0; integers of two bits clip
positive weights at ``α/2``. ``∂y/∂w = 1``, beyond the range too; no gradient flows through ``α``.

Source: Choi et al., Accurate and efficient 2-bit quantized neural networks, 2019, section 4.
"""
