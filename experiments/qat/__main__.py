"""``python -m experiments.qat``: train every estimator at every width, and write the tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments.data import SetName, named
from experiments.models.cnn import SmallCNN
from experiments.qat.floats import images_of
from experiments.qat.learner import Recipe
from experiments.qat.methods import METHODS
from experiments.qat.report import page
from experiments.qat.results import Results
from experiments.qat.study import Note, Setting, run

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


def setting_of(options: Options) -> Setting:
    """The study that the options ask for."""
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


def write(options: Options, note: Note = print) -> str:
    """Run the study and return its page."""
    setting = setting_of(options)
    results = Results(options.output / "results.csv", setting.fingerprint)
    run(setting, results, options.output, note)
    head = (
        "# Quantization-aware training\n\n"
        f"{options.data}; {setting.model.channels} channels with batch norm, first and last layer "
        f"at 8 bits; {options.steps} steps of {setting.recipe.batch} images after "
        f"{options.float_steps} in float. Made by\n\n"
        "```sh\npython -m experiments.qat --report experiments/qat/README.md\n```"
    )
    text = page(results.rows, options.widths, options.seeds, head)
    for path in (options.output / "tables.md", options.report):
        if path is not None:
            path.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """The command."""
    print(write(tyro.cli(Options, prog="python -m experiments.qat")))


if __name__ == "__main__":
    main()
