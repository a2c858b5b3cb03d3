"""Batch norm folded into the kernel ahead of it: found by dataflow, in a tree, and in training."""

from quantjax.folding.find import batch_norms
from quantjax.folding.fold import fold_batch_norm
from quantjax.folding.norms import BatchNorm, BatchNorms, FoldStatus, Place
from quantjax.folding.rename import refolded, renamed
from quantjax.folding.train import Held, folded_training

__all__ = [
    "BatchNorm",
    "BatchNorms",
    "FoldStatus",
    "Held",
    "Place",
    "batch_norms",
    "fold_batch_norm",
    "folded_training",
    "refolded",
    "renamed",
]
