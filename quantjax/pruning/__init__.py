"""Masks that set weights to zero: what ranks them, which go together, and how many."""

from quantjax.pruning.criteria import Criterion, magnitude, random, scored
from quantjax.pruning.masks import MaskGradient, apply_mask, prune_mask, sparsity_of
from quantjax.pruning.structures import ELEMENTS, NOfM, Scope, Structure

__all__ = [
    "ELEMENTS",
    "Criterion",
    "MaskGradient",
    "NOfM",
    "Scope",
    "Structure",
    "apply_mask",
    "magnitude",
    "prune_mask",
    "random",
    "scored",
    "sparsity_of",
]
