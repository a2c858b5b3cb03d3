"""Networks that others trained, in float and quantized after training, measured.

ResNet-20, 32 and 56 on the 10,000 test images of CIFAR-10: float and W8A8, W4A8, W4A4, calibrated
on 1,000 training images. stories260K on 300 stories of TinyStories, calibrated on 32 others; and
its greedy text with a cache of keys and values in 8 to 2 bits, against the text with a cache of
floats. Results are added to the file as they come, so that a part can be measured anew.

    scripts/in_env python scripts/measure_pretrained.py --data-dir FOLDER --output FILE.json
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments.data import SetName, load_images
from experiments.data.registry import LOADERS
from experiments.data.texts import Stories
from experiments.models.attention import FLOAT_CACHE, Cache
from experiments.models.decoder import Decoder
from experiments.models.generation import greedy
from experiments.models.kv_cache import quantized_cache
from experiments.options import OptionError, check_counts
from experiments.pretrained import (
    Pretrained,
    Storyteller,
    decode,
    encode,
    load_resnet,
    load_stories260k,
    normalized,
)
from experiments.pretrained.evaluate import (
    Texts,
    accuracy,
    equal_tokens,
    hits,
    nats,
    nats_per_token,
    padded,
)

WIDTHS = {"W8A8": (8.0, 8.0), "W4A8": (4.0, 8.0), "W4A4": (4.0, 4.0)}
RULES = {"min-max": qj.ranges.MIN_MAX, "mse": qj.ranges.MSE}
CACHE_BITS = (*((b, b) for b in (8, 7, 6, 5, 4, 3, 2)), (8, 4), (4, 8))  # keys, values
PROMPT = "Once upon a time"
NEW_TOKENS = 60
PROMPT_TOKENS = 16  # of the stories that are gone on with


class Part(enum.Enum):
    """What can be measured."""

    RESNET20 = "resnet20"
    RESNET32 = "resnet32"
    RESNET56 = "resnet56"
    STORIES = "stories"
    CACHE = "cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure networks that others trained, in float and quantized after training.

    Attributes:
      data_dir: a folder with the data and the weights; otherwise QUANTJAX_DATA.
      output: a JSON file; parts that are not measured now stay in it.
      parts: what to measure; all without.
      test_images, stories: how many.
      calibration_images, calibration_stories: how many, of which none is tested.
    """

    data_dir: Path | None = None
    output: Path | None = None
    parts: tuple[Part, ...] = tuple(Part)
    test_images: int = 10_000
    stories: int = 300
    calibration_images: int = 1_000
    calibration_stories: int = 32


