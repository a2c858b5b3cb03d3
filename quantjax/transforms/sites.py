"""``qj.sites``: the table of a model's products; and how a plan finds them again."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantjax import errors
from quantjax.interpreter import Program, Role, Site, leaves_by_path, trace
from quantjax.interpreter.trace import Function
from quantjax.planning import Plan, SiteTable
from quantjax.printing import shape_text


def sites(f: Function, params: Any, *inputs: Any) -> SiteTable:
    """Trace ``f(params, *inputs)`` and list its products; no arithmetic is done.

    Weights are found by dataflow from ``params``, and name their sites by the path of the parameter
    that flows in. Parameters that ``f`` closes over have no name.

    Args:
      f: any JAX function of ``(params, *inputs)``.
      params: the tree that holds the weights.
      inputs: arrays or ``jax.ShapeDtypeStruct``.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((4, 2))}}
    >>> table = sites(lambda p, x: x @ p["dense"]["kernel"], params, jnp.ones((3, 4)))
    >>> [(site.name, site.op.value, site.multiply_adds) for site in table]
    [('dense/kernel', 'dot_general', 24)]
    """
    program = trace(f, params, *inputs)
    shapes = tuple((path, np.shape(leaf)) for path, leaf in leaves_by_path(params).items())
    return SiteTable(tuple(program.sites.values()), program.weights, shapes)


def check_program(plan: Plan, program: Program) -> None:
    """Raise ``PlanMismatchError`` unless the program has the planned sites and no others."""
    found = {site.name: site for site in program.sites.values()}
    again = "plan again: qj.plan(policy, qj.sites(f, params, x))"
    for entry in plan.sites:
        planned = entry.site
        site = found.pop(planned.name, None)
        if site is None:
            raise errors.PlanMismatchError(
                "the program has no such site",
                where=f"site {planned.name} ({planned.op.value})",
                why="the function takes another path than the one that was planned",
                fix=again,
            )
        if _outline(planned) != _outline(site):
            raise errors.PlanMismatchError(
                "the site is not the one that was planned",
                where=f"site {planned.name} ({planned.op.value})",
                why=f"planned with {_text(planned)}, found {_text(site)}",
                fix=again,
            )
    if found:
        site = next(iter(found.values()))
        raise errors.PlanMismatchError(
            f"the program has {len(found)} sites that were not planned",
            where=f"site {site.name} ({site.op.value}) of shape {shape_text(site.out_shape)}",
            why="a site without a plan would stay in float unnoticed",
            fix=again,
        )


def _outline(site: Site) -> tuple[Any, ...]:
    """What a plan relies on: all but the sizes of activations."""
    operands = [
        (o.key, o.side, o.free, o.contracted, o.window, o.shape if o.role is Role.WEIGHT else None)
        for o in site.operands
    ]
    return site.op, site.status, *operands


def _text(site: Site) -> str:
    operands = ", ".join(f"{o.key} {shape_text(o.shape)}" for o in site.operands)
    return f"{site.op.value} of {operands} ({site.status.value})"
