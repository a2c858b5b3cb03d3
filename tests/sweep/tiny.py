"""A study that trains in no time, and counts how often it is asked to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax.sweep import Study


@dataclasses.dataclass
class Calls:
    """How often each part of the study ran."""

    trained: list[int] = dataclasses.field(default_factory=list)
    traced: int = 0


def tiny_study(
    calls: Calls | None = None, *, identity: str = "tiny", poison: bool = False
) -> Study:
    """Two dense layers with random weights on random data whose labels the float model gives."""
    calls = calls if calls is not None else Calls()
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.normal(size=(40, 6)), jnp.float32)

    def apply(params, x):
        calls.traced += 1
        return jnp.tanh(x @ params["first"]) @ params["second"]

    def weights(seed):
        draw = np.random.default_rng(seed)
        params = {
            "first": jnp.asarray(draw.normal(size=(6, 8)), jnp.float32),
            "second": jnp.asarray(draw.normal(size=(8, 3)), jnp.float32),
        }
        return {**params, "second": params["second"].at[0, 0].set(jnp.nan)} if poison else params

    def train(seed, on_step):
        calls.trained.append(seed)
        for _ in range(3):
            on_step(1)
        return weights(seed)

    def float_logits(seed):
        params = weights(seed)
        return jnp.tanh(inputs @ params["first"]) @ params["second"]

    return Study(
        name="tiny",
        apply=apply,
        train=train,
        train_steps=3,
        calibration=lambda: [inputs[:16], inputs[16:32]],
        test=lambda: (inputs, jnp.argmax(float_logits(0), axis=-1).astype(jnp.int32)),
        policy=qj.uniform_policy(),
        identity=identity,
    )


def alone(study: Study, seed: int, weight_bits: int, activation_bits: int, rule) -> int:
    """Correct predictions of one cell, computed with static widths and nothing of the sweep."""
    params = study.train(seed, lambda steps: None)
    inputs, labels = study.test()
    batches = study.calibration()
    planned = qj.plan(study.policy, qj.sites(study.apply, params, batches[0]))
    state = qj.init(planned)
    for batch in batches:
        _, state = qj.observe(study.apply, planned)(state, params, batch)
    qstate = qj.calibrate(
        planned,
        state,
        params,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        rule=rule,
    )
    logits = jax.jit(qj.fake_quantize(study.apply, planned))(qstate, params, inputs)
    return int(jnp.sum(jnp.argmax(logits, axis=-1) == labels))
