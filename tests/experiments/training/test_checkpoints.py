"""Any pytree of arrays comes back as it was; the newest checkpoint that is whole serves."""

import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from experiments.training import (
    CheckpointError,
    CheckpointWarning,
    RunMismatchError,
    Saved,
    TaskError,
    leaves,
    load,
    recover,
    save,
    saved_steps,
)
from experiments.training.seal import check_sealed, seal
from tests.experiments.training import tiny

pytestmark = pytest.mark.thinned(2)


class Pair(NamedTuple):
    """A NamedTuple of a user."""

    first: jax.Array
    second: dict[str, jax.Array]


def qstate():
    """As ``qj.calibrate`` makes it, of a small model."""
    params = {"kernel": jnp.arange(12.0).reshape(4, 3)}

    def f(params, x):
        return x @ params["kernel"]

    x = jnp.ones((2, 4))
    planned = qj.plan(qj.uniform_policy(weight_bits=4, activation_bits=8), qj.sites(f, params, x))
    _, observed = qj.observe(f, planned)(qj.init(planned), params, x)
    found = qj.calibrate(planned, observed, params)
    return found, qj.freeze(planned, found, params)


def adam():
    with jax.numpy_dtype_promotion("standard"):
        return optax.adamw(optax.cosine_decay_schedule(0.1, 10)).init({"w": jnp.ones((2, 3))})


STATES = {
    "dictionary": lambda: {"b": jnp.ones(2), "a": {"c": jnp.zeros((2, 2))}},
    "list_and_tuple": lambda: [jnp.ones(2), (jnp.int32(3), None)],
    "namedtuple": lambda: Pair(jnp.ones(2), {"x": jnp.zeros(1)}),
    "one_array": lambda: jnp.arange(3),
    "nothing": lambda: {"a": None, "b": ()},
    "empty_array": lambda: {"a": jnp.zeros((0, 3)), "b": jnp.ones(1)},
    "only_empty": lambda: jnp.zeros((0,)),
    "key": lambda: {"k": jax.random.key(3)},
    "keys": lambda: jax.random.split(jax.random.key(3), (2, 3)),
    "another_key": lambda: jax.random.key(3, impl="rbg"),
    "old_key": lambda: jax.random.PRNGKey(0),
    "narrow": lambda: {
        "int4": jnp.arange(-3, 4).astype(jnp.int4),
        "uint4": jnp.arange(5).astype(jnp.uint4),
        "float8": jnp.linspace(-2, 2, 5).astype(jnp.float8_e4m3fn),
        "bfloat16": jnp.linspace(-2, 2, 5).astype(jnp.bfloat16),
        "float16": jnp.linspace(-2, 2, 5).astype(jnp.float16),
    },
    "other_dtypes": lambda: {
        "bool": jnp.array([True, False]),
        "int8": jnp.int8([[-128, 127]]),
        "uint32": jnp.uint32(4_000_000_000),
        "complex": jnp.complex64(1 + 2j),
    },
    "odd_values": lambda: jnp.array([np.nan, np.inf, -np.inf, -0.0, 1e-42], jnp.float32),
    "odd_names": lambda: {"a/b.c": jnp.ones(1), "ü ": jnp.zeros(1), "a": {"b.c": jnp.ones(2)}},
    "optimizer": adam,
    "qstate_and_qtensors": qstate,
    "training": lambda: tiny.init(jax.random.key(0)),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_as_it_was(tmp_path, name):
    state = leaves.normalized(STATES[name]())
    save(tmp_path, Saved(4, state, {"history": [1.5, None]}))
    found = load(tmp_path, jax.tree.map(jnp.copy, state))
    assert (found.step, found.record) == (4, {"history": [1.5, None]})
    assert tiny.same(found.state, state)
    assert type(found.state) is type(state)


def test_namedtuples_keep_their_types(tmp_path):
    state = leaves.normalized(STATES["qstate_and_qtensors"]())
    save(tmp_path, Saved(1, state))
    found, frozen = load(tmp_path, state).state
    kinds = {type(leaf) for leaf in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "bits"))}
    assert kinds == {qj.QParams}
    assert isinstance(frozen["kernel"], qj.QTensor)
    np.testing.assert_array_equal(frozen["kernel"].dequantize(), state[1]["kernel"].dequantize())


