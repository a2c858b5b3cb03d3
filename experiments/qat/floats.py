"""The float networks that everything starts from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from experiments.data import SetName, load_images, unit
from experiments.qat.learner import Distillation, Variables, accuracy
from experiments.training import Task, TrainerConfig, train


class Images(NamedTuple):
    """Training and test images in 0..1, labels; and the digest of the set."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    digest: str


def images_of(name: SetName, data_dir: Any = None) -> Images:
    """A set as float32."""
    found = load_images(name, data_dir=data_dir)
    return Images(
        (unit(found.train_images, found.maximum), np.asarray(found.train_labels, np.int32)),
        (unit(found.test_images, found.maximum), np.asarray(found.test_labels, np.int32)),
        found.digest,
    )


class FloatState(NamedTuple):
    """What a float training carries."""

    params: Any
    batch_stats: Any
    optimizer: Any
    teacher: Any = None


def train_float(
    model: nn.Module,
    data: Images,
    *,
    steps: int,
    batch: int,
    seed: int,
    rate: float = 3e-3,
    distillation: Distillation | None = None,
    teacher: tuple[nn.Module, Variables] | None = None,
    folder: Path | None = None,
) -> Variables:
    """Train from scratch by AdamW under a cosine schedule; with a teacher, by ``qj.kd_loss``."""
    schooled = None if teacher is None else teacher[0]
    optimizer, step = _step(model, steps, rate, distillation, schooled)

    def init(key: jax.Array) -> FloatState:
        variables = model.init(key, jnp.asarray(data.train[0][:1]))
        with jax.numpy_dtype_promotion("standard"):
            initial = optimizer.init(variables["params"])
        taught = None if teacher is None else teacher[1]
        return FloatState(variables["params"], variables["batch_stats"], initial, taught)

    config = TrainerConfig(steps=steps, batch=batch, log_every=200)
    result = train(Task(init, step), data.train, config, seed, folder)
    return {"params": result.state.params, "batch_stats": result.state.batch_stats}


def float_accuracy(model: nn.Module, variables: Variables, data: Images) -> float:
    """On the test images."""
    return accuracy(lambda x: _served(model)(variables, x), *data.test)


@functools.cache
def _served(model: nn.Module) -> Any:
    return jax.jit(lambda variables, x: model.apply(variables, x))


@functools.cache
def _step(
    model: nn.Module,
    steps: int,
    rate: float,
    distillation: Distillation | None,
    teacher: nn.Module | None,
) -> Any:
    """One function object for all seeds, so that it is compiled once."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-4)

    def step(state: FloatState, batch: Any, key: jax.Array) -> Any:
        del key
        images, labels = batch

        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            if distillation is None or teacher is None:
                cost = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            else:
                soft = jnp.asarray(jax.lax.stop_gradient(teacher.apply(state.teacher, images)))
                cost = qj.kd_loss(logits, soft, labels, **distillation._asdict())
            return cost, new["batch_stats"]

        (cost, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        return FloatState(params, batch_stats, optimizer_state, state.teacher), {"loss": cost}

    return optimizer, step
