"""The only file that touches private JAX or depends on JAX's version.

Written against JAX 0.10.2 (Python 3.11) and 0.12.0 (Python 3.12 and newer).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import source_info_util as _source_info
from jax.extend import core as jex_core

from quantjax.meshes import has_automatic_axes

JIT_PRIMITIVES = ("jit", "pjit")

BARRIERS_HOLD = jax.__version_info__ >= (0, 11)
"""Whether an optimization barrier still stands when XLA decides what to fuse, as it does on CPU
from JAX 0.11 on. The XLA of 0.10.2 removes them before."""


def bind_equation(eqn: jex_core.JaxprEqn, *operands: Any) -> list[Any]:
    """Bind ``eqn``'s primitive to ``operands`` as the original trace did; always a list."""
    with equation_context(eqn):
        return bind_in_context(eqn, *operands)


def bind_in_context(eqn: jex_core.JaxprEqn, *operands: Any) -> list[Any]:
    """:func:`bind_equation` where :func:`equation_context` is entered already."""
    return bind_altered(eqn, {}, *operands)


def bind_altered(eqn: jex_core.JaxprEqn, changes: Mapping[str, Any], *operands: Any) -> list[Any]:
    """:func:`bind_in_context` with some parameters of the equation replaced."""
    options = {**eqn.params, **changes}
    if options.get("out_sharding") is not None and has_automatic_axes():
        options["out_sharding"] = None  # said for a mesh with explicit axes
    params = eqn.primitive.get_bind_params(options)
    subfuns: tuple[Any, ...] = ()
    if isinstance(params, tuple):
        subfuns, params = tuple(params[0]), params[1]
    if len(operands) > 1 and _core.get_axis_env().axis_sizes:
        # Inside shard_map one of them may vary over devices now that did not where it was traced;
        # jax.numpy casts the others, primitives refuse them.
        operands = varying_like(operands, operands)
    if not subfuns and _is_eager() and (_broadcasts(eqn) or _is_inlined_product(eqn)):
        return [_jitted(eqn.primitive, tuple(params.items()))(*operands)]
    out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _is_eager() -> bool:
    """Whether operations run now, differentiated or batched perhaps, and none is being staged."""
    trace = _core.trace_ctx.trace
    while trace is not None:
        if type(trace).__name__ == "DynamicJaxprTrace":
            return False
        trace = getattr(trace, "parent_trace", None)
    return True


def _broadcasts(eqn: jex_core.JaxprEqn) -> bool:
    """Whether the equation broadcasts axes of size 1, as elementwise ones do in newer JAX."""
    if len(eqn.invars) < 2 or eqn.primitive.multiple_results:
        return False
    out, *shapes = [getattr(a.aval, "shape", ()) for a in (eqn.outvars[0], *eqn.invars)]
    return any(shape != out for shape in shapes) and all(
        len(shape) == len(out) and all(n in (1, m) for n, m in zip(shape, out, strict=True))
        for shape in shapes
    )


def _is_inlined_product(eqn: jex_core.JaxprEqn) -> bool:
    """Whether the equation is a product that ``jax.numpy`` called through a small jitted function.

    ``x @ w`` and ``jnp.einsum`` do, ``lax.dot_general`` and so ``flax.linen`` do not. The trace has
    inlined those functions; the call stack at the equation still shows which it was.
    """
    traceback = eqn.source_info.traceback
    if eqn.primitive.name != "dot_general" or traceback is None:
        return False
    names = [getattr(f, "function_name", None) or f.name for f in traceback.frames[:8]]
    callers = [name for name in names if "rimitive" not in name and name != "current"]
    return bool(callers) and callers[0] == "_run_python_pjit"


