"""Every error that quantjax raises: what happened, where, why, and one edit to try.

All of them derive from :class:`QuantjaxError`, so ``except qj.errors.QuantjaxError`` catches what
the library says on purpose and nothing else. Each class docstring is a failing example and its fix.
"""

from __future__ import annotations

from typing import Any


class QuantjaxError(Exception):
    """Base of all errors; the message has four parts, each on a line of its own.

    Args:
      what: the failure, in one sentence.
      where: site, op, role and shapes; left out where the call has no site.
      why: the cause, where it is not plain from ``what``.
      fix: one edit to try.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [what]
        parts += [f"  where: {where}"] if where else []
        parts += [f"  why:   {why}"] if why else []
        parts += [f"  try:   {fix}"]
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made again of their text alone; a pool of processes hung on that.
        parts = self.what, self.where, self.why, self.fix
        return _again, (type(self), *parts), self.__dict__


def _again(kind: type[QuantjaxError], what: str, where: str, why: str, fix: str) -> QuantjaxError:
    return kind(what, where=where, why=why, fix=fix)


class ArgumentError(QuantjaxError, TypeError):
    """An argument of another kind than the function takes.

    ``qj.plan(qj.Scheme(...), table)`` fails, since a plan is made of a policy. Pass
    ``qj.Policy([qj.rule(qj.weighted(), scheme)])``.
    """


class FormatError(QuantjaxError, ValueError):
    """A number format that cannot exist.

    ``qj.integer(max_bits=17)`` fails: containers go up to 16 bits. Use ``qj.integer(max_bits=16)``.
    """


class BitsError(QuantjaxError, ValueError):
    """A width that the format's container cannot hold.

    ``qj.calibrate(plan, state, params, weight_bits=9.0)`` fails for a plan of 8-bit containers.
    Plan with ``qj.integer(max_bits=16)``, or ask for 0 (bypass) to 8 bits.
    """


class KeyMissingError(QuantjaxError, ValueError):
    """A random rounding without a key.

    ``qj.fake_quant(x, 0.1, rounding=qj.rounding.STOCHASTIC)`` fails: randomness comes from explicit
    keys only. Pass ``key=jax.random.key(0)``.
    """


class GranularityError(QuantjaxError, ValueError):
    """Axes that cannot share a scale in the way that was asked for.

    ``qj.PerGroup(48)`` fails on 64 contracted channels: 48 does not divide 64. Use
    ``qj.PerGroup(32)``.
    """


class QuantizerError(QuantjaxError, ValueError):
    """A quantizer whose parts contradict one another.

    ``qj.activation_quantizer(granularity=qj.PerToken())`` with a fixed range fails, since the
    number of tokens changes from call to call. Ask for ``range=qj.RangeMode.LIVE``.
    """


class PolicyError(QuantjaxError, ValueError):
    """A policy that does not fit the model.

    ``qj.rule(qj.path("*/Densee_0/*"), scheme)`` matches nothing and fails at ``qj.plan``. Correct
    the pattern, or pass ``optional=True``.
    """


class OpaqueSiteError(PolicyError):
    """A rule whose every match lies where the interpreter does not rewrite.

    A rule for a product inside a ``custom_vjp`` fails at ``qj.plan``. Exempt the site, or call the
    product outside the ``custom_vjp``.
    """


class PlanMismatchError(QuantjaxError, ValueError):
    """Parameters or a program other than those that were planned for.

    ``qj.fake_quantize(f, plan)(qstate, other_params, x)`` fails where a planned weight is missing
    or has another shape. Plan again: ``qj.plan(policy, qj.sites(f, other_params, x))``.
    """


class CalibrationError(QuantjaxError, ValueError):
    """QParams that cannot be derived, or were not.

    ``qj.calibrate(plan, qj.init(plan), params)`` fails: nothing was observed. Run
    ``y, state = qj.observe(f, plan)(state, params, x)`` first.
    """


class DataError(QuantjaxError, ValueError):
    """Values that no range can be derived from: NaN, infinity, no value at all, odd shapes.

    ``qj.observe(f, plan)(state, params, x)`` with a NaN in ``x`` fails. Remove the sample, or mask
    it with ``where=``.
    """


class FreezeError(QuantjaxError, ValueError):
    """Weights that cannot be stored as codes, or codes that cannot be executed.

    ``qj.freeze(plan, qstate, params)`` fails where two sites have one parameter in different codes.
    Plan both with one quantizer, or keep one of them in float.
    """


class StatisticsError(QuantjaxError, ValueError):
    """Statistics combined in a way that has no meaning.

    ``qj.statistics.merge(a, b)`` fails when both hold a moving average, which depends on order.
    Use ``qj.statistics.merge_unordered(a, b)``, which drops it.
    """


class SiteError(QuantjaxError, ValueError):
    """Sites that cannot be told apart, or a rewritten equation that does not keep its own type.

    ``{"a": {"b": w}, "a/b": v}`` fails: both leaves have the path ``a/b``. Rename one.
    A handler that returns bfloat16 where the model has float32 fails. Cast the result to the
    equation's own dtype.
    """


class SweepError(QuantjaxError, ValueError):
    """A sweep that cannot run as stated.

    ``run_cells(..., memory_budget_bytes=1)`` fails: one cell alone needs more. Raise the budget or
    evaluate fewer images per call.
    """


class ModelError(QuantjaxError, ValueError):
    """A model that does not run on the data.

    ``quantjax calibrate model data.npy`` fails where the model branches on its inputs in Python,
    or takes another shape. Write ``jnp.where`` or ``jax.lax.cond``, or give batches of its shape.
    """


class UnknownNameError(QuantjaxError, ValueError):
    """A name that stands for no model, data set or study.

    ``quantjax calibrate digitz digits`` fails: nothing of that name is registered. Use one that the
    message lists, ``module:object``, or the path of a file.
    """


class NotFoundError(QuantjaxError, KeyError):
    """A table, plan or report without the row that is asked for.

    ``plan["params/Dense_0/kernal"]`` fails: the site is ``params/Dense_0/kernel``. Use that name,
    which the message has.
    """

    __str__ = Exception.__str__  # a KeyError shows its text as Python would write it


class DistillationError(QuantjaxError, ValueError):
    """A distillation that has no meaning.

    ``qj.kd_loss(s, t, temperature=0.0)`` fails: logits are divided by it. Use ``temperature=4.0``.
    """


class EstimatorError(QuantjaxError, ValueError):
    """A gradient estimator without what it needs.

    ``qj.fake_quant(x, 0.1, estimator=qj.estimators.PACT)`` fails: PACT learns a clip, which is in
    ``theta``. Use ``theta={"clip": 2.0}``, or ``qj.calibrate``, which starts it.
    """


class PruningError(QuantjaxError, ValueError):
    """A mask that cannot be made, or does not fit.

    ``qj.prune_mask(params, 0.4, structure=qj.pruning.NOfM(4))`` fails: of 4 weights 1.6 would have
    to go. Use a sparsity of 0.5.
    """


class TrainingError(QuantjaxError, ValueError):
    """Training of a quantized model that is set up in a way that cannot work.

    ``qj.training.by_part(scale=tx).init(params)`` fails: parameters have no scales. Use
    ``init(qstate)``, or ``init((params, qstate))``.
    """


class StorageError(QuantjaxError, ValueError):
    """A file that is not what it should be, or a value that cannot be written to one.

    ``qj.load_quantization("plan.json")`` fails where the file was written by a newer version, or
    names a rounding of the user's own. Upgrade quantjax, or pass ``extra=(my_rounding,)``.
    """


class AdapterError(QuantjaxError, ValueError):
    """A model of another library that is no pure function of its arrays.

    ``f(params, state, x)`` of ``adapters.nnx.functional(module)`` fails where the module creates
    its cache in the first call. Call ``module(x)`` once before ``functional``.
    """


class MissingPackageError(QuantjaxError, ImportError):
    """A package that only one function needs, and that is not installed.

    ``qj.sites(f, params, x).to_pandas()`` fails without pandas. ``pip install "quantjax[pandas]"``.
    """


class BackendError(QuantjaxError, RuntimeError):
    """A device whose compiler computes integer products wrongly.

    ``qj.execute`` fails on a GPU where ``XLA_FLAGS`` holds ``--xla_gpu_autotune_level=0``: XLA of
    JAX 0.11.2 then returns twice the sums. Take the flag out, or use ``qj.fake_quantize``.
    """
