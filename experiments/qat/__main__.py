"""``python -m experiments.qat``: train every estimator at every width, and write the tables."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

import quantjax as qj
from experiments.data import SetName, named
from experiments.models.cnn import SmallCNN
from experiments.options import OptionError, check_counts
from experiments.qat.floats import images_of
from experiments.qat.learner import EDGE_BITS, Recipe, edges
from experiments.qat.methods import METHODS
from experiments.qat.report import page
from experiments.qat.results import Results
from experiments.qat.study import Note, Setting, run
from quantjax.errors import QuantjaxError

STRIDES = {SetName.DIGITS: (1, 2, 2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train every estimator at every width and seed; finished cells are not computed again.

    Attributes:
      data: fashion-mnist, mnist, cifar-10 or digits.
      data_dir: a folder with the data; otherwise QUANTJAX_DATA, or they are downloaded.
      output: results.csv, tables.md, and checkpoints of the float networks.
      report: also write the tables there.
      seeds: the float networks, and the batches of each training.
      more_seeds: of LSQ and the range rules alone, whose differences spread most over seeds.
      widths: of weights and activations together.
      methods: parts of the names of methods; all of them without.
      float_steps: of the float networks.
      steps: of each fine-tuning.
    """

    data: str = "fashion-mnist"
    data_dir: Path | None = None
    output: Path = Path("outputs/qat")
    report: Path | None = None
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (0, 1, 2, 3, 4)
    more_seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (5, 6, 7, 8, 9)
    widths: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (4, 3, 2)
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    float_steps: int = 1404
    steps: int = 624


def check(options: Options) -> None:
    """Raise ``OptionError`` for what no study can be made of."""
    check_counts(options, "steps", "float_steps")
    for name in ("seeds", "widths"):
        if not getattr(options, name):
            raise OptionError(f"no {name}", fix=f"--{name} 4 2")
    bad = [bits for bits in options.widths if not 1 <= bits <= 8]
    if bad:
        raise OptionError(f"a width of {bad[0]}", why="1 to 8 bits", fix="--widths 4 3 2")
    unknown = [
        text
        for text in options.methods
        if not any(text.casefold() in method.name.casefold() for method in METHODS)
    ]
    if unknown:
        raise OptionError(
            f"no method's name has '{unknown[0]}'",
            why=f"there are {', '.join(method.name for method in METHODS)}",
            fix="--methods lsq",
        )


def command(options: Options) -> str:
    """What made the page, without the folders of this machine."""
    words = ["python -m experiments.qat"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("data_dir", "output", "report") or value == field.default:
            continue
        texts = value if isinstance(value, tuple) else (value,)
        words.append(
            " ".join([f"--{field.name.replace('_', '-')}", *(shlex.quote(str(t)) for t in texts)])
        )
    if options.report is not None:
        words.append("--report experiments/qat/README.md")
    return " ".join(words)


def setting_of(options: Options) -> Setting:
    """The study that the options ask for."""
    check(options)
    name = named(options.data)
    strides = STRIDES.get(name, (2, 2, 2))
    asked = [text.casefold() for text in options.methods]
    chosen = [m for m in METHODS if not asked or any(a in m.name.casefold() for a in asked)]
    return Setting(
        model=SmallCNN(strides=strides),
        student=SmallCNN(channels=(4, 8, 8), strides=strides),
        data=images_of(name, options.data_dir),
        recipe=Recipe(steps=options.steps),
        float_steps=options.float_steps,
        seeds=options.seeds,
        more_seeds=[seed for seed in options.more_seeds if seed not in options.seeds],
        widths=options.widths,
        methods=chosen,
    )


def mean_at_start(setting: Setting, bits: int = 4) -> float:
    """Bits of a weight where all layers but the first and the last have ``bits``."""
    images = jax.ShapeDtypeStruct((1, *setting.data.train[0].shape[1:]), jnp.float32)
    variables = jax.eval_shape(setting.model.init, jax.random.key(0), images)
    rows = qj.sites(setting.model.apply, variables, images)
    sizes = {site.name: math.prod(site.weight.shape) for site in rows if site.weight is not None}
    outer = edges(list(sizes))
    total = sum(size * (EDGE_BITS if name in outer else bits) for name, size in sizes.items())
    return total / sum(sizes.values())


def write(options: Options, note: Note = print) -> str:
    """Run the study and return its page."""
    setting = setting_of(options)
    pages = [path for path in (options.output / "tables.md", options.report) if path is not None]
    for path in pages:  # ahead of hours of training
        path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "results.csv", setting.fingerprint)
    run(setting, results, options.output, note)
    head = (
        "# Quantization-aware training\n\n"
        f"{options.data}; {setting.model.channels} channels with batch norm, first and last layer "
        f"at 8 bits; {options.steps} steps of {setting.recipe.batch} images after "
        f"{options.float_steps} in float. Made by\n\n"
        f"```sh\n{command(options)}\n```"
    )
    text = page(results.rows, options.widths, options.seeds, head, mean_at_start(setting))
    for path in pages:
        path.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """The command."""
    options = tyro.cli(Options, prog="python -m experiments.qat")
    try:
        print(write(options))
    except QuantjaxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
