"""The study: every method at every width and seed, rows to a CSV file, tables to a page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments.models.cnn import SmallCNN
from experiments.qat.floats import Images, float_accuracy, train_float
from experiments.qat.learner import (
    Distillation,
    Learner,
    QatState,
    Recipe,
    Variables,
    learner,
    plan_entries,
)
from experiments.qat.methods import BINARY, LEARNED_WIDTHS, METHODS, WHOLE, Method
from experiments.qat.results import Results, Row
from experiments.training import Task, TrainerConfig, train
from quantjax import presets, training
from quantjax.calibration import RULES
from quantjax.quantizer import weight_quantizer

SPARSITY = 0.8
ACTIVATION_BITS = 4  # beside weights of one bit
FLOAT, PTQ, QAT, LEARNED, SIGNS, TAUGHT = (
    *("float", "calibrated", "trained", "learned widths"),
    *("one-bit weights", "distillation"),
)
PTQ_WHOLE, QAT_WHOLE = "every layer, calibrated", "every layer, trained"
"""Tables."""
STUDENT, STUDENT_KD = "small network", "small network + KD"
PRUNED, PRUNED_KD = "80 % pruned, W4A4", "80 % pruned, W4A4 + KD"
Note = Callable[[str], None]


class Setting(NamedTuple):
    """What is the same for all cells."""

    model: SmallCNN
    student: SmallCNN
    data: Images
    recipe: Recipe
    float_steps: int
    seeds: Sequence[int]
    more_seeds: Sequence[int]  # of LSQ and the range rules alone
    widths: Sequence[int]
    methods: Sequence[Method]

    @property
    def fingerprint(self) -> str:
        """Of all that a number depends on, beside method, width and seed.

        Of methods what they print as: that an estimator or a rule computes otherwise than before
        does not show.
        """
        parts = (
            [dataclasses.astuple(self.recipe), self.float_steps, self.data.digest],
            [str(self.model), str(self.student)],
            [Distillation(), SPARSITY, ACTIVATION_BITS],
            [
                (method.name, str(method.scheme()), method.learned, method.learns_scale)
                for method in (*METHODS, *LEARNED_WIDTHS, *BINARY)
            ],
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def run(setting: Setting, results: Results, folder: Path | None, note: Note) -> None:
    """Compute every cell that the results do not have."""
    compares = any(method in WHOLE for method in setting.methods)
    more = setting._replace(seeds=(*setting.seeds, *(setting.more_seeds if compares else ())))
    floats = {seed: _float(setting, results, folder, seed, note) for seed in more.seeds}
    _calibrated(more, results, floats, PTQ, note)
    _calibrated(more, results, floats, PTQ_WHOLE, note)
    each = [(QAT, method, setting.widths) for method in setting.methods]
    each += [(QAT_WHOLE, method, setting.widths) for method in setting.methods if method in WHOLE]
    each += [(LEARNED, method, (4,)) for method in LEARNED_WIDTHS]
    each += [(SIGNS, method, (1,)) for method in BINARY]
    for table, method, widths in each:
        compared = method in WHOLE and table in (QAT, QAT_WHOLE)
        _trained(more if compared else setting, results, floats, (table, method, widths), note)
    _taught(setting, results, floats, note)


def _float(
    setting: Setting, results: Results, folder: Path | None, seed: int, note: Note
) -> Variables:
    began = time.perf_counter()
    variables = train_float(
        setting.model,
        setting.data,
        steps=setting.float_steps,
        batch=setting.recipe.batch,
        seed=seed,
        folder=None if folder is None else folder / f"float-{seed}",
    )
    if not results.has(FLOAT, "float", 32, seed):
        found = float_accuracy(setting.model, variables, setting.data)
        seconds = time.perf_counter() - began
        results.add(_row(results, (FLOAT, "float", 32, seed), found, found, 32.0, seconds))
        note(f"float, seed {seed}: {found:.4f} ({seconds:.0f} s)")
    return variables


def _row(
    results: Results,
    cell: tuple[str, str, int, int],
    before: float,
    accuracy: float,
    mean_bits: float,
    seconds: float,
) -> Row:
    table, method, bits, seed = cell
    return Row(
        study=results.study,
        table=table,
        method=method,
        bits=bits,
        seed=seed,
        before=round(before, 6),
        accuracy=round(accuracy, 6),
        mean_bits=round(mean_bits, 4),
        seconds=round(seconds, 2),
    )


def _missing(
    setting: Setting, results: Results, table: str, method: str, widths: Sequence[int]
) -> Iterator[tuple[int, int]]:
    for bits in widths:
        for seed in setting.seeds:
            if not results.has(table, method, bits, seed):
                yield bits, seed


def _calibrated(
    setting: Setting, results: Results, floats: dict[int, Variables], table: str, note: Note
) -> None:
    """Every range rule without training, weights per tensor and per channel."""
    clipped = presets.clipped(weight_bits=8, activation_bits=8)
    per_channel = dataclasses.replace(clipped, weights=weight_quantizer(rule=qj.ranges.MSE))
    rules = [(name.value, rule) for name, rule in RULES.items()]
    for label, scheme in (("tensor", clipped), ("channel", per_channel)):
        names = [f"{name}, weights per {label}" for name, _ in rules]
        if not any(
            cell
            for name in names
            for cell in _missing(setting, results, table, name, setting.widths)
        ):
            continue
        method = Method(f"weights per {label}", lambda *, scheme=scheme, **_: scheme)
        every = [rule for _, rule in rules]
        learned = _learner(setting, floats, method, rules=every, exempt=table == PTQ)
        for index, name in enumerate(names):
            for bits, seed in list(_missing(setting, results, table, name, setting.widths)):
                state = _start(setting, learned, floats[seed], bits, rule=index)
                found = learned.evaluate(state, *setting.data.test)
                cell = (table, name, bits, seed)
                results.add(_row(results, cell, found, found, float(bits), 0.0))
        note(f"{table} by {len(names)} rules, weights per {label}")


def _learner(
    setting: Setting, floats: dict[int, Variables], method: Method, **options: Any
) -> Learner:
    first = floats[setting.seeds[0]]
    images = setting.data.train[0]
    return learner(setting.model, first, images, method, setting.recipe, **options)


def _start(
    setting: Setting, learned: Learner, variables: Variables, bits: int, **options: Any
) -> QatState:
    images = jnp.asarray(setting.data.train[0][: setting.recipe.calibration])
    return learned.start(variables, images, bits, **options)


def _finetuned(
    setting: Setting, learned: Learner, state: QatState, seed: int
) -> tuple[QatState, float]:
    began = time.perf_counter()
    config = TrainerConfig(steps=setting.recipe.steps, batch=setting.recipe.batch, log_every=200)
    task = Task(lambda key: state, learned.step)
    result = train(task, setting.data.train, config, seed, None)
    return result.state, time.perf_counter() - began


def _trained(
    setting: Setting,
    results: Results,
    floats: dict[int, Variables],
    job: tuple[str, Method, Sequence[int]],
    note: Note,
) -> None:
    table, method, widths = job
    cells = list(_missing(setting, results, table, method.name, widths))
    if not cells:
        return
    learned = _learner(setting, floats, method, exempt=table != QAT_WHOLE)
    for bits, seed in cells:
        activation_bits = ACTIVATION_BITS if table == SIGNS else bits
        state = _start(setting, learned, floats[seed], bits, activation_bits=activation_bits)
        before = learned.evaluate(state, *setting.data.test)
        state, seconds = _finetuned(setting, learned, state, seed)
        after = learned.evaluate(state, *setting.data.test)
        mean = _mean_bits(learned.plan, state.qstate) if table == LEARNED else float(bits)
        cell = (table, method.name, bits, seed)
        results.add(_row(results, cell, before, after, mean, seconds))
        note(f"{method.name}, {bits} bits, seed {seed}: {before:.4f} -> {after:.4f}")


def _mean_bits(plan: qj.Plan, qstate: Any) -> float:
    return float(training.weight_bits_total(plan, qstate)) / sum(plan_entries(plan).values())


def _taught(setting: Setting, results: Results, floats: dict[int, Variables], note: Note) -> None:
    """A small network with and without a teacher; a pruned W4A4 one with and without."""
    recipe, kd = setting.recipe, Distillation()
    for name, taught in ((STUDENT, False), (STUDENT_KD, True)):
        for _, seed in _missing(setting, results, TAUGHT, name, (32,)):
            began = time.perf_counter()
            options: dict[str, Any] = {}
            if taught:
                options = {"distillation": kd, "teacher": (setting.model, floats[seed])}
            variables = train_float(
                setting.student,
                setting.data,
                steps=setting.float_steps,
                batch=recipe.batch,
                seed=seed,
                **options,
            )
            found = float_accuracy(setting.student, variables, setting.data)
            seconds = time.perf_counter() - began
            results.add(_row(results, (TAUGHT, name, 32, seed), 0.0, found, 32.0, seconds))
            note(f"{name}, seed {seed}: {found:.4f}")
    lsq = Method("LSQ", presets.lsq, learns_scale=True)
    for name, distillation in ((PRUNED, None), (PRUNED_KD, kd)):
        cells = list(_missing(setting, results, TAUGHT, name, (4,)))
        if not cells:
            continue
        learned = _learner(setting, floats, lsq, distillation=distillation)
        for bits, seed in cells:
            mask = _mask(floats[seed])
            teacher = None if distillation is None else floats[seed]
            state = _start(
                setting, learned, floats[seed], bits, mask=mask, teacher_variables=teacher
            )
            before = learned.evaluate(state, *setting.data.test)
            state, seconds = _finetuned(setting, learned, state, seed)
            after = learned.evaluate(state, *setting.data.test)
            cell = (TAUGHT, name, bits, seed)
            results.add(_row(results, cell, before, after, float(bits), seconds))
            note(f"{name}, seed {seed}: {before:.4f} -> {after:.4f}")


def _mask(variables: Variables) -> Any:
    prune = jax.jit(lambda params: qj.prune_mask(params, SPARSITY, scope=qj.pruning.Scope.GLOBAL))
    return prune(variables["params"])
