"""quantjax: quantization experiments in JAX in which every number that a sweep varies is an array.

The public names, and nothing else. Start with ``qj.sites``, ``qj.plan``, ``qj.observe``,
``qj.calibrate``, ``qj.fake_quantize``; the README has five lines that use them.
"""

from quantjax import (
    affine,
    errors,
    estimators,
    folding,
    formats,
    presets,
    pruning,
    ranges,
    rounding,
    selectors,
    statistics,
    training,
)
from quantjax.affine import Fault, QParams
from quantjax.biases import AccumulatorBias, bias_quantizer
from quantjax.contract import Trial, check_format
from quantjax.data_free import dequantize_params, pack_params, quantize_params
from quantjax.distillation import kd_loss
from quantjax.estimators import Estimator
from quantjax.fake_quant import fake_quant
from quantjax.folding import batch_norms, fold_batch_norm
from quantjax.formats import FloatBits, Format, IntegerFormat, integer, minifloat
from quantjax.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Remainder,
)
from quantjax.interpreter import Op, Role, Site
from quantjax.planning import Plan, plan
from quantjax.policy import Policy, Rule, Scheme, rule, uniform_policy
from quantjax.pruning import apply_mask, prune_mask
from quantjax.qtensor import QTensor, encode
from quantjax.quantizer import (
    Quantizer,
    RangeMode,
    activation_quantizer,
    gradient_quantizer,
    weight_quantizer,
)
from quantjax.ranges import FitRule, RangeRule
from quantjax.relative_selectors import costliest, every_use, first, first_use, last
from quantjax.rounding import Rounding
from quantjax.selectors import (
    Selector,
    all_of,
    any_of,
    at_least,
    backward,
    everything,
    not_,
    op,
    path,
    role,
    scope,
    weighted,
)
from quantjax.statistics import Statistics
from quantjax.table import SiteTable
from quantjax.transforms.calibrate import calibrate
from quantjax.transforms.check import check
from quantjax.transforms.compare import Report, compare
from quantjax.transforms.execute import execute
from quantjax.transforms.fake_quantize import fake_quantize
from quantjax.transforms.freeze import freeze
from quantjax.transforms.observe import init, observe
from quantjax.transforms.shards import merge_states
from quantjax.transforms.sites import sites
from quantjax.transforms.tap import tap

__version__ = "0.1.0"

__all__ = [
    "Estimator",
    "Fault",
    "FitRule",
    "FloatBits",
    "Format",
    "Granularity",
    "IntegerFormat",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "Policy",
    "QParams",
    "QTensor",
    "Quantizer",
    "RangeMode",
    "RangeRule",
    "Remainder",
    "Report",
    "Rounding",
    "Rule",
    "Scheme",
    "Selector",
    "Site",
    "SiteTable",
    "Statistics",
    "Trial",
    "activation_quantizer",
    "affine",
    "apply_mask",
    "backward",
    "batch_norms",
    "calibrate",
    "check",
    "check_format",
    "compare",
    "dequantize_params",
    "encode",
    "errors",
    "estimators",
    "everything",
    "execute",
    "fake_quant",
    "fake_quantize",
    "fold_batch_norm",
    "folding",
    "formats",
    "freeze",
    "gradient_quantizer",
    "bias_quantizer",
    "AccumulatorBias",
    "init",
    "integer",
    "kd_loss",
    "merge_states",
    "minifloat",
    "observe",
    "pack_params",
    "path",
    "op",
    "role",
    "scope",
    "at_least",
    "first",
    "first_use",
    "every_use",
    "last",
    "costliest",
    "all_of",
    "any_of",
    "not_",
    "Op",
    "Role",
    "plan",
    "presets",
    "prune_mask",
    "pruning",
    "quantize_params",
    "ranges",
    "rounding",
    "rule",
    "selectors",
    "sites",
    "statistics",
    "tap",
    "training",
    "uniform_policy",
    "weight_quantizer",
    "weighted",
]
