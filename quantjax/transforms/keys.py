"""Random keys of the sites that round at random: one stream a site, a new key at each visit."""

from __future__ import annotations

from typing import NamedTuple

import jax

from quantjax import errors
from quantjax.arguments import expect_key
from quantjax.planning import Plan
from quantjax.site_plan import OperandPlan

Key = jax.Array
"""A key of ``jax.random``, typed or raw."""


class SiteKeys(NamedTuple):
    """Keys of one visit of a site; None where nothing in the plan is random.

    Attributes:
      after: the state that the next visit starts from.
      sides: of the left and right operand.
      output, bias: of what comes after the product.
    """

    after: Key | None
    sides: tuple[Key | None, Key | None]
    output: Key | None = None
    bias: Key | None = None


def is_random(operand: OperandPlan) -> bool:
    """Whether the simulated operand depends on a key."""
    quantizer = operand.quantizer
    return quantizer is not None and (quantizer.rounding.is_random or quantizer.estimator.is_random)


def site_keys(plan: Plan, key: Key | None) -> dict[str, Key]:
    """The state of each site that rounds at random: a key, one a layer where layers are stacked.

    Raises:
      KeyMissingError: there is such a site, and no key.
    """
    found: dict[str, Key] = {}
    for number, entry in enumerate(plan.quantized):
        random = [operand for operand in entry.quantized if is_random(operand)]
        if not random:
            continue
        if key is None:
            raise errors.KeyMissingError(
                "the plan rounds at random and was given no key",
                where=f"site {entry.site.name}, {random[0].key}",
                why="randomness comes from explicit keys only",
                fix="key=jax.random.key(0)",
            )
        expect_key(key, where=f"site {entry.site.name}, {random[0].key}")
        own = jax.random.fold_in(key, number)
        steps = entry.site.steps
        found[entry.site.name] = jax.random.split(own, steps) if steps else own
    return found


def split_keys(key: Key | None, steps: tuple[int, ...]) -> Key | None:
    """A key for each of several layers."""
    return jax.random.split(key, steps) if key is not None and steps else key


def next_keys(state: Key | None) -> SiteKeys:
    """The keys of one visit."""
    if state is None:
        return SiteKeys(None, (None, None))
    after, left, right, output, bias = (jax.random.fold_in(state, n) for n in range(5))
    return SiteKeys(after, (left, right), output, bias)
