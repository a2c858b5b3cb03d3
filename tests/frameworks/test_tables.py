"""The tables name every class of the libraries, and every site of its layers."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import flax.linen as nn
import pytest
from flax import nnx

import quantjax as qj
from tests.frameworks import linen_layers, nnx_layers
from tests.frameworks.layer import said
from tests.frameworks.test_layers import LAYERS

TABLES = {"linen": (nn, linen_layers.CLASSES), "nnx": (nnx, nnx_layers.CLASSES)}


def modules_of(library: Any) -> list[str]:
    """Names of the public classes that are modules of the library."""
    found = {name: getattr(library, name) for name in dir(library) if not name.startswith("_")}
    return [
        name
        for name, value in found.items()
        if inspect.isclass(value) and issubclass(value, library.Module)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_every_class_is_in_the_table(name):
    library, rows = TABLES[name]
    unknown = sorted(set(modules_of(library)) - rows.keys())
    assert not unknown, f"new in {library.__name__}: give each a builder, or say why it has none"


@pytest.mark.parametrize("name", TABLES)
def test_the_table_has_no_class_that_never_was(name):
    """A class may be newer than the oldest Flax that is tested; those are named here."""
    library, rows = TABLES[name]
    gone = sorted(rows.keys() - set(modules_of(library)))
    assert set(gone) <= {"RoPE"}, gone


def test_a_class_in_no_table_is_noticed():
    class New(nn.Module):
        pass

    library = ModuleType("library")
    library.Module, library.New, library.Dense, library.relu = nn.Module, New, nn.Dense, nn.relu
    assert modules_of(library) == ["Dense", "Module", "New"]
    assert set(modules_of(library)) - linen_layers.CLASSES.keys() == {"New"}


@pytest.mark.parametrize("name", TABLES)
def test_classes_without_a_kernel_have_a_reason(name):
    _, rows = TABLES[name]
    for row in rows.values():
        assert row, rows
        assert isinstance(row, str) or all(map(callable, row.values()))


@pytest.mark.thinned(13)
@pytest.mark.parametrize("name", LAYERS)
def test_the_sites_of_a_layer_are_those_of_the_table(name):
    layer = LAYERS[name]()
    assert layer.sites
    table = qj.sites(layer.f, layer.params, *layer.inputs)
    assert [said(site) for site in table] == list(layer.sites)
