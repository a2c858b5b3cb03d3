"""Run with eight simulated devices: meshes with explicit axes, which ``jax.make_mesh`` makes.

A program of its own, because a process has its devices for life; ``test_meshes`` starts it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import quantjax as qj
from tests.devices import DEVICES, run_all
from tests.models import assert_same_bits
from tests.transforms.grids_on_devices import cells_are_those_of_one_device

GENERATOR = np.random.default_rng(0)
X = jnp.asarray(GENERATOR.normal(size=(16, 8)), jnp.float32)
WHOLE = jnp.asarray(GENERATOR.integers(-9, 10, (16, 8)), jnp.float32)  # all sums are exact


@functools.cache
def mesh():
    """Made when it is needed: a process with one device imports this file, too."""
    made = jax.make_mesh((DEVICES // 2, 2), ("data", "model"))
    assert set(made.axis_types) == {AxisType.Explicit}
    return made


def weights(**shapes):
    return {k: jnp.asarray(GENERATOR.integers(-3, 4, s), jnp.float32) for k, s in shapes.items()}


def split(tree, *specs):
    """A tree over the mesh; dictionaries leaf by leaf, in order."""
    leaves, structure = jax.tree.flatten(tree)
    specs = specs * len(leaves) if len(specs) == 1 else specs
    put = [
        jax.device_put(leaf, NamedSharding(mesh(), s))
        for leaf, s in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(structure, put)


def two_layers(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def contracted(params, x):
    """Columns of the first weight, then rows of the second: its sum crosses devices."""
    h = jax.nn.relu(x @ params["a"])
    lies = jax.typeof(h).sharding
    rows = NamedSharding(lies.mesh, P("data")) if any(lies.spec) else None
    return jnp.einsum("bh,ho->bo", h, params["b"], out_sharding=rows)


def gathered(params, x):
    """Weights lie in parts and are put together before each product."""
    lies_on = jax.typeof(params["a"]).sharding.mesh
    if not lies_on.empty:
        params = jax.tree.map(lambda w: reshard(w, NamedSharding(lies_on, P())), params)
    return two_layers(params, x)


def stacked(params, x):
    """Layers of a scan, and a weight that all steps of another one share."""

    def layer(h, w):
        lies = jax.typeof(h).sharding
        out = NamedSharding(lies.mesh, lies.spec) if any(lies.spec) else None
        return jnp.einsum("bi,io->bo", h, w, out_sharding=out), None

    h = jax.lax.scan(layer, x, params["a"])[0]
    return jax.lax.scan(lambda h, _: (h @ params["b"], None), h, None, length=2)[0]


TWO = weights(a=(8, 16), b=(16, 8))
LAYERS = weights(a=(2, 8, 8), b=(8, 8))
MODELS = {
    "rows of a batch": (two_layers, TWO, (P(), P())),
    "columns, then rows": (contracted, TWO, (P(None, "model"), P("model"))),
    "gathered": (gathered, TWO, (P("data"), P("data", "model"))),
    "layers": (stacked, LAYERS, (P(None, None, "model"), P())),
}
WEIGHT = qj.weight_quantizer
POLICIES = {
    "W8A8": qj.uniform_policy(weight_bits=8, activation_bits=8),
    "groups of 4 bits": qj.uniform_policy(
        weight_bits=4, activation_bits=8, weight_granularity=qj.PerGroup(4)
    ),
    "live": qj.presets.w8a8_dynamic(),
}


def agree(got, want) -> None:
    """The same bits, wherever they lie."""
    assert_same_bits(*(jax.tree.map(np.asarray, tree) for tree in (got, want)))


def calibrated(plan, state, params):
    """In one program: a mesh's small ones take a second for each ten."""
    return jax.jit(functools.partial(qj.calibrate, plan))(state, params)


def observed(f, plan, params, x):
    return jax.jit(qj.observe(f, plan))(qj.init(plan), params, x)


