"""Run with eight simulated devices: statistics of a batch spread over them are those of one.

A program of its own, because a process has its devices for life; ``test_devices`` starts it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax import statistics
from quantjax.statistics import Statistics, as_integer
from tests.devices import DEVICES, run_all
from tests.models import assert_same_bits

ROWS, BATCHES, BINS = 16, 3, 64
GROUPS = [(1, 1), (1, 3)]  # 3 groups along 7 have a shorter last one
GENERATOR = np.random.default_rng(0)
# Batches of growing size, so that the histogram widens; the mask leaves one device without values.
X = GENERATOR.normal(size=(BATCHES, ROWS, 7)).astype(np.float32)
X *= np.float32([1, 30, 0.5])[:, None, None]
MASK = GENERATOR.random((BATCHES, ROWS, 1)) < 0.6
MASK[:, :2] = False
EVERYTHING = np.ones_like(MASK)


def start(groups=(1, 1)) -> Statistics:
    return statistics.init(groups, averaging_constant=0.25, histogram_bins=BINS)


def updated(state, x, where, axis_name=None) -> Statistics:
    return statistics.update(state, x, where=where, axis_name=axis_name)


def collected(update, groups, masks) -> Statistics:
    state = start(groups)
    for x, mask in zip(X, masks, strict=True):
        state = update(state, x, mask)
    return state


@functools.cache
def on_one(groups, *, masked=True) -> Statistics:
    return collected(jax.jit(updated), groups, MASK if masked else EVERYTHING)


def mesh_of(*shape) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp")[: len(shape)])


def on_all(mesh, update, axes=("data",)):
    """``shard_map`` of an update: each device has the state, and its part of the batch."""
    specs = P(), P(axes), P(axes)
    return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=specs, out_specs=P()))


def same(got, want) -> None:
    """The same bits, but for the last places of moments, which are sums; on every device."""
    for leaf in jax.tree.leaves(got):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(first, other)
    assert_same_bits(got._replace(moments=None), want._replace(moments=None))
    for moment, expected in zip(got.moments, want.moments, strict=True):
        size = float(np.abs(expected).max())
        np.testing.assert_allclose(moment, expected, rtol=1e-5, atol=1e-6 * size)


def jit_splits_a_sharded_batch() -> None:
    rows = NamedSharding(mesh_of(DEVICES), P("data"))
    spread = jax.jit(updated)

    def update(state, x, mask):
        x, mask = jax.device_put((x, mask), rows)
        assert x.addressable_shards[0].data.shape[0] == ROWS // DEVICES
        return spread(state, x, mask)

    for groups in GROUPS:
        same(collected(update, groups, MASK), on_one(groups))


def shard_map_has_the_statistics_of_the_whole_batch() -> None:
    update = on_all(mesh_of(DEVICES), functools.partial(updated, axis_name="data"))
    for groups in GROUPS:
        found = collected(update, groups, MASK)
        assert len(found.batches.sharding.device_set) == DEVICES
        same(found, on_one(groups))


def shard_map_counts_all_devices_without_a_mask() -> None:
    update = on_all(
        mesh_of(DEVICES), lambda state, x, _: statistics.update(state, x, axis_name="data")
    )
    found = collected(update, (1, 3), EVERYTHING)
    assert as_integer(found.number).tolist() == [[BATCHES * ROWS * k for k in (3, 3, 1)]]
    same(found, on_one((1, 3), masked=False))


def a_batch_is_spread_over_two_mesh_axes() -> None:
    axes = ("data", "fsdp")
    update = on_all(mesh_of(4, 2), functools.partial(updated, axis_name=axes), axes)
    same(collected(update, (1, 3), MASK), on_one((1, 3)))


def one_nan_on_one_device_is_on_all() -> None:
    update = on_all(mesh_of(DEVICES), functools.partial(updated, axis_name="data"))
    for row in (0, 5, ROWS - 1):
        x = X[0].copy()
        x[row, 4] = np.nan
        found = update(start((1, 7)), x, EVERYTHING[0])
        for ends in (found.extremes, found.moving):
            broken = np.isnan(np.stack([ends.low, ends.high])).reshape(2, 7)
            assert broken.tolist() == [[column == 4 for column in range(7)]] * 2
        assert np.isnan(found.moments.mean[0]).tolist() == [column == 4 for column in range(7)]


def shards_seen_apart_merge_to_the_whole() -> None:
    update = jax.jit(updated)
    groups, shards = (1, 3), []
    for part in np.split(np.arange(ROWS), DEVICES):
        state = start(groups)
        for x, mask in zip(X, MASK, strict=True):
            state = update(state, x[part], mask[part])
        shards.append(state)
    merged = functools.reduce(jax.jit(statistics.merge_unordered), shards)
    some = MASK.reshape(BATCHES, DEVICES, -1).any(-1)
    assert not some[:, 0].any()
    assert int(merged.batches) == some.sum()
    same(merged, on_one(groups)._replace(batches=merged.batches, moving=start(groups).moving))


def observing_inside_shard_map_is_observing_the_whole_batch() -> None:
    # Small integers: every sum is exact, in whatever order, so that all activations are the same.
    shapes = {"a": (7, 8), "b": (8, 5)}
    params = {
        name: jnp.asarray(GENERATOR.integers(-3, 4, shape), jnp.float32)
        for name, shape in shapes.items()
    }
    inputs = jnp.asarray(GENERATOR.integers(-9, 10, (ROWS, 7)), jnp.float32)

    def f(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    plan = qj.plan(qj.uniform_policy(weight_bits=8, activation_bits=8), qj.sites(f, params, inputs))
    state, mesh = qj.init(plan, histogram_bins=BINS), mesh_of(DEVICES)

    def masked(observing):
        return lambda state, params, x, mask: observing(state, params, x, where=mask)

    single = jax.jit(masked(qj.observe(f, plan)))
    sharded = jax.jit(
        jax.shard_map(
            masked(qj.observe(f, plan, axis_name="data")),
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=(P("data"), P()),
        )
    )
    want, got = state, state
    for scale, mask in zip((1.0, 16.0, 0.5), MASK[..., 0], strict=True):
        y, want = single(want, params, inputs * scale, mask)
        y_8, got = sharded(got, params, inputs * scale, mask)
        assert_same_bits(np.asarray(y_8), np.asarray(y))
    assert len(want) == 2
    for site, operands in want.items():
        assert operands.keys() == got[site].keys()
        for key, seen in operands.items():
            assert int(as_integer(seen.number).sum()) > 0
            same(got[site][key], seen)
    calibrated = [qj.calibrate(plan, seen, params) for seen in (got, want)]
    assert_same_bits(*(jax.tree.map(np.asarray, found) for found in calibrated))


CASES = {
    case.__name__: case
    for case in (
        jit_splits_a_sharded_batch,
        shard_map_has_the_statistics_of_the_whole_batch,
        shard_map_counts_all_devices_without_a_mask,
        a_batch_is_spread_over_two_mesh_axes,
        one_nan_on_one_device_is_on_all,
        shards_seen_apart_merge_to_the_whole,
        observing_inside_shard_map_is_observing_the_whole_batch,
    )
}


if __name__ == "__main__":
    run_all(CASES)
