"""One method's training as pure functions: start, step and evaluate, for every width and seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import quantjax as qj
from experiments.qat.methods import Method
from quantjax import training

Variables = dict[str, Any]
CHUNK = 1000
EDGE_BITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of a fine-tuning; part of the study's identity.

    Attributes:
      steps, batch: of the fine-tuning.
      rate: of Adam for parameters, under a cosine schedule.
      weight_decay: of parameters.
      relative_rate: of Adam for scales, clips and the like, times their own size.
      calibration: how many training images ranges are derived from.
      noise_rate: share of the weights that Quant-Noise quantizes in a step.
      size_penalty: of learned widths: times the mean bits of a weight.
    """

    steps: int = 936
    batch: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-4
    relative_rate: float = 1e-3
    calibration: int = 1024
    noise_rate: float = 0.5
    size_penalty: float = 0.02


class QatState(NamedTuple):
    """All that one training carries; widths are arrays in ``qstate``."""

    params: Any
    batch_stats: Any
    qstate: Any
    optimizer: Any
    steps_done: jax.Array
    mask: Any = None
    teacher: Any = None


class Learner(NamedTuple):
    """A method on a model; one compiled step serves every width and seed.

    Attributes:
      start: ``(variables, images, bits) -> QatState``, calibrated.
      step: ``(state, (images, labels), key) -> (state, metrics)``.
      evaluate: ``(state, images, labels) -> accuracy`` in 0..1.
      plan: what is quantized.
    """

    start: Callable[..., QatState]
    step: Callable[..., tuple[QatState, Mapping[str, jax.Array]]]
    evaluate: Callable[..., float]
    plan: qj.Plan


class Distillation(NamedTuple):
    """Of a teacher: numbers of ``qj.kd_loss``."""

    temperature: float = 4.0
    alpha: float = 0.9


def edges(names: list[str]) -> list[str]:
    """The first and the last product, which papers leave at 8 bits."""
    return [names[0], names[-1]]


def plan_for(
    model: nn.Module, variables: Variables, images: Any, scheme: qj.Scheme, *, exempt: bool = True
) -> qj.Plan:
    """The scheme at every product; the first and the last have 8 bits where they are exempt."""
    table = qj.sites(lambda v, x: model.apply(v, x), variables, images)
    outer = qj.uniform_policy(weight_bits=EDGE_BITS, activation_bits=EDGE_BITS).rules[0].scheme
    names = [site.name for site in table]
    rules = [qj.rule(qj.path(name), outer) for name in edges(names)] if exempt else []
    return qj.plan(qj.Policy([*rules, qj.rule(qj.weighted(), scheme)]), table)


def inner_bits(plan: qj.Plan, bits: Any, *, exempt: bool = True) -> dict[str, Any]:
    """``{site: bits}`` of all products, but the first and the last where they are exempt."""
    names = [entry.site.name for entry in plan.quantized]
    return {name: bits for name in names if not exempt or name not in edges(names)}