def all_verbs(name, policy, ways=(jax.jit,)) -> None:
    """Observed, calibrated, simulated, frozen and executed: as on one device."""
    f, params, specs = MODELS[name]
    plan = qj.plan(policy, qj.sites(f, params, WHOLE))
    spread, rows = split(params, *specs), split(WHOLE, P("data"))
    assert qj.sites(f, spread, rows) == qj.sites(f, params, WHOLE)
    y, state = observed(f, plan, params, WHOLE)
    for run in ways:
        got, seen = run(qj.observe(f, plan))(qj.init(plan), spread, rows)
        agree(got, y)
        assert got.sharding.spec == P("data", None)
        for site, operands in state.items():
            for key, want in operands.items():
                agree(seen[site][key]._replace(moments=None), want._replace(moments=None))
    qstate = calibrated(plan, state, params)
    for run in ways:
        agree(run(functools.partial(qj.calibrate, plan))(seen, spread), qstate)
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, params, WHOLE)
    for run in ways:
        got = run(qj.fake_quantize(f, plan))(qstate, spread, rows)
        assert got.sharding.spec == P("data", None)
        agree(got, want)
    alone = jax.jit(functools.partial(qj.freeze, plan))(qstate, params)
    for run in ways:
        frozen = run(functools.partial(qj.freeze, plan))(qstate, spread)
    agree(frozen, alone)
    for path, whole in spread.items():
        kept = [axis for axis in whole.sharding.spec if axis]
        assert [axis for axis in frozen[path].stored.sharding.spec if axis] == kept, path
    agree(jax.jit(qj.execute(f, plan))(qstate, frozen, rows), want)
    agree(frozen["a"].dequantize(), alone["a"].dequantize())


def gradients_are_those_of_one_device() -> None:
    def loss(params, qstate, x, f, plan):
        return jnp.mean(qj.fake_quantize(f, plan)(qstate, params, x) ** 2)

    lsq = qj.Policy([qj.rule(qj.weighted(), qj.presets.lsq_plus())])
    for name in ("columns, then rows", "layers"):
        f, params, specs = MODELS[name]
        plan = qj.plan(lsq, qj.sites(f, params, X))
        qstate = calibrated(plan, observed(f, plan, params, X)[1], params)
        grad = jax.jit(jax.grad(functools.partial(loss, f=f, plan=plan), (0, 1)))
        want = grad(params, qstate, X)
        got = grad(split(params, *specs), qstate, split(X, P("data")))
        for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            size = float(np.abs(other).max()) + 1e-6
            np.testing.assert_allclose(one / size, other / size, atol=1e-4, err_msg=name)
        for path, whole in split(params, *specs).items():
            assert got[0][path].sharding.is_equivalent_to(whole.sharding, whole.ndim), (name, path)


def a_grid_of_widths_is_that_of_one_device() -> None:
    f, params, specs = MODELS["columns, then rows"]
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, WHOLE))
    state = observed(f, plan, params, WHOLE)[1]

    def cell(bits, params, x):
        qstate = qj.calibrate(plan, state, params, weight_bits=bits, activation_bits=bits)
        return qj.fake_quantize(f, plan)(qstate, params, x)

    def every(map_over, params, x):
        return map_over(lambda bits: cell(bits, params, x), jnp.array([2.0, 4.0, 8.0, 0.0]))

    mapped = functools.partial(every, jax.lax.map)
    together = functools.partial(every, lambda f, bits: jax.vmap(f)(bits))
    want = jax.jit(mapped)(params, WHOLE)
    spread, rows = split(params, *specs), split(WHOLE, P("data"))
    with jax.set_mesh(mesh()):
        for run in (mapped, together):
            agree(jax.jit(run)(spread, rows), want)


def steps_of_training_are_those_of_one_device() -> None:
    f, params, specs = MODELS["rows of a batch"]
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, X))
    qstate = calibrated(plan, observed(f, plan, params, X)[1], params)
    optimizer = optax.adam(1e-2)

    def trained(params, x):
        def loss(params):
            logits = qj.fake_quantize(f, plan)(qstate, params, x)
            return qj.kd_loss(logits, f(params, x), temperature=2.0) + jnp.mean(logits**2)

        def step(carry, _):
            params, inner = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, inner = optimizer.update(grads, inner)
            return (optax.apply_updates(params, updates), inner), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)

    (want, _), values = jax.jit(trained)(params, X)
    with jax.set_mesh(mesh()):
        (got, _), others = jax.jit(trained)(split(params, *specs), split(X, P("data")))
    np.testing.assert_allclose(others, values, rtol=1e-5)
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, atol=2e-4)