def filed(output: Path) -> dict[str, Any]:
    """What is in the file, whose folder is made where there is none."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    except ValueError as error:
        raise OptionError(
            "the output file is none of this script's",
            where=str(output),
            why=str(error),
            fix="--output another.json",
        ) from error
    return dict(found)


def calibrated(plan: Any, state: Any, variables: Any, rules: tuple[str, ...]) -> Any:
    """QParams by rule and widths; all of them are one program."""
    stacked = qj.ranges.stack([RULES[name] for name in rules])

    @jax.jit
    def derive(state: Any, variables: Any, index: Any, weight_bits: Any, act_bits: Any) -> Any:
        return qj.calibrate(
            plan,
            state,
            variables,
            rule=stacked[index],
            weight_bits=weight_bits,
            activation_bits=act_bits,
        )

    return {
        f"{label} {rule}": derive(state, variables, jnp.int32(i), jnp.float32(w), jnp.float32(a))
        for i, rule in enumerate(rules)
        for label, (w, a) in WIDTHS.items()
    }


def resnet(name: Pretrained, options: Options) -> dict[str, Any]:
    """Accuracies of one network, in percent."""
    model, variables = load_resnet(name, data_dir=options.data_dir)
    data = load_images(SetName.CIFAR10, data_dir=options.data_dir)
    images, labels = data.test_images[: options.test_images], data.test_labels
    batch = min(500, options.test_images)

    def f(variables: Any, images: Any) -> jax.Array:
        return model.apply(variables, normalized(images))  # type: ignore[return-value]

    def percent(logits: Callable[..., Any], *arguments: Any) -> float:
        def count(images: Any, labels: Any) -> jax.Array:
            return counted(arguments, images, labels)

        counted = jax.jit(lambda a, x, y: hits(logits(*a, x), y))
        share = accuracy(count, images, labels[: len(images)], batch=batch)
        return 100.0 * share

    plan = qj.plan(qj.uniform_policy(), qj.sites(f, variables, images[:batch]))
    observe, state = jax.jit(qj.observe(f, plan)), qj.init(plan)
    for start in range(0, options.calibration_images, batch):
        stop = min(start + batch, options.calibration_images)
        _, state = observe(state, variables, data.train_images[start:stop])
    report = {"float": percent(f, variables)}
    print(name.value, report, flush=True)
    simulate = jax.jit(qj.fake_quantize(f, plan))
    for label, qstate in calibrated(plan, state, variables, tuple(RULES)).items():
        counts = [
            hits(simulate(qstate, variables, images[i : i + batch]), labels[i : i + batch])
            for i in range(0, len(images), batch)
        ]
        report[label] = 100.0 * sum(map(int, counts)) / len(images)
        print(name.value, label, report[label], flush=True)
    return {
        "accuracy_percent": report,
        "test_images": len(images),
        "calibration_images": options.calibration_images,
        "sites": len(plan.quantized),
    }


def _stories(teller: Storyteller, options: Options) -> list[list[int]]:
    found = LOADERS[SetName.TINY_STORIES](data_dir=options.data_dir)
    assert isinstance(found, Stories)
    wanted = found.stories[: options.stories + options.calibration_stories]
    return [encode(teller.tokenizer, story) for story in wanted]


def stories(options: Options) -> dict[str, Any]:
    """Nats a token of the language model, in float and quantized."""
    teller = load_stories260k(data_dir=options.data_dir)
    model, variables, _ = teller
    tokens, length = _stories(teller, options), model.shape.positions
    texts = padded(tokens[: options.stories], length)
    others = padded(tokens[options.stories :], length)
    batch = 20

    def f(variables: Any, tokens: Any) -> jax.Array:
        return model.apply(variables, tokens)  # type: ignore[return-value]

    plan = qj.plan(qj.uniform_policy(), qj.sites(f, variables, texts.inputs[:batch]))
    _, state = jax.jit(qj.observe(f, plan))(
        qj.init(plan), variables, others.inputs, where=others.mask
    )

    def loss(logits: Callable[..., Any]) -> Callable[..., float]:
        total = jax.jit(lambda a, t: nats(logits(*a, t.inputs), t.targets, t.mask))
        return lambda *a: nats_per_token(lambda some: total(a, some), texts, batch=batch)

    report = {"float": loss(f)(variables)}
    print("stories", report, flush=True)
    simulated = loss(qj.fake_quantize(f, plan))
    for label, qstate in calibrated(plan, state, variables, tuple(RULES)).items():
        report[label] = simulated(qstate, variables)
        print("stories", label, report[label], flush=True)
    print(plan)
    return {
        "nats_per_token": report,
        "stories": len(texts.inputs),
        "calibration_stories": len(others.inputs),
        "predicted_tokens": int(texts.mask.sum()),
        "sites": [site.site.name for site in plan.quantized],
    }


Bits = tuple[jax.Array, jax.Array] | None


def _total(total: Callable[..., Any], variables: Any, bits: Bits, some: Texts) -> jax.Array:
    return total(variables, some, bits)


def cache(options: Options) -> dict[str, Any]:
    """Greedy text and nats a token with keys and values in codes."""
    teller = load_stories260k(data_dir=options.data_dir)
    model, variables, tokenizer = teller
    tokens = _stories(teller, options)[: options.stories]
    texts = padded(tokens, model.shape.positions)

    def holding(bits: Bits, batch: int, positions: int, variables: Any) -> tuple[Cache, Any]:
        """An empty cache, of floats without bits, and the step that fills it."""
        codecs = [FLOAT_CACHE] * 2 if bits is None else [quantized_cache(b) for b in bits]
        of = partial(model.shape.empty_cache, batch, positions=positions)
        held = Cache(of(codec=codecs[0]).keys, of(codec=codecs[1]).values)
        decoder = Decoder(model.shape, codecs[0])  # widths are in the stores
        return held, lambda t, c, p: decoder.apply(variables, t, c, p, method="step")

    @jax.jit
    def written(variables: Any, prompt: jax.Array, bits: Bits) -> jax.Array:
        positions = prompt.shape[1] + NEW_TOKENS
        held, step = holding(bits, prompt.shape[0], positions, variables)
        return greedy(step, held, prompt, count=NEW_TOKENS)[0]

    @jax.jit
    def total(variables: Any, some: Texts, bits: Bits) -> jax.Array:
        held, step = holding(bits, some.inputs.shape[0], model.shape.positions, variables)
        logits, _ = step(some.inputs, held, jnp.int32(0))
        return nats(logits, some.targets, some.mask)

    prompt = jnp.asarray([encode(tokenizer, PROMPT)], jnp.int32)
    many = jnp.asarray([story[:PROMPT_TOKENS] for story in tokens], jnp.int32)
    reference, references = (written(variables, some, None) for some in (prompt, many))
    report: dict[str, Any] = {
        "prompt": PROMPT,
        "text": decode(tokenizer, [*prompt[0].tolist(), *reference[0].tolist()]),
        "new_tokens": NEW_TOKENS,
        "other_prompts": len(many),
        "nats_per_token": {
            "float": nats_per_token(partial(_total, total, variables, None), texts, batch=20)
        },
        "equal_tokens": {},
        "other_prompts_mean_equal_tokens": {},
        "other_prompts_unchanged": {},
    }
    print(report["text"], report["nats_per_token"], flush=True)
    for keys, values in CACHE_BITS:
        label = f"keys {keys} bits, values {values} bits"
        bits = (jnp.float32(keys), jnp.float32(values))
        equal = equal_tokens(written(variables, prompt, bits), reference)
        report["equal_tokens"][label] = int(equal[0])
        equal = equal_tokens(written(variables, many, bits), references)
        report["other_prompts_mean_equal_tokens"][label] = float(np.mean(equal))
        report["other_prompts_unchanged"][label] = int(np.sum(equal == NEW_TOKENS))
        report["nats_per_token"][label] = nats_per_token(
            partial(_total, total, variables, bits), texts, batch=20
        )
        print(label, {k: v[label] for k, v in report.items() if isinstance(v, dict)}, flush=True)
    return report


def main() -> None:
    """Measure and print; write JSON where asked."""
    options = tyro.cli(
        Options,
        prog="scripts/measure_pretrained.py",
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    check_counts(options, "test_images", "stories", "calibration_images", "calibration_stories")
    report = {} if options.output is None else filed(options.output)
    for part in options.parts:
        start = time.perf_counter()
        match part:
            case Part.STORIES:
                found = stories(options)
            case Part.CACHE:
                found = cache(options)
            case _:
                found = resnet(Pretrained(part.value), options)
        found |= {
            "seconds": round(time.perf_counter() - start, 1),
            "quantjax": importlib.metadata.version("quantjax"),
            "jax": importlib.metadata.version("jax"),
            "flax": importlib.metadata.version("flax"),
            "python": platform.python_version(),
            "backend": jax.default_backend(),
            "command": f"scripts/measure_pretrained.py --data-dir FOLDER --parts {part.value}",
        }
        report[part.value] = found
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except qj.errors.QuantjaxError as error:
        sys.exit(f"error: {error}")
