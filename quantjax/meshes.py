"""Meshes with explicit axes, the default of ``jax.make_mesh``: there a sharding is part of a type.

Operations whose result has no evident sharding are refused under such types. What quantjax computes
besides the model's own equations is therefore computed with automatic axes, where XLA decides, and
has the model's types again afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

REPLICATED: Any = P()  # specs stand in the places of arrays


def mesh_of(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh with explicit axes that a leaf of ``tree`` lies on; None without one."""
    found = None
    for leaf in _arrays(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            if not isinstance(leaf, jax.core.Tracer):
                return cast(NamedSharding, leaf.sharding).mesh  # with the devices
            found = mesh
    return found


def spec_of(x: Any, shape: Sequence[int] | None = None) -> Any:
    """Along which mesh axes an array, or the type of one, is split.

    Args:
      shape: of what is to be split like it; what does not divide an axis is left out.
    """
    sharding = (x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)).sharding
    if shape is None:
        return sharding.spec

    def parts(axes: Any) -> int:
        names = axes if isinstance(axes, tuple) else (axes,)
        return math.prod(sharding.mesh.shape[name] for name in names)

    pairs = zip(shape, sharding.spec, strict=True)
    return P(*(axes if axes and size % parts(axes) == 0 else None for size, axes in pairs))


def first_as(x: Any) -> Callable[[Any], Any]:
    """Specs of a named tuple: its first part as ``x`` is split, copies of the others.

    So are codes and their scales, a result and the state beside it.
    """
    return lambda found: type(found)(spec_of(x), *[REPLICATED] * (len(found) - 1))


def placed(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """``tree`` with the type of a copy on each device, where it is on no mesh yet.

    A loop refuses a carry that comes to lie on a mesh by what it is added to.
    """
    if mesh is None:
        return tree

    def leaf(x: Any) -> Any:
        return x if mesh_of(x) is not None else _as(x, REPLICATED, mesh)

    return jax.tree.map(leaf, tree)


def together(*trees: Any) -> Any:
    """All of them on the mesh with explicit axes that some leaf lies on, if there is one.

    A program that was traced for one device cannot be mapped over an axis of a mesh.
    """
    return placed(trees, mesh_of(trees))


def moved(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """``tree`` with the type that a copy on each device has on this mesh."""
    return jax.tree.map(lambda x: _as(x, REPLICATED, mesh), tree)


def has_automatic_axes() -> bool:
    """Whether the program around is on a mesh of which no axis is explicit."""
    mesh = get_abstract_mesh()
    return not mesh.empty and AxisType.Explicit not in mesh.axis_types


def automatic(
    function: Callable[..., Any], *arguments: Any, specs: Callable[[Any], Any] | None = None
) -> Any:
    """``function(*arguments)``, axes automatic where an argument is split along explicit ones.

    Args:
      function: of arrays that it closes over none may be on the mesh.
      specs: from the result to how it is split, one for all of it or a tree of them; without,
        each device has a copy.
    """
    mesh = mesh_of(arguments)
    if mesh is None or not any(any(spec_of(leaf)) for leaf in _arrays(arguments)):
        return function(*arguments)
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = mesh.abstract_mesh.update_axis_types(
        {name: AxisType.Auto for name, kind in axes if kind is AxisType.Explicit}
    )
    # No statement of how they are split: automatic axes keep what is there.
    arguments = moved(arguments, free)
    with use_abstract_mesh(free):
        found = function(*arguments)
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: _as(x, spec, mesh), part),
        REPLICATED if specs is None else specs(found),
        found,
        is_leaf=lambda spec: isinstance(spec, P),
    )


def _as(x: Any, spec: P, mesh: Mesh | AbstractMesh) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if isinstance(mesh, Mesh):
        return reshard(x, NamedSharding(mesh, spec))
    with use_abstract_mesh(mesh):
        return reshard(x, spec)


def _arrays(tree: Any) -> Iterator[jax.Array]:
    return (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
