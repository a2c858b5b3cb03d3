"""``qj.tap``: what the products of a model return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from quantjax import errors
from quantjax.arguments import expect, expect_function
from quantjax.interpreter import (
    NOTHING,
    Outcome,
    ProgramCache,
    SiteStatus,
    Visit,
    evaluate,
)
from quantjax.interpreter.trace import Function
from quantjax.qtensor import floats_expected
from quantjax.selectors import Selector


def tap(f: Function, selector: Selector) -> Callable[..., dict[str, Float[Array, "..."]]]:
    """``tap(f, selector)(params, *inputs) -> {site: output}``: intermediate values, for
    distillation or to cache features.

    The model runs in float, as it is; works under ``jit``, ``vmap``, ``grad``. What the taps do not
    need is not computed under ``jit``. The quantized model is tapped by quantizing the taps, with
    the same plan: ``qj.fake_quantize(qj.tap(f, selector), plan)(qstate, params, *inputs)``.

    Args:
      selector: which sites, as in a rule.

    Returns (of the returned function):
      The output of each selected site, before a bias is added. A site in a scan has a leading axis
      for each scan around it, outermost first; of a ``while``, the last iteration; NaN where a
      branch was not taken.

    Raises (of the returned function):
      ArgumentError: parameters that are frozen.
      PolicyError: the selector matches no site.
      OpaqueSiteError: it matches a site that the interpreter cannot enter.

    >>> import jax.numpy as jnp, quantjax as qj
    >>> f = lambda p, x: jnp.tanh(x @ p["w"]).sum()
    >>> taps = qj.tap(f, qj.path("w"))({"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]]))
    >>> {name: out.tolist() for name, out in taps.items()}
    {'w': [[1.0, 2.0]]}
    """
    example = 'qj.tap(f, qj.path("*/Dense_0/*"))'
    expect_function(f, where="qj.tap", fix=example)
    expect(selector, Selector, argument="selector", where="qj.tap", fix=example)
    programs = ProgramCache(f)

    def tapping(params: Any, *inputs: Any) -> dict[str, jax.Array]:
        with floats_expected(params, where="qj.tap"):
            program = programs(params, *inputs)
        rows = tuple(program.sites.values())
        chosen = selector.resolved(rows)
        matched = [site for site in rows if chosen.matches(site)]
        if not matched:
            names = ", ".join(site.name for site in list(program.sites.values())[:8])
            raise errors.PolicyError(
                f"the selector '{selector}' matches no site",
                where=f"sites: {names or 'none: the function has no product'}",
                fix="a selector that fits a name above"
                if names
                else "a function that multiplies: x @ w, lax.dot_general or a convolution",
            )
        for site in matched:
            if site.status is SiteStatus.OPAQUE and site.loops:
                raise errors.OpaqueSiteError(
                    "a site that cannot be entered cannot be tapped",
                    where=f"site {site.name} ({site.op.value})",
                    why=site.reason,
                    fix="a selector without it, or move the product out of that container",
                )

        def handler(visit: Visit) -> Outcome:
            out = visit.product.bind(visit.lhs, visit.rhs)
            return Outcome(out, record=out)

        handled = frozenset(site.name for site in matched)
        outputs = evaluate(program, handler, handled, NOTHING, params, *inputs, collect=True)
        return {site.name: outputs.records[site.name] for site in matched}

    return tapping
