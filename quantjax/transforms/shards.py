"""``qj.merge_states``: shards that were observed apart."""

from __future__ import annotations

from quantjax import errors, statistics
from quantjax.transforms.observe import State


def merge_states(left: State, right: State) -> State:
    """The state of all that both have seen, without moving averages, which start anew.

    Counts, extremes and histograms are exactly those of one device that sees everything.

    Args:
      left, right: of one plan; more than two are merged in any order.

    Raises:
      CalibrationError: states of different plans.
      StatisticsError: other granularities, or histograms of other sizes.

    >>> import jax.numpy as jnp
    >>> seen = statistics.update(statistics.init((1,)), jnp.array([1.0, 3.0]))
    >>> state = {"w": {"activation": seen}}
    >>> int(merge_states(state, state)["w"]["activation"].batches)
    2
    """
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
