"""Losses that compare a student with a teacher."""

from quantjax.distillation.logits import kd_loss

__all__ = ["kd_loss"]