def test_the_template_gives_the_structure_and_no_value(tmp_path):
    save(tmp_path, Saved(1, {"w": jnp.arange(3.0)}))
    found = load(tmp_path, {"w": jnp.full(3, jnp.nan)})
    np.testing.assert_array_equal(found.state["w"], [0.0, 1.0, 2.0])


def test_a_record_may_hold_numbers_that_are_not_finite(tmp_path):
    save(tmp_path, Saved(1, jnp.ones(1), [float("nan"), float("inf"), 0.1]))
    record = load(tmp_path, jnp.ones(1)).record
    assert np.isnan(record[0])
    assert record[1:] == [float("inf"), 0.1]


def test_a_state_on_a_device_of_choice_comes_back_there(tmp_path):
    device = jax.devices()[0]
    state = jax.device_put(jnp.ones(2), device)
    save(tmp_path, Saved(1, state))
    assert load(tmp_path, state).state.committed
    assert not load(tmp_path, jnp.ones(2)).state.committed


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (1, None, (5,)),
        (2, None, (4, 5)),
        (9, None, (1, 2, 3, 4, 5)),
        (1, 2, (2, 5)),
        (2, 5, (4, 5)),
        (1, 77, (5,)),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best, kept):
    for step in range(1, 6):
        save(tmp_path, Saved(step, jnp.int32(step)), keep=keep, best=best)
    assert saved_steps(tmp_path) == kept
    assert [int(load(tmp_path, jnp.int32(0), step=step).state) for step in kept] == list(kept)


def test_the_newest_is_loaded_unless_a_step_is_named(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, Saved(step, jnp.int32(step)), keep=3)
    assert load(tmp_path, jnp.int32(0)).step == 10
    assert load(tmp_path, jnp.int32(0), step=2).step == 2


def test_a_step_is_not_saved_twice(tmp_path):
    save(tmp_path, Saved(1, jnp.int32(1)))
    with pytest.raises(ValueError, match="already exists"):
        save(tmp_path, Saved(1, jnp.int32(2)))
    assert int(load(tmp_path, jnp.int32(0)).state) == 1


def test_without_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert saved_steps(folder) == ()
        assert recover(folder, jnp.int32(0)) is None
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load(folder, jnp.int32(0))
    assert not (tmp_path / "absent").exists()


def test_a_step_that_is_not_there(tmp_path):
    save(tmp_path, Saved(3, jnp.int32(1)))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4\n.*\n.*those of steps 3"):
        load(tmp_path, jnp.int32(0), step=4)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.ones(3), "b": jnp.ones(1)}, r"w: float32\[2\] in the checkpoint, float32\[3\]"),
        ({"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1)}, r"bfloat16\[2\] now"),
        ({"w": jnp.ones(2)}, r"b: float32\[1\] in the checkpoint, absent now"),
        ({"w": jnp.ones(2), "c": jnp.ones(1)}, "c: absent in the checkpoint"),
    ],
)
def test_another_kind_of_state_is_named(tmp_path, like, message):
    save(tmp_path, Saved(3, {"w": jnp.ones(2), "b": jnp.ones(1)}))
    for function in (load, recover):
        with pytest.raises(RunMismatchError, match=message):
            function(tmp_path, like)
    assert saved_steps(tmp_path) == (3,)


def test_keys_of_another_implementation_are_another_state(tmp_path):
    save(tmp_path, Saved(3, jax.random.key(0, impl="rbg")))
    with pytest.raises(RunMismatchError, match="rbg"):
        load(tmp_path, jax.random.key(0))


def test_many_differences_are_counted(tmp_path):
    save(tmp_path, Saved(3, {f"w{i}": jnp.ones(2) for i in range(9)}))
    with pytest.raises(RunMismatchError, match="and 4 more"):
        load(tmp_path, {f"w{i}": jnp.ones(3) for i in range(9)})


def three(folder):
    for step in (1, 2, 3):
        save(folder, Saved(step, jax.random.normal(jax.random.key(step), (64, 8))), keep=3)
    return jnp.zeros((64, 8))


def flip(folder):
    for file in folder.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(bytes(content))


