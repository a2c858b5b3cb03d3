"""``qj.sites``: the table of a model's products; and how a plan finds them again."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from quantjax import errors
from quantjax.arguments import expect, expect_function
from quantjax.interpreter import Program, Site, SiteStatus, leaves_by_path, trace
from quantjax.interpreter.trace import Function
from quantjax.planning import Plan, first_difference, site_text
from quantjax.printing import shape_text
from quantjax.qtensor import floats_expected
from quantjax.table import SiteTable


def sites(f: Function, params: Any, *inputs: Any) -> SiteTable:
    """Trace ``f(params, *inputs)`` and list its products; no arithmetic is done.

    Weights are found by dataflow from ``params``, and name their sites by the path of the parameter
    that flows in. Parameters that ``f`` closes over have no name.

    Args:
      f: any JAX function of ``(params, *inputs)``.
      params: the tree that holds the weights.
      inputs: arrays or ``jax.ShapeDtypeStruct``, by position, here and in all verbs: of a model
        that takes more by keyword, give ``lambda params, x: f(params, x, train=True)``.

    Raises:
      ArgumentError: ``f`` is no function, or a module of Flax; parameters that are frozen.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((4, 2))}}
    >>> table = sites(lambda p, x: x @ p["dense"]["kernel"], params, jnp.ones((3, 4)))
    >>> [(site.name, site.op.value, site.multiply_adds) for site in table]
    [('dense/kernel', 'dot_general', 24)]
    """
    expect_function(f, where="qj.sites", fix="qj.sites(f, params, x)")
    with floats_expected(params, where="qj.sites"):
        program = trace(f, params, *inputs)
    shapes = tuple((path, np.shape(leaf)) for path, leaf in leaves_by_path(params).items())
    found = tuple(program.sites.values())
    return SiteTable(found, program.weights, program.others, shapes, program.biases)


def check_arguments(f: Function, plan: Plan, *, verb: str) -> None:
    """Raise ``ArgumentError`` unless they are a function and a plan, in this order."""
    where, fix = f"qj.{verb}", f"qj.{verb}(f, plan), plan = qj.plan(policy, qj.sites(f, params, x))"
    expect_function(f, where=where, fix=fix)
    expect(plan, Plan, argument="plan", where=where, fix=fix)


def check_given(f: Function, inputs: tuple[Any, ...], *, verb: str, **given: Any) -> None:
    """Raise ``ArgumentError`` where a keyword of a verb is one that the function has as well, and
    the inputs have not bound: a model's own ``key`` or ``where`` would go to the verb, unseen."""
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return
    try:
        # A wrapper that binds a keyword shows its own signature; jitted functions have none.
        signature = inspect.signature(f, follow_wrapped=not inspect.isfunction(f))
        bound = signature.bind_partial(None, *inputs).arguments
    except (TypeError, ValueError):  # no signature, or other arguments than it takes: said later
        return
    for name in names:
        parameter = signature.parameters.get(name)
        if parameter is None or name in bound:
            continue
        default = parameter.default
        if (
            default is None or default is inspect.Parameter.empty
        ):  # a partial has bound it otherwise
            raise errors.ArgumentError(
                f"{name}= is the verb's own, and the function has an argument of that name, too",
                where=f"qj.{verb}(f, plan)(..., {name}=...)",
                why="inputs of the function are given by position",
                fix=f"lambda params, x, own: f(params, x, {name}=own), for f",
            )


def check_plan(plan: Plan, *, verb: str) -> None:
    """Raise ``ArgumentError`` unless it is a plan."""
    fix = "plan = qj.plan(policy, qj.sites(f, params, x))"
    expect(plan, Plan, argument="plan", where=f"qj.{verb}", fix=fix)


def check_program(plan: Plan, program: Program) -> None:
    """Raise ``PlanMismatchError`` unless the program has the planned sites and no others."""
    found = {site.name: site for site in program.sites.values()}
    again = "plan again: qj.plan(policy, qj.sites(f, params, x))"
    difference = first_difference((entry.site for entry in plan.sites), found.values())
    if difference is not None:
        raise _mismatch(*difference, again)
    for entry in plan.sites:
        planned = entry.site
        has_bias = planned.bias is not None, found[planned.name].bias is not None
        if (entry.after or entry.bias) and has_bias[0] != has_bias[1]:
            raise errors.PlanMismatchError(
                "the bias behind the product is not as it was planned",
                where=f"site {planned.name} ({planned.op.value})",
                why=f"planned {'with' if has_bias[0] else 'without'} one; outputs are quantized "
                "behind it, and a product that is used elsewhere as well has none",
                fix=again,
            )
        if not _same_derivation(planned, found[planned.name]):
            raise errors.PlanMismatchError(
                "the weight is computed otherwise than it was planned",
                where=f"site {planned.name} ({planned.op.value})",
                why="the function does something else with the parameter, or a constant that it "
                "closes over has changed",
                fix=f"{again}; pass what changes in params or as an input",
            )


def _mismatch(planned: Site | None, found: Site | None, fix: str) -> errors.PlanMismatchError:
    if planned is None:
        assert found is not None
        return errors.PlanMismatchError(
            "the program has a site that was not planned",
            where=f"site {found.name} ({found.op.value}) of shape {shape_text(found.out_shape)}",
            why="a site without a plan would stay in float unnoticed",
            fix=fix,
        )
    where = f"site {planned.name} ({planned.op.value})"
    if found is None:
        return errors.PlanMismatchError(
            "the program has no such site",
            where=where,
            why="the function takes another path than the one that was planned",
            fix=fix,
        )
    return errors.PlanMismatchError(
        "the site is not the one that was planned",
        where=where,
        why=f"planned with {site_text(planned)}, found {site_text(found)}"
        + "".join(f"; {s.reason}" for s in (planned, found) if s.status is SiteStatus.OPAQUE),
        fix=fix,
    )


def _same_derivation(planned: Site, found: Site) -> bool:
    """Whether calibration, which reads the plan, and the program mean the same weight."""
    first, other = planned.weight, found.weight
    if first is None or other is None:
        return True
    traced = "tracer" in first.constants or "tracer" in other.constants
    return first.recipe == other.recipe and (traced or first.constants == other.constants)
