"""A format of a user's own, in the ten lines of the README: it goes wherever another one goes."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import quantjax as qj
from quantjax import errors, storage
from quantjax.formats import ALL_LAWS, Law, LevelFormat, row_of, width_table
from quantjax.packing import Packing
from tests import models
from tests.refused import refused

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fibonacci(LevelFormat):
    """The README's, under a name that a file can be asked for."""

    max_bits: int = 4
    name = "fibonacci"

    def levels(self, bits, theta=()):
        f = (0, 1, 2, 3, 5, 8, 13, 21, 34)
        rows = {b: (*(-v for v in f[n:0:-1]), *f[:n]) for b, n in enumerate((1, 2, 4, 8), 1)}
        return row_of(width_table(rows, self.max_bits), bits)


LEVELS = {
    1: [-1, 0],
    2: [-2, -1, 0, 1],
    3: [-5, -3, -2, -1, 0, 1, 2, 3],
    4: [-34, -21, -13, -8, -5, -3, -2, -1, 0, 1, 2, 3, 5, 8, 13, 21],
}


def nearest(x: np.ndarray, bits: int) -> np.ndarray:
    """By comparing with every level, in float64."""
    levels = np.array(LEVELS[bits], np.float64)
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


def test_it_is_the_one_of_the_readme_and_has_ten_lines():
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Fibonacci" in b
    )
    start, end = block.index("@dataclasses"), block.index("\n\n\n", block.index("class Fibonacci"))
    assert len(block[start:end].splitlines()) <= 10
    names: dict = {"__name__": "readme", "qj": qj}
    exec(compile(block, "README.md", "exec"), names)
    for bits in LEVELS:
        width = jnp.float32(bits)
        assert_array_equal(names["Fibonacci"]().levels(width), Fibonacci().levels(width))


def test_it_keeps_the_contract():
    assert qj.check_format(Fibonacci()) >= Fibonacci().laws
    more = dataclasses.make_dataclass(
        "Boasting", [], bases=(Fibonacci,), frozen=True, kw_only=True,
        namespace={"laws": property(lambda self: ALL_LAWS)},
    )  # fmt: skip
    with refused(errors.FormatError, "breaks its law ODD"):
        qj.check_format(more())
    assert Law.ZERO in qj.check_format(Fibonacci())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_its_levels_are_those_that_it_says(bits):
    x = np.random.default_rng(bits).normal(size=1000).astype(np.float32) * 20
    y = qj.fake_quant(jnp.asarray(x), 0.5, format=Fibonacci(), bits=bits)
    assert_array_equal(y, nearest(x / np.float64(0.5), bits) * 0.5)
    tensor = qj.encode(
        jnp.asarray(x), qj.QParams(jnp.float32(0.5), jnp.float32(0), jnp.float32(bits)), Fibonacci()
    )
    assert_array_equal(tensor.dequantize(), y)
    assert tensor.packing == Packing(4, 1000, signed=False)


def test_the_width_is_an_array():
    x = jnp.linspace(-40.1, 40.0, 257)  # without ties
    run = jax.jit(jax.vmap(lambda b: qj.fake_quant(x, 1.0, format=Fibonacci(), bits=b)))
    for bits, row in zip((0, 1, 2, 3, 4), run(jnp.arange(5.0)), strict=True):
        assert_array_equal(row, nearest(np.asarray(x), bits) if bits else x)


@pytest.fixture(scope="module")
def planned():
    case = models.mlp()
    scheme = qj.Scheme(
        weights=qj.weight_quantizer(format=Fibonacci(), granularity=qj.PerGroup(4)),
        activations=qj.activation_quantizer(bits=8),
    )
    plan = models.planned(case, qj.Policy([qj.rule(qj.weighted(), scheme)]))
    _, state = qj.observe(case.f, plan)(qj.init(plan), case.params, case.x)
    return case, plan, qj.calibrate(plan, state, case.params)


def test_a_model_runs_in_it_and_is_frozen_in_it(planned, tmp_path):
    case, plan, qstate = planned
    simulated = jax.jit(qj.fake_quantize(case.f, plan))(qstate, case.params, case.x)
    frozen = qj.freeze(plan, qstate, case.params)
    executed = jax.jit(qj.execute(case.f, plan))(qstate, frozen, case.x)
    assert_array_equal(executed, simulated)
    assert "the levels of" in str(plan)  # says why no integer product
    leaves = [
        leaf
        for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, qj.QTensor))
        if isinstance(leaf, qj.QTensor)
    ]
    assert leaves
    assert all(leaf.format == Fibonacci() and leaf.packing.bits == 4 for leaf in leaves)

    storage.save_params(tmp_path / "weights", frozen)
    storage.save_quantization(tmp_path / "plan.json", plan=plan, qstate=qstate)
    with refused(errors.StorageError, "Fibonacci"):
        storage.load_quantization(tmp_path / "plan.json")
    back = storage.load_quantization(tmp_path / "plan.json", extra=[Fibonacci])
    again = storage.plan_from(back, qj.sites(case.f, case.params, case.x))
    weights = storage.load_params(tmp_path / "weights", extra=[Fibonacci])
    assert_array_equal(jax.jit(qj.execute(case.f, again))(back.qstate, weights, case.x), simulated)


def test_gradients_pass(planned):
    case, plan, qstate = planned
    fake = qj.fake_quantize(case.f, plan)
    gradients = jax.grad(lambda p: jnp.sum(fake(qstate, p, case.x) ** 2))(case.params)
    assert all(jnp.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))