def single_tensors_keep_how_they_lie() -> None:
    x = split(X, P("data", "model"))
    for run in (jax.jit, lambda f: f):
        quantized = run(lambda x: qj.fake_quant(x, 0.25, bits=4))
        got = quantized(x)
        assert got.sharding.spec == x.sharding.spec
        agree(got, quantized(X))
    qparams = qj.QParams(jnp.float32(0.25), jnp.float32(0.0), jnp.float32(4.0))
    for container, spec in ((4, P("data", "model")), (8, P("data", "model"))):
        format = qj.integer(max_bits=container)
        coded, alone = (qj.encode(tensor, qparams, format) for tensor in (x, X))
        assert coded.stored.sharding.spec == spec
        agree((coded.codes, coded.dequantize()), (alone.codes, alone.dequantize()))
    odd = split(X[:, :6], P(None, "model"))  # 6 codes of 4 bits are 3 bytes, on 2 devices
    coded = qj.encode(odd, qparams, qj.integer(max_bits=4))
    assert not any(coded.stored.sharding.spec)
    agree(coded.dequantize(), qj.encode(X[:, :6], qparams, qj.integer(max_bits=4)).dequantize())
    scheme = qj.Scheme(weights=WEIGHT(bits=4, granularity=qj.PerChannel(axis=-1)))
    policy = qj.Policy([qj.rule(qj.everything(), scheme)])
    agree(qj.quantize_params({"w": x}, policy), qj.quantize_params({"w": X}, policy))


def axes_may_be_explicit_in_part() -> None:
    kinds = (AxisType.Explicit, AxisType.Auto)
    in_part = jax.make_mesh((DEVICES // 2, 2), ("data", "model"), axis_types=kinds)
    f, params, _ = MODELS["rows of a batch"]
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, WHOLE))
    rows = jax.device_put(WHOLE, NamedSharding(in_part, P("data")))
    spread = {
        "a": jax.device_put(params["a"], NamedSharding(in_part, P())),
        "b": jax.device_put(params["b"], NamedSharding(in_part, P())),
    }
    want, state = observed(f, plan, params, WHOLE)
    with jax.set_mesh(in_part):
        got, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), spread, rows)
    agree(got, want)
    agree(calibrated(plan, seen, spread), calibrated(plan, state, params))


def parts_of_a_program_may_have_automatic_axes() -> None:
    """``auto_axes`` around a product, which is also how a lookup says how its rows lie."""

    def lies(params):
        return jax.typeof(params["e"]).sharding.mesh

    def f(params, tokens):
        around, e = lies(params), params["e"]
        if around.empty:
            return jnp.tanh(e[tokens] @ params["w"])
        rows = NamedSharding(around, P("data", None, None))
        h = e.at[tokens].get(out_sharding=rows)
        product = jax.sharding.auto_axes(lambda h, w: jnp.tanh(h @ w))
        return product(h, params["w"], out_sharding=rows)

    params = weights(e=(12, 8), w=(8, 8))
    tokens = jnp.asarray(GENERATOR.integers(0, 12, (8, 3)), jnp.int32)
    scheme = qj.Scheme(
        weights=WEIGHT(), activations=qj.activation_quantizer(), outputs=qj.activation_quantizer()
    )
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), scheme)]), qj.sites(f, params, tokens))
    y, state = observed(f, plan, params, tokens)
    qstate = calibrated(plan, state, params)
    spread = split(params, P("model"), P(None, "model"))
    rows = split(tokens, P("data"))
    got, seen = jax.jit(qj.observe(f, plan))(qj.init(plan), spread, rows)
    agree(got, y)
    agree(calibrated(plan, seen, spread), qstate)
    want = jax.jit(qj.fake_quantize(f, plan))(qstate, params, tokens)
    agree(jax.jit(qj.fake_quantize(f, plan))(qstate, spread, rows), want)
    frozen = qj.freeze(plan, qstate, spread)
    agree(jax.jit(qj.execute(f, plan))(qstate, frozen, rows), want)
    report = jax.jit(qj.compare(f, plan))(qstate, spread, rows)
    alone = jax.jit(qj.compare(f, plan))(qstate, params, tokens)
    np.testing.assert_allclose(report["w"].sqnr, alone["w"].sqnr, rtol=1e-4)
    groups = qj.Scheme(weights=WEIGHT(bits=4, granularity=qj.PerGroup(4)))
    plan = qj.plan(qj.Policy([qj.rule(qj.everything(), groups)]), qj.sites(f, params, tokens))
    qstate = calibrated(plan, {}, params)
    agree(calibrated(plan, {}, spread), qstate)
    frozen = qj.pack_params(qj.freeze(plan, qstate, spread))
    want = jax.jit(qj.execute(f, plan))(qstate, qj.freeze(plan, qstate, params), tokens)
    agree(jax.jit(qj.execute(f, plan))(qstate, frozen, rows), want)


