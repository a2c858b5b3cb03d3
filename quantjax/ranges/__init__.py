"""Range rules, statistics in, range out, and fit rules, tensor in, QParams out; one rule a file."""

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