@functools.lru_cache(maxsize=1024)
def _jitted(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Any:
    """The primitive as ``jax.numpy`` calls it: a jitted function that traces inline.

    The trace of a model has lost those small ``jit`` calls, but eager differentiation sees them:
    the gradient of ``x * scale`` is then one compiled program, product and sum over the batch in
    one, and differs in the last place from the two taken one after the other.
    """
    return jax.jit(lambda *operands: primitive.bind(*operands, **dict(params)), inline=True)


@contextlib.contextmanager
def equation_context(eqn: jex_core.JaxprEqn) -> Iterator[None]:
    """The name stack, traceback and configuration under which ``eqn`` was traced."""
    stack = _source_info.current_name_stack() + eqn.source_info.name_stack
    with (
        _source_info.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def name_stack(eqn: jex_core.JaxprEqn) -> str:
    """The module path that the equation was traced under, relative to its own jaxpr."""
    return str(eqn.source_info.name_stack)


def trace_context() -> Hashable:
    """A key that differs where JAX itself would trace again (x64, promotion, mesh, ...)."""
    return _config.trace_context()


def is_jit(eqn: jex_core.JaxprEqn) -> bool:
    """Whether the equation is a call of a jitted function."""
    return eqn.primitive.name in JIT_PRIMITIVES


def jit_call(eqn: jex_core.JaxprEqn) -> tuple[jex_core.ClosedJaxpr, dict[str, Any]]:
    """The inner program of a jit equation, and the public ``jax.jit`` options that rebuild it."""
    options: dict[str, Any] = {"keep_unused": eqn.params["keep_unused"]}
    if eqn.params["inline"]:
        options["inline"] = eqn.params["inline"]
    if eqn.params.get("compiler_options_kvs"):
        options["compiler_options"] = dict(eqn.params["compiler_options_kvs"])
    return eqn.params["jaxpr"], options


def jit_shardings(eqn: jex_core.JaxprEqn) -> tuple[list[Any], list[Any]]:
    """Input and output shardings of a jit equation, None where they are left open."""

    def stated(shardings: Any) -> list[Any]:
        return [s if isinstance(s, jax.sharding.Sharding) else None for s in shardings]

    return stated(eqn.params["in_shardings"]), stated(eqn.params["out_shardings"])


def as_closed(jaxpr: Any) -> jex_core.ClosedJaxpr:
    """A program with its constants, of which an open one must have none."""
    if isinstance(jaxpr, jex_core.ClosedJaxpr):
        return jaxpr
    return jex_core.ClosedJaxpr(jaxpr, ())


def opened(program: Any) -> jex_core.Jaxpr:
    """A program without the values of its constants, which are further inputs, ahead of the others.

    Kept in a cache, it keeps no array and no tracer alive.
    """
    jaxpr = program.jaxpr if isinstance(program, jex_core.ClosedJaxpr) else program
    if not jaxpr.constvars:
        return jaxpr
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def programs_in(params: Mapping[str, Any]) -> Iterator[jex_core.Jaxpr]:
    """The programs that the parameters of an equation hold.

    JAX 0.12 has primitives whose only parameter is an object, with parameters of its own
    (``call_hi_primitive``, of ``lax.custom_root`` among others).
    """
    yield from map(opened, jex_core.jaxprs_in_params(dict(params)))
    for value in params.values():
        inner = getattr(value, "params", None)
        if isinstance(inner, Mapping):
            yield from programs_in(inner)


def names_axes(program: Any) -> bool:
    """Whether a program has a collective over a named axis."""
    return any(type(effect).__name__ == "NamedAxisEffect" for effect in program.effects)


def scan_operands(eqn: jex_core.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def remat_call(
    eqn: jex_core.JaxprEqn, function: Callable[..., Any], *arguments: Any
) -> tuple[Any, ...]:
    """``function(*arguments)`` rematerialized as ``eqn`` is: its policy, its barrier against CSE.

    Where ``eqn`` stems from a gradient that was traced, what it computes is computed for the second
    time already; public ``jax.checkpoint`` cannot say so, and without it XLA would merge the two.
    """
    checkpointed = jax.checkpoint(
        function, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    if not eqn.params["differentiated"]:
        return checkpointed(*arguments)
    closed, shape = jax.make_jaxpr(checkpointed, return_shape=True)(*arguments)
    flat, tree = jax.tree.leaves(arguments), jax.tree.structure(shape)
    env: dict[Any, Any] = dict(zip(closed.jaxpr.invars, flat, strict=True))
    env.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for inner in closed.jaxpr.eqns:
        marked = inner.primitive is eqn.primitive
        params = {**inner.params, "differentiated": True} if marked else inner.params
        outputs = inner.primitive.bind(*map(read, inner.invars), **params)
        env.update(
            zip(
                inner.outvars,
                outputs if inner.primitive.multiple_results else [outputs],
                strict=True,
            )
        )
    return jax.tree.unflatten(tree, [read(atom) for atom in closed.jaxpr.outvars])


def fenced(x: jax.Array, flag: jax.Array | None) -> jax.Array:
    """The identity, across which XLA fuses nothing.

    Args:
      flag: anything that XLA does not know. Where barriers do not hold, it chooses between two
        identities, a choice that XLA keeps; without a flag there is no fence then.
    """
    if BARRIERS_HOLD:
        return lax.optimization_barrier(x)
    if flag is None:
        return x
    return lax.cond(_of_all_lanes(flag), lambda x: x, lax.optimization_barrier, x)


@jax.custom_batching.custom_vmap
def _of_all_lanes(flag: jax.Array) -> jax.Array:
    """One flag for all lanes of a ``vmap``: a choice by lane has no transpose in JAX 0.10."""
    return jnp.any(flag)


@_of_all_lanes.def_vmap
def _of_more_lanes(size: int, are_batched: Any, flag: jax.Array) -> tuple[jax.Array, bool]:
    del size, are_batched
    return _of_all_lanes(flag), False


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array where it is known now; None for a tracer.

    NumPy on purpose: inside a trace, ``jnp`` would stage even operations on known values.
    """
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def varying_like(tree: Any, like: Any) -> Any:
    """What a loop starts from, varying over the devices that its data varies over.

    Inside ``shard_map`` a constant is the same on all devices, and a loop that makes something else
    of it has no type.
    """
    axes = [jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(like)]
    wanted = frozenset().union(*axes)

    def varying(leaf: Any) -> Any:
        missing = wanted - jax.typeof(leaf).mat.varying
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(varying, tree)
