"""The rules that a command line knows by name."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from quantjax.ranges import (
    ACIQ_GAUSSIAN,
    ACIQ_LAPLACIAN,
    ADMM,
    COSINE,
    HQO_SCALE,
    KL_MODELOPT,
    KL_ONNXRUNTIME,
    KL_TENSORRT,
    LEAST_SQUARES,
    LSQ,
    MIN_MAX,
    MOVING_AVERAGE,
    MSE,
    SAWB,
    SQNR,
    XNOR,
    FitRule,
    RangeRule,
    l_p,
    percentile,
    sigma,
)


class RuleName(enum.Enum):
    """Range rules: statistics to a range."""

    MIN_MAX = "min-max"
    MOVING_AVERAGE = "moving-average"
    PERCENTILE_999 = "percentile-0.999"
    PERCENTILE_9999 = "percentile-0.9999"
    SIGMA_3 = "sigma-3"
    MSE = "mse"
    L_2_4 = "l-2.4"
    SQNR = "sqnr"
    COSINE = "cosine"
    ACIQ_GAUSSIAN = "aciq-gaussian"
    ACIQ_LAPLACIAN = "aciq-laplacian"
    KL_TENSORRT = "kl-tensorrt"
    KL_MODELOPT = "kl-modelopt"
    KL_ONNXRUNTIME = "kl-onnxruntime"
    SAWB = "sawb"
    LSQ = "lsq"


RULES: Mapping[RuleName, RangeRule] = MappingProxyType(
    {
        RuleName.MIN_MAX: MIN_MAX,
        RuleName.MOVING_AVERAGE: MOVING_AVERAGE,
        RuleName.PERCENTILE_999: percentile(0.999),
        RuleName.PERCENTILE_9999: percentile(0.9999),
        RuleName.SIGMA_3: sigma(3.0),
        RuleName.MSE: MSE,
        RuleName.L_2_4: l_p(2.4),
        RuleName.SQNR: SQNR,
        RuleName.COSINE: COSINE,
        RuleName.ACIQ_GAUSSIAN: ACIQ_GAUSSIAN,
        RuleName.ACIQ_LAPLACIAN: ACIQ_LAPLACIAN,
        RuleName.KL_TENSORRT: KL_TENSORRT,
        RuleName.KL_MODELOPT: KL_MODELOPT,
        RuleName.KL_ONNXRUNTIME: KL_ONNXRUNTIME,
        RuleName.SAWB: SAWB,
        RuleName.LSQ: LSQ,
    }
)


class FitName(enum.Enum):
    """Fits to the tensor itself, for signed symmetric integers."""

    LEAST_SQUARES = "least-squares"
    ADMM = "admm"
    HQO_SCALE = "hqo-scale"
    XNOR = "xnor"


FITS: Mapping[FitName, FitRule] = MappingProxyType(
    {
        FitName.LEAST_SQUARES: LEAST_SQUARES,
        FitName.ADMM: ADMM,
        FitName.HQO_SCALE: HQO_SCALE,
        FitName.XNOR: XNOR,
    }
)
