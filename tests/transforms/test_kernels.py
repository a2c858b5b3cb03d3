"""Of many sites that are alike, XLA compiles one: kernels that do the same are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import quantjax as qj

SITES = 3, 6


def chain(params: Any, x: jax.Array) -> jax.Array:
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def kernels(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """What is compiled for CPUs, without names of instructions and where they are from."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    found = set()
    for computation in text.split("\n\n"):
        if re.match(r"\s*%?(fused|wrapped)", computation):
            names: dict[str, str] = {}
            body = re.sub(r", metadata=\{[^}]*\}", "", computation)
            found.add(
                re.sub(
                    r"%[\w.\-]+|\b[a-z][\w\-]*\.[\w.\-]+",
                    lambda name, names=names: names.setdefault(name[0], f"%{len(names)}"),
                    body,
                )
            )
    return found


def compiled(verb: str, sites: int) -> set[str]:
    keys = jax.random.split(jax.random.key(0), sites)
    params = [jax.random.normal(key, (32, 32)) for key in keys]
    x = jnp.ones((8, 32))
    policy = qj.uniform_policy(weight_bits=8, activation_bits=8)
    plan = qj.plan(policy, qj.sites(chain, params, x))
    state = qj.init(plan)
    if verb == "observe":
        return kernels(qj.observe(chain, plan), state, params, x)
    _, state = qj.observe(chain, plan)(state, params, x)
    rules = {"min_max": qj.ranges.MIN_MAX, "percentile": qj.ranges.percentile(0.99)}
    if verb in rules:
        rule = rules[verb]
        return kernels(lambda s, p: qj.calibrate(plan, s, p, rule=rule), state, params)
    qstate = qj.calibrate(plan, state, params)
    if verb == "freeze":
        return kernels(lambda q, p: qj.freeze(plan, q, p), qstate, params)
    if verb == "execute":
        qparams = qj.freeze(plan, qstate, params)
        return kernels(qj.execute(chain, plan), qstate, qparams, x)
    loss = lambda p, q: qj.fake_quantize(chain, plan)(q, p, x).sum()  # noqa: E731
    return kernels(loss if verb == "simulate" else jax.grad(loss), params, qstate)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "verb", ["observe", "min_max", "percentile", "freeze", "simulate", "gradients", "execute"]
)
def test_sites_that_are_alike_share_their_kernels(verb):
    few, many = (compiled(verb, sites) for sites in SITES)
    # Some have the number of sites or of all groups in them; three more sites have none of theirs.
    assert len(many) - len(few) < SITES[1] - SITES[0], sorted(many - few)
    assert len(few) > 3