def masks_and_losses_are_those_of_one_device() -> None:
    params = {name: X[:, :8] * number for number, name in enumerate("ab", 1)}
    two = qj.pruning.NOfM(m=4)
    for spec in (P("data", "model"), P(None, "model"), P("data")):
        spread = split(params, spec)
        for scope in qj.pruning.Scope:
            pruned = jax.jit(functools.partial(qj.prune_mask, sparsity=0.5, scope=scope))
            masks = pruned(spread)
            agree(masks, pruned(params))
            assert masks["a"].sharding.is_equivalent_to(spread["a"].sharding, 2)
            agree(qj.apply_mask(spread, masks), qj.apply_mask(params, masks))
        agree(*(qj.prune_mask(tree, 0.5, structure=two) for tree in (spread, params)))
    labels = jnp.arange(16, dtype=jnp.int32) % 8
    want = qj.kd_loss(X, 2.0 * X, labels)
    for spec in (P("data"), P("data", "model"), P(None, "model")):
        got = jax.jit(qj.kd_loss)(split(X, spec), split(2.0 * X, spec), split(labels, P(spec[0])))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def cells_may_be_spread_over_devices() -> None:
    f, params, _ = MODELS["rows of a batch"]
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, WHOLE))
    state = observed(f, plan, params, WHOLE)[1]

    def every(widths, params, x):
        def cell(bits):
            qstate = qj.calibrate(plan, state, params, weight_bits=bits, activation_bits=bits)
            return qj.fake_quantize(f, plan)(qstate, params, x)

        return jax.vmap(cell)(widths)

    widths = jnp.array([2.0, 4.0, 8.0, 0.0])
    want = jax.jit(every)(widths, params, WHOLE)
    with jax.set_mesh(mesh()):
        got = jax.jit(every)(split(widths, P("data")), params, WHOLE)
    assert got.sharding.spec[0] == "data"
    agree(got, want)


def frozen_weights_are_executed_inside_shard_map() -> None:
    """Where the product runs in float, codes have to vary over devices as the weight would."""
    f, params, _ = MODELS["rows of a batch"]
    weights_only = qj.uniform_policy(weight_bits=8, activation_bits=None)
    for policy in (weights_only, qj.presets.fp8(), POLICIES["W8A8"]):
        plan = qj.plan(policy, qj.sites(f, params, WHOLE))
        state = observed(f, plan, params, WHOLE)[1]
        qstate = calibrated(plan, state, params)
        frozen = jax.jit(functools.partial(qj.freeze, plan))(qstate, params)
        execute = qj.execute(f, plan)
        specs = {"mesh": mesh(), "in_specs": (P(), P(), P("data")), "out_specs": P("data")}
        want = jax.jit(execute)(qstate, frozen, WHOLE)
        got = jax.jit(jax.shard_map(execute, **specs))(qstate, frozen, split(WHOLE, P("data")))
        agree(got, want)


def shards_start_their_own_statistics_inside_shard_map() -> None:
    f, params, _ = MODELS["rows of a batch"]
    plan = qj.plan(POLICIES["W8A8"], qj.sites(f, params, WHOLE))

    def of_shard(params, x):
        state = qj.observe(f, plan)(qj.init(plan), params, x)[1]
        return jax.tree.map(lambda leaf: leaf[None], state)

    specs = {"mesh": mesh(), "in_specs": (P(), P("data")), "out_specs": P("data")}
    shards = jax.jit(jax.shard_map(of_shard, **specs))(params, split(WHOLE, P("data")))
    shards = jax.tree.map(np.asarray, shards)
    each = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), shards) for i in range(4)]
    whole = functools.reduce(qj.merge_states, each)
    want = observed(f, plan, params, WHOLE)[1]
    agree(calibrated(plan, whole, params), calibrated(plan, want, params))


CASES = {
    **{
        f"{name}, {label}": functools.partial(all_verbs, name, POLICIES[label])
        for name in MODELS
        for label in (POLICIES if name in ("columns, then rows", "layers") else ["W8A8"])
    },
    "called eagerly": functools.partial(
        all_verbs, "rows of a batch", POLICIES["W8A8"], (lambda f: f,)
    ),
    **{
        case.__name__: case
        for case in (
            gradients_are_those_of_one_device,
            a_grid_of_widths_is_that_of_one_device,
            steps_of_training_are_those_of_one_device,
            single_tensors_keep_how_they_lie,
            axes_may_be_explicit_in_part,
            parts_of_a_program_may_have_automatic_axes,
            masks_and_losses_are_those_of_one_device,
            cells_may_be_spread_over_devices,
            frozen_weights_are_executed_inside_shard_map,
            shards_start_their_own_statistics_inside_shard_map,
            cells_are_those_of_one_device,
        )
    },
}


if __name__ == "__main__":
    run_all(CASES)