def learner(
    model: nn.Module,
    variables: Variables,
    images: Any,
    method: Method,
    recipe: Recipe,
    *,
    distillation: Distillation | None = None,
    teacher: nn.Module | None = None,
    rules: Sequence[qj.RangeRule] = (),
    exempt: bool = True,
) -> Learner:
    """The functions of one method.

    Args:
      variables, images: of any seed; for shapes.
      distillation: what is learned from a teacher, whose variables ``start`` is given.
      teacher: the teacher's module; None for the model itself.
      rules: of which ``start`` is told one, in place of the method's own.
      exempt: whether the first and the last layer stay at 8 bits.
    """
    scheme = method.scheme(weight_bits=8, activation_bits=8)
    plan = plan_for(model, variables, images[:1], scheme, exempt=exempt)
    training_mode, inference = _functions(model)
    quantized = qj.fake_quantize(training_mode, plan)
    served = jax.jit(qj.fake_quantize(inference, plan))
    calibrated = _calibration(plan, inference, rules, exempt=exempt)
    optimizer = _optimizer(method, recipe)
    in_float = (teacher or model).apply

    def start(
        variables: Variables,
        images: Any,
        bits: Any,
        *,
        activation_bits: Any = None,
        rule: int = 0,
        mask: Any = None,
        teacher_variables: Any = None,
    ) -> QatState:
        params = variables["params"]
        if mask is not None:
            params = qj.apply_mask(params, mask)
        now = {**variables, "params": params}
        activation_bits = bits if activation_bits is None else activation_bits
        qstate = calibrated(now, images[: recipe.calibration], (bits, activation_bits, rule))
        if "rate" in _theta_names(qstate):
            qstate = training.with_parameter(qstate, "rate", recipe.noise_rate)
        with jax.numpy_dtype_promotion("standard"):
            initial = optimizer.init((params, qstate))
        batch_stats = variables["batch_stats"]
        return QatState(params, batch_stats, qstate, initial, jnp.int32(0), mask, teacher_variables)

    def loss(
        trained: Any, state: QatState, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        params, qstate = trained
        if state.mask is not None:
            params = qj.apply_mask(params, state.mask)
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, batch_stats = quantized(qstate, variables, images, key=key)
        if distillation is None:
            cost = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        else:
            soft = jnp.asarray(jax.lax.stop_gradient(in_float(state.teacher, images)))
            cost = qj.kd_loss(logits, soft, labels, **distillation._asdict())
        if "width" in method.learned or method.name == "differentiable quantization":
            sizes = sum(plan_entries(plan).values())
            cost += recipe.size_penalty * training.weight_bits_total(plan, qstate) / sizes
        return cost, batch_stats

    def step(
        state: QatState, batch: Any, key: jax.Array
    ) -> tuple[QatState, Mapping[str, jax.Array]]:
        images, labels = batch
        if method.name == "error decay":
            sharpness = training.error_decay(recipe.steps)(state.steps_done)
            qstate = training.with_parameter(state.qstate, "sharpness", sharpness)
            state = state._replace(qstate=qstate)
        trained = state.params, state.qstate
        (cost, batch_stats), gradient = jax.value_and_grad(loss, has_aux=True)(
            trained, state, images, labels, key
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, trained)
            params, qstate = optax.apply_updates(trained, updates)
        after = state._replace(
            params=params,
            batch_stats=batch_stats,
            qstate=qstate,
            optimizer=optimizer_state,
            steps_done=state.steps_done + 1,
        )
        return after, {"loss": cost}

    def evaluate(state: QatState, images: Any, labels: Any) -> float:
        qstate, params = state.qstate, state.params
        if state.mask is not None:
            params = qj.apply_mask(params, state.mask)
        if "rate" in _theta_names(qstate):
            qstate = training.with_parameter(qstate, "rate", 1.0)
        variables = {"params": params, "batch_stats": state.batch_stats}
        run = lambda x: served(qstate, variables, x, key=jax.random.key(0))  # noqa: E731
        return accuracy(run, images, labels)

    return Learner(start, step, evaluate, plan)


def accuracy(run: Callable[[Any], jax.Array], images: Any, labels: Any) -> float:
    """Share of correct predictions, in 0..1."""
    correct = sum(
        int((run(images[i : i + CHUNK]).argmax(-1) == labels[i : i + CHUNK]).sum())
        for i in range(0, len(labels), CHUNK)
    )
    return correct / len(labels)


def plan_entries(plan: qj.Plan) -> dict[str, int]:
    """Entries of each quantized weight."""
    return {
        entry.site.name: math.prod(operand.operand.shape)
        for entry in plan.quantized
        for operand in entry.quantized
        if operand.is_weight
    }


def _functions(model: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model as it trains, with its new batch statistics, and as it is served."""

    def training_mode(variables: Any, x: Any) -> Any:
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    return training_mode, lambda variables, x: model.apply(variables, x)


def _calibration(
    plan: qj.Plan, f: Callable[..., Any], rules: Sequence[qj.RangeRule], *, exempt: bool
) -> Callable[..., Any]:
    """``(variables, images, (weight_bits, activation_bits, rule)) -> qstate``.

    Compiled once for all widths, rules and seeds: each of them is an array.
    """
    observe = jax.jit(qj.observe(f, plan))
    stack = qj.ranges.stack(rules) if rules else None

    @jax.jit
    def derive(state: Any, variables: Any, cell: Any) -> Any:
        weights, activations, rule = cell
        return qj.calibrate(
            plan,
            state,
            variables,
            weight_bits=inner_bits(plan, weights, exempt=exempt),
            activation_bits=inner_bits(plan, activations, exempt=exempt),
            rule=None if stack is None else stack[rule],
        )

    def calibrated(variables: Variables, images: Any, cell: Any) -> Any:
        state = qj.init(plan)
        for i in range(0, len(images), 256):
            _, state = observe(state, variables, images[i : i + 256])
        weights, activations, rule = cell
        widths = jnp.float32(weights), jnp.float32(activations)
        return derive(state, variables, (*widths, jnp.int32(rule)))

    return calibrated


def _theta_names(qstate: Any) -> frozenset[str]:
    return frozenset(
        name
        for operands in qstate.values()
        for qparams in operands.values()
        for name in (qparams.theta or {})
    )


def _optimizer(method: Method, recipe: Recipe) -> optax.GradientTransformation:
    cosine = optax.cosine_decay_schedule(1.0, recipe.steps)

    def decayed(rate: float) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(lambda count: rate * cosine(count))

    weights = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(recipe.weight_decay),
        decayed(recipe.rate),
    )
    relative = optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(min_scale=1e-6),
        decayed(recipe.relative_rate),
    )
    plain = optax.chain(optax.scale_by_adam(), decayed(10 * recipe.relative_rate))
    own = {name: plain if name == "log2_threshold" else relative for name in method.learned}
    parts = training.by_part(
        weights=weights,
        scale=relative if method.learns_scale else None,
        zero_point=plain if method.learns_scale else None,
        theta=own or None,
    )
    positive = tuple(n for n in method.learned if n in ("clip", "center", "distance"))
    bounds = [training.keep_positive(names=positive)]
    if "alpha" in method.learned:
        bounds.append(training.keep_between(0.02, 0.5, names=("alpha",)))
    return optax.chain(parts, *bounds)
