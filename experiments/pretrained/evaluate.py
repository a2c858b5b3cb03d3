"""How good a network is: accuracy on images, and nats a token on texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float, Int

from experiments.data.errors import DataUnavailableError

Hits = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int32]], jax.Array]
"""``(images, labels) ->`` how many are classified rightly; jitted."""


def hits(
    logits: Float[Array, "n c"], labels: Int[Array, "n"] | npt.NDArray[np.int32]
) -> Int[Array, ""]:
    """How often the largest logit is the label's.

    >>> int(hits(jnp.array([[0.1, 0.2], [0.3, 0.0], [0.5, 0.6]]), jnp.array([1, 1, 1])))
    2
    """
    return jnp.sum(jnp.argmax(logits, axis=-1) == labels)


def accuracy(
    count: Hits, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32], *, batch: int
) -> float:
    """The share of images that are classified rightly, ``batch`` at a time.

    Raises:
      DataUnavailableError: there is no image, or the batch does not divide the number of images:
        a shorter one would be compiled anew.
    """
    if not len(images) or len(images) % batch:
        raise DataUnavailableError(
            f"{len(images)} images in batches of {batch}",
            why="every batch has to be full",
            fix=f"images[: {len(images) // batch * batch}], or a batch that divides the number",
        )
    starts = range(0, len(images), batch)
    counts = [count(images[i : i + batch], labels[i : i + batch]) for i in starts]
    return sum(int(c) for c in counts) / len(images)


class Texts(NamedTuple):
    """Texts of one length.

    Attributes:
      inputs: ``(texts, length)`` tokens, 0 where a text has ended.
      targets: the token after each of them.
      mask: True where there is one.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]

    def rows(self, start: int, count: int) -> Texts:
        """Some of the texts."""
        kept = slice(start, start + count)
        return Texts(self.inputs[kept], self.targets[kept], self.mask[kept])


def padded(texts: Sequence[Sequence[int]], length: int) -> Texts:
    """Texts as arrays: of each at most ``length + 1`` tokens, of which ``length`` are predicted.

    >>> padded([[1, 5, 6], [1, 7, 8, 9, 4]], 3).targets.tolist()
    [[5, 6, 0], [7, 8, 9]]
    """
    tokens = np.zeros((len(texts), length + 1), np.int32)
    mask = np.zeros((len(texts), length), np.bool_)
    for row, text in enumerate(texts):
        kept = text[: length + 1]
        tokens[row, : len(kept)] = kept
        mask[row, : max(len(kept) - 1, 0)] = True
    return Texts(tokens[:, :-1], tokens[:, 1:], mask)


def nats(
    logits: Float[Array, "b t v"],
    targets: Int[Array, "b t"] | npt.NDArray[np.int32],
    mask: Bool[Array, "b t"] | npt.NDArray[np.bool_],
) -> Float[Array, ""]:
    """The sum of ``-ln p(target)`` over the targets that there are, in float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask, chosen, 0.0))


def nats_per_token(total: Callable[[Texts], jax.Array], texts: Texts, *, batch: int) -> float:
    """The mean of ``-ln p`` over all predicted tokens, ``batch`` texts at a time.

    Args:
      total: of some texts, the sum of :func:`nats`; jitted.

    Raises:
      DataUnavailableError: no token is predicted, or the batch does not divide the texts.
    """
    count, predicted = len(texts.inputs), int(texts.mask.sum())
    if not predicted or count % batch:
        raise DataUnavailableError(
            f"{count} texts with {predicted} predicted tokens in batches of {batch}",
            why="every batch has to be full, and something has to be predicted",
            fix="a batch that divides the number of texts, each of two tokens or more",
        )
    sums = [total(texts.rows(start, batch)) for start in range(0, count, batch)]
    return sum(float(s) for s in sums) / predicted


def equal_tokens(tokens: Int[Array, "b n"], reference: Int[Array, "b n"]) -> npt.NDArray[np.int64]:
    """How many tokens of each text are the reference's, before the first that is another.

    >>> equal_tokens(jnp.array([[4, 5, 6], [7, 8, 9]]), jnp.array([[4, 5, 1], [7, 8, 9]])).tolist()
    [2, 3]
    """
    same = np.asarray(tokens) == np.asarray(reference)
    return np.cumprod(same, axis=-1).sum(axis=-1)
