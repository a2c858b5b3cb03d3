"""Accuracy, nats a token and equal tokens, against loops in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.errors import DataUnavailableError
from experiments.pretrained.evaluate import (
    Texts,
    accuracy,
    equal_tokens,
    hits,
    nats,
    nats_per_token,
    padded,
)
from tests.models import normal

LABELS = np.array([0, 2, 1, 1, 0, 2], np.int32)
IMAGES = np.zeros((6, 2, 2, 3), np.uint8)
LOGITS = np.asarray(normal(0, 6, 3))
TEXTS = [[1, 5, 6], [1, 4, 2, 3, 7, 0], [1], [1, 2, 2, 2]]


def test_hits_are_counted():
    assert int(hits(jnp.asarray(LOGITS), LABELS)) == (LOGITS.argmax(1) == LABELS).sum()


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_accuracy_does_not_depend_on_batches(batch: int):
    seen = []

    def count(images, labels):
        seen.append(len(images))
        start = batch * (len(seen) - 1)
        return hits(jnp.asarray(LOGITS[start : start + batch]), labels)

    expected = (LOGITS.argmax(1) == LABELS).mean()
    assert accuracy(count, IMAGES, LABELS, batch=batch) == expected
    assert seen == [batch] * (6 // batch)


@pytest.mark.parametrize(("images", "batch"), [(6, 4), (0, 2)])
def test_batches_that_are_not_full_are_refused(images: int, batch: int):
    with pytest.raises(DataUnavailableError, match="every batch has to be full"):
        accuracy(lambda x, y: jnp.int32(0), IMAGES[:images], LABELS[:images], batch=batch)


def test_padding_keeps_every_pair_of_neighbours():
    inputs, targets, mask = padded(TEXTS, 4)
    for row, text in enumerate(TEXTS):
        pairs = list(itertools.pairwise(text[:5]))
        found = zip(inputs[row][mask[row]], targets[row][mask[row]], strict=True)
        assert [(int(a), int(b)) for a, b in found] == pairs
    assert (targets[~mask] == 0).all()
    assert mask.sum() == 2 + 4 + 0 + 3


def test_rows_are_rows():
    texts = padded(TEXTS, 4)
    for part, whole in zip(texts.rows(1, 2), texts, strict=True):
        np.testing.assert_array_equal(part, whole[1:3])


def test_nats_are_those_of_numpy():
    texts = padded(TEXTS, 4)
    logits = normal(1, 4, 4, 8)
    x = np.asarray(logits, np.float64)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = -sum(log_p[b, t, texts.targets[b, t]] for b, t in np.argwhere(texts.mask))
    np.testing.assert_allclose(nats(logits, texts.targets, texts.mask), expected, rtol=1e-6)


def test_equal_chances_cost_the_logarithm_of_the_vocabulary():
    texts = padded(TEXTS, 4)
    total = jax.jit(lambda some: nats(jnp.zeros((*some.inputs.shape, 8)), some.targets, some.mask))
    for batch in (1, 2, 4):
        np.testing.assert_allclose(nats_per_token(total, texts, batch=batch), np.log(8), rtol=1e-6)


def test_padding_costs_nothing():
    short, long = padded(TEXTS, 5), padded(TEXTS, 9)
    logits = normal(2, 4, 9, 8)
    costs = [
        nats(logits[:, : texts.inputs.shape[1]], texts.targets, texts.mask)
        for texts in (short, long)
    ]
    np.testing.assert_allclose(*costs, rtol=1e-6)


@pytest.mark.parametrize(
    ("texts", "batch"), [(padded(TEXTS, 4), 3), (padded([[1], [1]], 4), 1)], ids=["batch", "none"]
)
def test_texts_that_cannot_be_measured_are_refused(texts: Texts, batch: int):
    with pytest.raises(DataUnavailableError, match="try:"):
        nats_per_token(lambda some: jnp.float32(0), texts, batch=batch)


def test_equal_tokens_end_at_the_first_that_differs():
    reference = jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    tokens = jnp.array([[1, 2, 3], [1, 0, 3], [0, 2, 3], [1, 2, 0]])
    assert equal_tokens(tokens, reference).tolist() == [3, 1, 0, 2]
