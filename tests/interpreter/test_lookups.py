"""Lookups of rows of a parameter as sites: which equations are, and what the table says of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpreter import Op, Role, SiteStatus
from tests.models import normal

TABLE = {"table": normal(0, 7, 5), "w": normal(1, 5, 3)}
IDS = jnp.array([[1, 6], [0, 3]])


def only(f: Any, *inputs: Any, params: Any = TABLE) -> Any:
    """The rows of lookups."""
    return [site for site in qj.sites(f, params, *inputs) if site.op.is_lookup]


LOOKUPS = {
    "take": lambda p, i: jnp.take(p["table"], i, axis=0),
    "index": lambda p, i: p["table"][i],
    "row": lambda p, i: p["table"][i[0, 0]],
    "slice": lambda p, i: lax.dynamic_slice_in_dim(p["table"], i[0, 0], 2),
    "cast": lambda p, i: jnp.take(p["table"].astype(jnp.bfloat16), i, axis=0),
    "scaled": lambda p, i: jnp.take(2.0 * p["table"], i, axis=0),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_rows_that_the_inputs_choose_are_a_site(name):
    (site,) = only(LOOKUPS[name], IDS)
    (operand,) = site.operands
    assert site.name == ("f(table)" if name == "scaled" else "table")
    assert site.op is (Op.SLICE if name in ("row", "slice") else Op.GATHER)
    assert site.status is SiteStatus.REWRITABLE
    assert (operand.role, operand.side, operand.shape) == (Role.WEIGHT, 0, (7, 5))
    assert (operand.free, operand.contracted, operand.window) == ((0,), (1,), ())
    assert operand.storable == (name != "scaled")
    assert site.multiply_adds == 0
    assert site.output.shape == site.out_shape


def test_columns_and_several_axes():
    (site,) = only(lambda p, i: jnp.take(p["table"], i, axis=1), IDS % 5)
    assert (site.operands[0].free, site.operands[0].contracted) == ((1,), (0,))
    experts = {"w": normal(2, 4, 3, 6, 5)}
    (site,) = only(lambda p, i: p["w"][i, i % 3], IDS % 4, params=experts)
    assert (site.operands[0].free, site.operands[0].contracted) == ((0, 1), (2, 3))


def test_an_ensemble_of_tables():
    tables = {"table": normal(3, 2, 7, 5)}
    f = lambda p, i: jax.vmap(lambda t, i: t[i])(p["table"], i)  # noqa: E731
    (site,) = only(f, IDS, params=tables)
    assert (site.operands[0].free, site.operands[0].contracted) == ((0, 1), (2,))


NONE = {
    "constant indices": lambda p, i: p["table"][jnp.array([1, 2])] + i[:, :1].astype(jnp.float32),
    "a table from the data": lambda p, i: (p["table"] + i[0, 0].astype(jnp.float32))[i],
    "a table of the function": lambda p, i: jnp.arange(7.0)[i] + p["table"][0, 0],
    "a static slice": lambda p, i: p["table"][1:3] + i[0, 0].astype(jnp.float32),
}


@pytest.mark.parametrize("name", NONE)
def test_all_else_is_none(name):
    assert only(NONE[name], IDS) == []


def test_a_slice_that_is_batched_is_a_lookup_of_rows():
    """``jax.vmap`` of a row makes a gather with an index for the whole axis as well."""
    row = lambda t, i: lax.dynamic_index_in_dim(t, i, keepdims=False)  # noqa: E731
    rows = lambda t, i: lax.dynamic_slice_in_dim(t, i, 2)  # noqa: E731
    for take in (row, rows):
        f = lambda p, i, take=take: jax.vmap(take, (None, 0))(p["table"], i.ravel())  # noqa: E731
        (site,) = only(f, IDS)
        assert (site.op, site.status) == (Op.GATHER, SiteStatus.REWRITABLE)
        assert (site.operands[0].free, site.operands[0].contracted) == ((0,), (1,))


def test_integers_are_no_table():
    assert only(lambda p, i: p["map"][i], IDS, params={"map": jnp.arange(7)}) == []


def test_parts_of_rows_are_opaque():
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    f = lambda p, i: lax.gather(p["table"], i.reshape(-1, 1), numbers, (1, 3))  # noqa: E731
    (site,) = only(f, IDS)
    assert site.status is SiteStatus.OPAQUE
    assert site.reason == "a lookup of parts of rows"


def test_a_tied_table_is_named_by_use():
    def f(p: Any, i: jax.Array) -> jax.Array:
        return p["table"][i] @ p["table"].T

    assert [site.name for site in qj.sites(f, TABLE, IDS)] == ["table", "table#1"]


def test_stacked_tables_have_steps_and_shared_ones_do_not():
    tables = {"stack": normal(4, 3, 7, 5), "shared": normal(5, 7, 5)}

    def f(p: Any, i: jax.Array) -> jax.Array:
        step = lambda total, t: (total + t[i] + p["shared"][i], None)  # noqa: E731
        return lax.scan(step, jnp.zeros((2, 2, 5)), p["stack"])[0]

    steps = {site.name: site.steps for site in only(f, IDS, params=tables)}
    assert steps == {"stack": (3,), "shared": ()}


def test_a_lookup_is_not_a_use_elsewhere():
    f = lambda p, i: p["table"][i]  # noqa: E731
    assert "table" not in qj.sites(f, TABLE, IDS).others


def test_a_rule_of_derivation_with_a_lookup_alone_is_kept():
    """Nothing in it is multiplied: it stays as it is, and the table is used in float."""

    @jax.custom_jvp
    def pick(t: jax.Array, i: jax.Array) -> jax.Array:
        return t[i]

    pick.defjvp(lambda p, t: (pick(*p), 3.0 * t[0][p[1]]))
    table = qj.sites(lambda p, i: pick(p["table"], i), TABLE, IDS)
    assert len(table) == 0
    assert "table" in table.others


def test_taps_return_the_rows():
    f = lambda p, i: jnp.tanh(p["table"][i] @ p["w"])  # noqa: E731
    taps = qj.tap(f, qj.path("table"))(TABLE, IDS)
    np.testing.assert_array_equal(taps["table"], TABLE["table"][IDS])
