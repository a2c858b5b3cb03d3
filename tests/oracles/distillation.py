"""Distillation by softened logits, in float64 and from the paper's equations."""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    logits = np.float64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kd_loss(student, teacher, labels, temperature: float, alpha: float) -> float:
    """``α T² Σ p log(p/q) + (1 - α) CE``, mean over examples."""
    student, teacher = np.float64(student), np.float64(teacher)
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    loss = alpha * temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    if labels is not None:
        own = np.take_along_axis(log_softmax(student), np.asarray(labels)[..., None], -1)[..., 0]
        loss = loss - (1 - alpha) * own
    return float(loss.mean())


def gradient(student, teacher, labels, temperature: float, alpha: float) -> np.ndarray:
    """With respect to the student's logits: ``α T (q - p) + (1 - α) (softmax - one hot)``."""
    student, teacher = np.float64(student), np.float64(teacher)
    q, p = (np.exp(log_softmax(x / temperature)) for x in (student, teacher))
    found = alpha * temperature * (q - p)
    if labels is not None:
        one_hot = np.eye(student.shape[-1])[np.asarray(labels)]
        found = found + (1 - alpha) * (np.exp(log_softmax(student)) - one_hot)
    return found / np.prod(student.shape[:-1])
