"""Policies, plans, QParams and frozen parameters on disk, with a schema and a version."""

from quantjax.storage.frozen import load_params, save_params
from quantjax.storage.readable import (
    Quantization,
    load_quantization,
    plan_from,
    save_quantization,
)

__all__ = [
    "Quantization",
    "load_params",
    "load_quantization",
    "plan_from",
    "save_params",
    "save_quantization",
]
