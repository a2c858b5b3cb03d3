"""``qj.merge_states``: shards that were observed apart."""

from __future__ import annotations

from collections.abc import Mapping

from quantjax import errors, statistics
from quantjax.arguments import expect
from quantjax.statistics import Statistics
from quantjax.transforms.observe import State


def merge_states(left: State, right: State) -> State:
    """The state of all that both have seen, without moving averages, which start anew.

    Counts, extremes and histograms are exactly those of one device that sees everything.

    Args:
      left, right: of one plan; more than two are merged in any order.

    Raises:
      ArgumentError: a qstate, or nothing, in place of a state.
      CalibrationError: states of different plans.
      StatisticsError: other granularities, or histograms of other sizes.

    >>> import jax.numpy as jnp
    >>> seen = statistics.update(statistics.init((1,)), jnp.array([1.0, 3.0]))
    >>> state = {"w": {"activation": seen}}
    >>> int(merge_states(state, state)["w"]["activation"].batches)
    2
    """
    for state in (left, right):
        _check_state(state)
    sites = [{name: list(operands) for name, operands in state.items()} for state in (left, right)]
    if sites[0] != sites[1]:
        odd = sorted(set(left) ^ set(right)) or ["other operands"]
        raise errors.CalibrationError(
            "the two states are of different plans",
            where=f"site {odd[0]}",
            fix="observe all shards from state = qj.init(plan), with one plan",
        )
    return {
        name: {
            key: statistics.merge_unordered(seen, right[name][key])
            for key, seen in operands.items()
        }
        for name, operands in left.items()
    }


def _check_state(state: object) -> None:
    where, fix = "qj.merge_states", "y, state = qj.observe(f, plan)(qj.init(plan), params, x)"
    expect(state, Mapping, argument="a state", where=where, fix=fix)
    assert isinstance(state, Mapping)
    for operands in state.values():
        expect(operands, Mapping, argument="an entry of a state", where=where, fix=fix)
        for seen in operands.values():
            expect(seen, Statistics, argument="an entry of a state", where=where, fix=fix)
