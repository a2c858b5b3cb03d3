"""What quantization-aware training needs beside a model: optimizers of a qstate, schedules, losses.

All of them are pure functions and optax transformations over the user's own loop:

    scales = optax.chain(optax.sgd(1e-3), keep_positive())
    optimizer = by_part(weights=optax.sgd(0.01), scale=scales)
    state = optimizer.init((params, qstate))
    gradient = jax.grad(loss)((params, qstate), x, labels)  # of qj.fake_quantize(f, plan)
    updates, state = optimizer.update(gradient, state, (params, qstate))
    params, qstate = optax.apply_updates((params, qstate), updates)
"""

from quantjax.folding import Held, fold_batch_norm, folded_training, refolded, renamed
from quantjax.training.batch_norm import reestimate
from quantjax.training.bounds import keep_between, keep_positive
from quantjax.training.dampening import dampening_loss
from quantjax.training.oscillation import (
    Followed,
    OscillationState,
    freeze_oscillations,
    frozen_share,
)
from quantjax.training.parameters import with_parameter
from quantjax.training.parts import Part, by_part, parts_of
from quantjax.training.schedules import Schedule, delayed_bits, error_decay, progressive_bits
from quantjax.training.sizes import learned_bits, weight_bits_total
from quantjax.training.widths import with_bits

__all__ = [
    "Followed",
    "Held",
    "OscillationState",
    "Part",
    "Schedule",
    "by_part",
    "dampening_loss",
    "delayed_bits",
    "error_decay",
    "fold_batch_norm",
    "folded_training",
    "freeze_oscillations",
    "frozen_share",
    "keep_between",
    "keep_positive",
    "learned_bits",
    "parts_of",
    "progressive_bits",
    "reestimate",
    "refolded",
    "renamed",
    "weight_bits_total",
    "with_bits",
    "with_parameter",
]
