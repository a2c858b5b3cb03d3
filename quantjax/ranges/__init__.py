"""Range rules, statistics in, range out, and fit rules, tensor in, QParams out; one rule a file.

Python keeps no text for a value: ``help(qj.ranges.SAWB)`` shows what all rules have. What is said
of each one, with its source, stands below it in its file, beside this one.

| value | range or fit | file |
|---|---|---|
| ``MIN_MAX`` | the smallest and the largest value that were seen | min_max.py |
| ``MOVING_AVERAGE`` | a moving average of those of each batch | moving_average.py |
| ``percentile(q)`` | quantiles | percentile.py |
| ``sigma(k)`` | ``k`` standard deviations around the mean | sigma.py |
| ``constant(low, high)`` | a range that is given | constant.py |
| ``MSE``, ``l_p(p)`` | the least error in a norm, by search | norms.py |
| ``SQNR``, ``sqnr(c)`` | squares, clipped ones counted 3 or c times | similarity.py |
| ``COSINE`` | the largest cosine, by search | similarity.py |
| ``ACIQ_GAUSSIAN``, ``ACIQ_LAPLACIAN`` | the best clip of that distribution | aciq.py |
| ``KL_TENSORRT``, ``KL_MODELOPT`` | the least divergence of histograms | kl_tensorrt.py |
| ``KL_ONNXRUNTIME`` | the same, by another toolkit | kl_onnxruntime.py |
| ``LSQ`` | where LSQ starts: ``2 E|x| / √q_max`` | lsq.py |
| ``SAWB`` | ``c1 √E[w²] + c2 E|w|``, coefficients by width | sawb.py |
| ``XNOR`` | fit: the mean magnitude, for one bit | xnor.py |
| ``TWN``, ``TTQ`` | fits: thresholds and levels of ternary codes | ternary.py |
| ``K_MEANS`` | fit: a codebook | k_means.py |
| ``LEAST_SQUARES`` | fit: codes and scale in turn | least_squares.py |
| ``ADMM`` | fit: the same by ADMM | admm.py |
| ``HQO_SCALE``, ``HQO_ZERO_POINT`` | fits: half-quadratic optimization, ``p = 0.7`` | hqo.py |

Rules with settings are made by ``kl_tensorrt``, ``kl_onnxruntime``, ``admm``, ``hqo``, ``k_means``,
``least_squares`` and ``ttq``; several under one traced index by ``stack``.
"""

from quantjax.ranges.aciq import ACIQ_GAUSSIAN, ACIQ_LAPLACIAN
from quantjax.ranges.admm import ADMM, admm
from quantjax.ranges.base import FitRule, Range, RangeRule, Target
from quantjax.ranges.constant import constant
from quantjax.ranges.derive import derive, derive_many
from quantjax.ranges.fits import apply_fit, check_symmetry, holding_negatives
from quantjax.ranges.hqo import HQO_SCALE, HQO_ZERO_POINT, Solved, hqo
from quantjax.ranges.k_means import K_MEANS, k_means
from quantjax.ranges.kl_onnxruntime import KL_ONNXRUNTIME, kl_onnxruntime
from quantjax.ranges.kl_tensorrt import KL_MODELOPT, KL_TENSORRT, Variant, kl_tensorrt
from quantjax.ranges.least_squares import LEAST_SQUARES, least_squares
from quantjax.ranges.lsq import LSQ
from quantjax.ranges.min_max import MIN_MAX
from quantjax.ranges.moving_average import MOVING_AVERAGE
from quantjax.ranges.norms import MSE, l_p
from quantjax.ranges.percentile import percentile
from quantjax.ranges.sawb import SAWB
from quantjax.ranges.sigma import sigma
from quantjax.ranges.similarity import COSINE, SQNR, sqnr
from quantjax.ranges.stack import IndexedRule, RuleStack, checked_rule, several, stack
from quantjax.ranges.ternary import TTQ, TWN, ttq
from quantjax.ranges.xnor import XNOR

__all__ = [
    "ACIQ_GAUSSIAN",
    "ACIQ_LAPLACIAN",
    "ADMM",
    "COSINE",
    "HQO_SCALE",
    "HQO_ZERO_POINT",
    "KL_MODELOPT",
    "KL_ONNXRUNTIME",
    "KL_TENSORRT",
    "K_MEANS",
    "LEAST_SQUARES",
    "LSQ",
    "MIN_MAX",
    "MOVING_AVERAGE",
    "MSE",
    "SAWB",
    "SQNR",
    "TTQ",
    "TWN",
    "XNOR",
    "FitRule",
    "IndexedRule",
    "Range",
    "RangeRule",
    "RuleStack",
    "Solved",
    "Target",
    "Variant",
    "admm",
    "apply_fit",
    "check_symmetry",
    "checked_rule",
    "constant",
    "derive",
    "derive_many",
    "holding_negatives",
    "hqo",
    "k_means",
    "kl_onnxruntime",
    "kl_tensorrt",
    "l_p",
    "least_squares",
    "percentile",
    "several",
    "sigma",
    "sqnr",
    "stack",
    "ttq",
]
