"""Batches that are spread over devices, inside ``shard_map`` or ``vmap`` with a named axis."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import jax

AxisName = Hashable | tuple[Hashable, ...] | None
"""The mesh axes that the batch is spread over; None where it is not, or where XLA does it."""


def over_devices(reduce: Callable[..., jax.Array], x: jax.Array, axis_name: AxisName) -> jax.Array:
    """``reduce`` (``lax.psum``, ``lax.pmin``, ``lax.pmax``) over the named axes; ``x`` if none."""
    return x if axis_name is None else reduce(x, axis_name)
