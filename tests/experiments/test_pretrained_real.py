"""The published weights themselves: accuracy and text as documented. Slow, and needs the files."""

import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import SetName, Stories, load, load_images
from experiments.models.decoder import Decoder
from experiments.models.generation import greedy
from experiments.models.kv_cache import quantized_cache
from experiments.pretrained import (
    Pretrained,
    Storyteller,
    decode,
    encode,
    load_resnet,
    load_stories260k,
    normalized,
    write_llama2c,
    write_resnet,
    write_tokenizer,
)
from experiments.pretrained.evaluate import hits, nats, padded

pytestmark = pytest.mark.slow

# Karpathy, llama2.c, doc/stories260K.md: "./run stories260K.bin -z tok512.bin -t 0.0".
DOCUMENTED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." \
Her mom said, "Don't worry, Lily. We can help you."""


def _folder(*names: str) -> Path:
    named = os.environ.get("QUANTJAX_DATA", "")
    if not named:
        # Published files that no clone has; tests never reach for the network.
        pytest.skip("QUANTJAX_DATA names no folder with the published weights")
    missing = [name for name in names if not (Path(named) / name).exists()]
    if missing:
        # A folder may hold the data sets alone; each file is asked for by the test that needs it.
        pytest.skip(f"the folder that QUANTJAX_DATA names lacks {', '.join(missing)}")
    return Path(named)


@pytest.fixture(scope="module")
def teller() -> Storyteller:
    return load_stories260k(data_dir=_folder("stories260K"))


@pytest.mark.parametrize(
    ("name", "right"),
    [(Pretrained.RESNET20, 9173), (Pretrained.RESNET32, 9263), (Pretrained.RESNET56, 9339)],
    ids=lambda value: value.value if isinstance(value, Pretrained) else "",
)
def test_resnets_are_as_good_as_published(name: Pretrained, right: int, tmp_path: Path):
    """Within two images: sums in another order may turn a tie."""
    folder = _folder("resnet_cifar10", "cifar-10-batches-bin")
    model, variables = load_resnet(name, data_dir=folder)
    data = load_images(SetName.CIFAR10, data_dir=folder)
    count = jax.jit(lambda v, x, y: hits(model.apply(v, normalized(x)), y))
    batches = zip(np.split(data.test_images, 20), np.split(data.test_labels, 20), strict=True)
    assert abs(sum(int(count(variables, x, y)) for x, y in batches) - right) <= 2
    write_resnet(tmp_path / "again.npz", variables)
    with (
        np.load(tmp_path / "again.npz") as again,
        np.load(folder / "resnet_cifar10" / f"{name.value}.npz") as published,
    ):
        assert sorted(again.files) == sorted(published.files)
        for file in published.files:
            np.testing.assert_array_equal(again[file], published[file])


def test_greedy_text_is_the_documented_one(teller: Storyteller):
    step = partial(teller.model.apply, teller.variables, method="step")
    write = jax.jit(partial(greedy, step, count=256))
    out, _ = write(teller.model.shape.empty_cache(1), jnp.array([[1]], jnp.int32))
    assert decode(teller.tokenizer, out[0].tolist()) == DOCUMENTED


def test_eight_bits_of_cache_tell_the_same_story(teller: Storyteller):
    prompt = jnp.array([encode(teller.tokenizer, "Once upon a time")], jnp.int32)
    model = Decoder(teller.model.shape, quantized_cache(8))
    step = partial(model.apply, teller.variables, method="step")
    cache = teller.model.shape.empty_cache(1, positions=96, codec=quantized_cache(8))
    out, cache = jax.jit(partial(greedy, step, count=60))(cache, prompt)
    assert cache.keys.codes.dtype == jnp.int8
    text = decode(teller.tokenizer, [*prompt[0].tolist(), *out[0].tolist()])
    assert DOCUMENTED.startswith(text)
    assert len(text) > 150


def test_stories_cost_one_and_a_half_nats_a_token(teller: Storyteller):
    found = load(SetName.TINY_STORIES, data_dir=_folder("text/tinystories"))
    assert isinstance(found, Stories)
    texts = padded([encode(teller.tokenizer, story) for story in found.stories[:300]], 512)
    total = jax.jit(lambda v, t: nats(teller.model.apply(v, t.inputs), t.targets, t.mask))
    sums = [float(total(teller.variables, texts.rows(i, 20))) for i in range(0, 300, 20)]
    assert sum(sums) / texts.mask.sum() == pytest.approx(1.5003, abs=1e-3)
    assert sum(sums[:3]) / texts.mask[:60].sum() == pytest.approx(1.2959, abs=1e-3)


def test_stories_come_back(teller: Storyteller):
    found = load(SetName.TINY_STORIES, data_dir=_folder("text/tinystories"))
    assert isinstance(found, Stories)
    for story in found.stories[:50]:
        assert decode(teller.tokenizer, encode(teller.tokenizer, story)) == story


def test_the_files_are_written_as_they_are(teller: Storyteller, tmp_path: Path):
    folder = _folder("stories260K") / "stories260K"
    write_tokenizer(tmp_path / "tok.bin", teller.tokenizer)
    assert (tmp_path / "tok.bin").read_bytes() == (folder / "tok512.bin").read_bytes()
    write_llama2c(tmp_path / "model.bin", teller.model.shape, teller.variables)
    tables = 2 * 4 * 512 * 4
    ours, theirs = (tmp_path / "model.bin").read_bytes(), (folder / "stories260K.bin").read_bytes()
    assert ours[:-tables] == theirs[:-tables]
    np.testing.assert_allclose(
        *(np.frombuffer(data[-tables:], "<f4") for data in (ours, theirs)), atol=1e-4
    )