def remove(pattern):
    def removed(folder):
        found = [file for file in folder.rglob(pattern) if file.is_file()]
        assert found
        for file in found:
            file.unlink()

    return removed


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "flipped": flip,
    "no_arrays": remove("d/*"),
    "no_manifest": remove("manifest.ocdbt"),
    "no_metadata": remove("_METADATA"),
    "no_record": lambda folder: shutil.rmtree(folder / "record"),
    "no_state": lambda folder: shutil.rmtree(folder / "state"),
    "cut_record": lambda folder: (folder / "record" / "metadata").write_text('{"leaves": [['),
    "other_record": lambda folder: (folder / "record" / "metadata").write_text("{}"),
    "empty": empty,
    "cut_seal": lambda folder: (folder / "files.json").write_text("{"),
}
# What orbax, or what reads its answer, refuses without noise where there is no seal to check.
UNSEALED = ("no_metadata", "no_record", "no_state", "cut_record", "other_record", "empty")


@pytest.mark.parametrize(
    ("name", "sealed"), [*((name, True) for name in DAMAGES), *((name, False) for name in UNSEALED)]
)
def test_recovery_passes_over_what_is_damaged(tmp_path, name, sealed):
    folder = tmp_path / "checkpoints"
    like = three(folder)
    if not sealed:
        (folder / "3" / "files.json").unlink()
    DAMAGES[name](folder / "3")
    with pytest.raises(CheckpointError, match=r"cannot be read\n  where: checkpoints/3"):
        load(folder, like)
    with pytest.warns(CheckpointWarning, match="checkpoints/3 cannot be read") as warned:
        found = recover(folder, like)
    assert len(warned) == 1
    assert found is not None
    assert found.step == 2
    assert tiny.same(found.state, jax.random.normal(jax.random.key(2), (64, 8)))
    assert saved_steps(folder) == (1, 2)
    save(folder, Saved(3, like), keep=3)  # its step can be saved again
    assert saved_steps(folder) == (1, 2, 3)


def test_a_checkpoint_without_a_seal_is_read(tmp_path):
    like = three(tmp_path)
    (tmp_path / "3" / "files.json").unlink()
    assert load(tmp_path, like).step == 3


def test_a_seal_says_what_is_wrong(tmp_path):
    (tmp_path / "deeper").mkdir()
    file = tmp_path / "deeper" / "a"
    file.write_bytes(b"abcd")
    check_sealed(tmp_path)
    seal(tmp_path)
    (tmp_path / "later").write_bytes(b"x")
    check_sealed(tmp_path)
    for change, message in (
        (lambda: file.write_bytes(b"abXd"), "deeper/a is not what was written"),
        (lambda: file.write_bytes(b"ab"), "deeper/a has 2 bytes of 4"),
        (file.unlink, "deeper/a is missing"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            check_sealed(tmp_path)


def test_recovery_passes_over_several(tmp_path):
    folder = tmp_path / "checkpoints"
    like = three(folder)
    for step in ("2", "3"):
        shutil.rmtree(folder / step / "record")
    with pytest.warns(CheckpointWarning) as warned:
        assert recover(folder, like).step == 1
    assert [str(warning.message)[:13] for warning in warned] == ["checkpoints/3", "checkpoints/2"]
    assert len(os.listdir(tmp_path / "checkpoints_damaged")) == 2


def test_recovery_moves_nothing_if_nothing_can_be_read(tmp_path):
    like = three(tmp_path)
    for step in ("1", "2", "3"):
        shutil.rmtree(tmp_path / step / "record")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        recover(tmp_path, like)
    assert saved_steps(tmp_path) == (1, 2, 3)


def test_what_is_incomplete_is_mentioned_and_is_no_checkpoint(tmp_path):
    like = three(tmp_path)
    (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")
    assert saved_steps(tmp_path) == (1, 2)
    with pytest.warns(CheckpointWarning, match="3.orbax-checkpoint-tmp is incomplete"):
        assert recover(tmp_path, like).step == 2


def test_normalized_leaves_are_strong_arrays():
    state = leaves.normalized(
        {"float": 0.5, "int": 3, "numpy": np.ones(2), "key": jax.random.key(0)}
    )
    assert [str(leaf) for leaf in leaves.described(state)] == [
        "float32[]",
        "int32[]",
        "key<fry>[]",
        "float32[2]",
    ]
    assert not any(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(state))


def test_check_kept_accepts_the_same_and_names_another():
    before = {"w": jnp.ones(2), "k": jax.random.key(0)}
    leaves.check_kept(before, jax.tree.map(jnp.copy, before))
    with pytest.raises(TaskError, match="k: key<fry>"):
        leaves.check_kept(before, {**before, "k": jnp.ones(2)})
