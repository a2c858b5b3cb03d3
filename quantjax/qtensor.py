"""A tensor held as codes: :class:`QTensor`, and :func:`encode`, which makes one."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import DIVIDED, QParams, Scaling, is_positive
from quantjax.arguments import expect, expect_declared
from quantjax.arithmetic import Arithmetic
from quantjax.fake_quant import check_floating, check_scale
from quantjax.formats import Format, Theta
from quantjax.granularity import expand
from quantjax.lean import select
from quantjax.meshes import REPLICATED, automatic, spec_of
from quantjax.packing import Packing, can_pack, pack, unpack
from quantjax.rounding import HALF_EVEN, Rounding
from quantjax.simulation import centered_codes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("stored", "qparams"),
    meta_fields=("format", "dtype", "packing"),
)
class QTensor:
    """Codes with the parameters that give them meaning; a pytree.

    Codes of 4, 2 and 1 bits are stored 2, 4 and 8 a byte, along the last axis. Groups are found
    from the shapes of codes and scale, never from stored axes, so a stack of layers from
    ``qj.freeze`` survives ``vmap``, ``scan`` and slicing of its leaves along the axes of layers,
    and tensors of one shape can be stacked. A tensor of ``qj.quantize_params`` is one, with one
    width; ``jax.vmap(qj.encode, ...)`` makes a stack.

    Attributes:
      stored: the codes as they lie in memory; packed where ``packing`` says so.
      qparams: scale, zero point, width and the format's own parameters.
      format: static.
      dtype: static; what :meth:`dequantize` returns and what the float tensor was.
      packing: static; None for one code an entry.
    """

    stored: Int[Array, "..."]
    qparams: QParams
    format: Format
    dtype: jnp.dtype
    packing: Packing | None

    def __init__(
        self,
        stored: Any,
        qparams: QParams,
        format: Format,
        dtype: Any,
        packing: Packing | None = None,
    ) -> None:
        self.stored, self.qparams = stored, qparams
        self.format, self.dtype, self.packing = format, dtype, packing

    @property
    def codes(self) -> Int[Array, "..."]:
        """One code an entry, in ``format.storage_dtype``."""
        if self.packing is None:
            return self.stored
        unpacked = functools.partial(unpack, packing=self.packing)
        return cast(jax.Array, automatic(unpacked, self.stored, specs=self._specs))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the codes stand for."""
        shape = tuple(self.stored.shape)
        return shape if self.packing is None else (*shape[:-1], self.packing.length)

    @property
    def ndim(self) -> int:
        """Rank of the tensor."""
        return int(self.stored.ndim)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and parameters together."""
        leaves = jax.tree.leaves((self.stored, self.qparams))
        return sum(int(leaf.size) * int(leaf.dtype.itemsize) for leaf in leaves)

    def levels(self) -> Array:
        """The level of each code: the integer itself, else float32."""
        codes, (bits, theta) = self.codes, (self.qparams.bits, self.qparams.theta)
        if self.format.largest_centered_code(symmetric=True) is not None:
            return codes
        return cast(jax.Array, automatic(self._decoded, codes, bits, theta, specs=self._specs))

    def _decoded(self, codes: jax.Array, bits: jax.Array, theta: Theta) -> jax.Array:
        def decode(codes: jax.Array, bits: jax.Array, theta: Theta) -> jax.Array:
            spread = lambda array: expand(array, codes.shape)  # noqa: E731
            return self.format.decode(codes, bits, self.format.map_groups(theta, spread))

        for _ in range(jnp.ndim(bits)):  # layers, which have widths each
            decode = jax.vmap(decode)
        return decode(codes, bits, theta)

    def dequantize(self) -> Float[Array, "..."]:
        """``scale · (level - round(zero_point))``, in float32, cast to ``dtype``."""
        return cast(jax.Array, automatic(_dequantized, self, specs=self._specs))

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        # Without it NumPy makes an array of one object, which nothing that follows understands.
        raise errors.ArgumentError(
            "a tensor held as codes is no array by itself",
            where=repr(self),
            why="both its codes and the reals they stand for are arrays",
            fix="tensor.dequantize(), or tensor.codes",
        )

    def _specs(self, whole: jax.Array) -> Any:
        return spec_of(self.stored, whole.shape)

    def __repr__(self) -> str:
        # Leaves need not be arrays: trees of shapes, of None, of booleans are printed as well.
        shape = "x".join(map(str, self.shape if hasattr(self.stored, "shape") else ())) or "scalar"
        scales = "x".join(map(str, getattr(self.qparams.scale, "shape", ()))) or "scalar"
        bits = concrete(self.qparams.bits)
        if bits is None or not np.issubdtype(bits.dtype, np.number):  # a tracer or a spec
            label = f"{self.format.name}?"
        elif np.unique(bits).size == 1:
            width = int(np.ravel(bits)[0])
            own = "exponent_bits" in (self.qparams.theta or ())  # not those that the format states
            label = f"{self.format.name}*{width}" if own else self.format.label(width)
        else:
            label = self.format.name + ",".join(f"{b:g}" for b in np.ravel(bits)[:4])
        return f"QTensor({label}[{shape}], scale[{scales}], {self.dtype})"


@functools.partial(jax.jit, inline=True)  # one program where it is called eagerly
def _dequantized(tensor: QTensor) -> jax.Array:
    levels = tensor.levels().astype(jnp.float32)
    scale = expand(jnp.asarray(tensor.qparams.scale, jnp.float32), levels.shape)
    zero_point = expand(jnp.asarray(tensor.qparams.zero_point, jnp.float32), levels.shape)
    return ((levels - jnp.round(zero_point)) * scale).astype(tensor.dtype)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a :class:`QTensor`; for the ``is_leaf`` of tree functions."""
    return isinstance(leaf, QTensor)


def first_quantized(tree: Any) -> str | None:
    """The path of the first :class:`QTensor` of a tree; None where there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized):
        if is_quantized(leaf):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def frozen_error(kind: type[errors.QuantjaxError], where: str) -> errors.QuantjaxError:
    """Of parameters in codes, where a model computes in float."""
    return kind(
        "these parameters are frozen: codes stand where floats are read",
        where=where,
        fix="qj.dequantize_params(params), or qj.execute, which multiplies codes",
    )


@contextlib.contextmanager
def floats_expected(params: Any, *, where: str) -> Iterator[None]:
    """Say which parameter is frozen or no array, where a model that runs inside cannot compute with
    it.

    A model may take codes and decode them itself, so that they are not refused before.

    Raises:
      ArgumentError: in place of a ``TypeError`` of the model.
    """
    try:
        yield
    except TypeError as error:
        path = first_quantized(params)
        if path is not None:
            raise frozen_error(errors.ArgumentError, f"{where}, {path}") from error
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
                path = jax.tree_util.keystr(keys, simple=True, separator="/")
                raise errors.ArgumentError(
                    f"params holds a {type(leaf).__name__}, and arrays are needed",
                    where=f"{where}, {path}" if path else where,
                    fix="a tree of arrays; of a module of Equinox, f and params of "
                    "quantjax.adapters.equinox.functional(module)",
                ) from error
        raise


def encode(
    x: Float[Array, "..."],
    qparams: QParams,
    format: Format,
    *,
    rounding: Rounding = HALF_EVEN,
    scaling: Scaling = DIVIDED,
    key: PRNGKeyArray | None = None,
) -> QTensor:
    """The codes of ``x``, stored in the format's container, packed where that is below a byte.

    For integers ``clip(round(x/s) + z, low, high)``.
    ``encode(x, p, f).dequantize()`` equals ``fake_quant`` of ``x`` exactly.

    Args:
      x: float array; float32 arithmetic whatever its dtype.
      qparams: its parameters; ``bits`` may be traced but must not be 0.
      format: whose codes.
      rounding, scaling: default half to even, of a true quotient.
      key: for a random rounding.

    Raises:
      BitsError: a concrete width of 0: a tensor that passes through has no codes; or one that the
        container does not hold.
      DataError: a concrete tensor with NaN, for which no code stands. Under a trace, check
        beforehand: an integer array cannot carry NaN.
      QuantizerError: a concrete scale that is not positive and finite, or such a zero point.
      KeyMissingError: a random rounding without a key.

    Under a trace the scale is NaN in place of an error, and so is what is decoded.

    >>> import jax.numpy as jnp
    >>> from quantjax.formats import integer
    >>> p = QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(8.0))
    >>> encode(jnp.array([1.2, 3.5, -127.5, 129.0, -1300.0]), p, integer()).codes.tolist()
    [1, 4, -128, 127, -128]
    """
    expect(qparams, QParams, argument="qparams", where="qj.encode", fix="qj.QParams(scale, 0, 8)")
    expect(format, Format, argument="format", where="qj.encode", fix="qj.integer()")
    expect_declared(format, where="qj.encode")
    expect(rounding, Rounding, argument="rounding", where="qj.encode", fix="qj.rounding.FLOOR")
    _check_bits(x, qparams, format)
    check_scale(qparams.scale, qparams.zero_point, where="qj.encode")
    known = concrete(x)
    if known is not None and np.any(np.isnan(known)):
        raise errors.DataError(
            "the tensor holds NaN, for which no code stands",
            where=f"qj.encode of shape {known.shape}",
            fix="find its source with jax.config.update('jax_debug_nans', True)",
        )
    x = jnp.asarray(x)
    check_floating(x, "qj.encode")

    arithmetic = Arithmetic(format, rounding, scaling=scaling)

    def encoded(x: jax.Array, qparams: QParams, key: PRNGKeyArray | None) -> QTensor:
        codes, scale = _encoded(arithmetic, x, qparams, key)
        return packed(codes, qparams._replace(scale=scale), format, x.dtype)

    return cast(QTensor, automatic(encoded, x, qparams, key, specs=like(x)))


@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program where it is called eagerly
def _encoded(
    arithmetic: Arithmetic, x: jax.Array, qparams: QParams, key: PRNGKeyArray | None
) -> tuple[jax.Array, jax.Array]:
    """Codes, one an entry; and the scale, NaN where it is none or the width has no codes."""
    format = arithmetic.format
    codes = encode_codes(x, qparams, format, arithmetic.rounding, key, arithmetic.scaling)
    scale, bits = (jnp.asarray(a, jnp.float32) for a in (qparams.scale, qparams.bits))
    usable = is_positive(scale) & format.valid_bits(bits, qparams.theta) & (bits != 0.0)
    return codes, select(usable, scale, jnp.nan)


def like(x: jax.Array) -> Callable[[QTensor], QTensor]:
    """How the codes of ``x`` are split over a mesh: as it is, scales copied."""

    def specs(found: QTensor) -> QTensor:
        spec = spec_of(x, found.stored.shape)
        return QTensor(spec, REPLICATED, found.format, found.dtype, found.packing)

    return specs


def encode_codes(
    x: Float[Array, "..."],
    qparams: QParams,
    format: Format,
    rounding: Rounding = HALF_EVEN,
    key: PRNGKeyArray | None = None,
    scaling: Scaling = DIVIDED,
) -> Int[Array, "..."]:
    """The codes alone, one an entry, nothing checked."""
    zero_point = jnp.round(expand(jnp.asarray(qparams.zero_point, jnp.float32), x.shape))
    arithmetic = Arithmetic(format, rounding, scaling=scaling)
    levels = centered_codes(x, qparams, arithmetic, key)
    levels = levels + zero_point if format.has_zero_point else levels  # -0 + 0 is 0
    spread = lambda array: expand(jnp.asarray(array, jnp.float32), x.shape)  # noqa: E731
    theta = format.map_groups(qparams.theta, spread)
    return format.encode(levels, jnp.asarray(qparams.bits, jnp.float32), theta)


def packed(codes: Int[Array, "..."], qparams: QParams, format: Format, dtype: Any) -> QTensor:
    """A :class:`QTensor` of codes that come one an entry."""
    if not can_pack(format.code_bits, codes.ndim):
        return QTensor(codes, qparams, format, dtype)
    stored, packing = pack(codes, format.code_bits, signed=codes.dtype == jnp.int8)
    return QTensor(stored, qparams, format, dtype, packing)


def _check_bits(x: Any, qparams: QParams, format: Format) -> None:
    bits = concrete(qparams.bits)
    if bits is not None and np.any(bits == 0):
        raise errors.BitsError(
            "a tensor at 0 bits (bypass) has no codes",
            where=f"qj.encode of shape {jnp.shape(x)}",
            fix="give a width of 1 or more, or keep the float tensor",
        )
    if format.known_valid(qparams.bits, qparams.theta) is False:
        raise errors.BitsError(
            f"bits = {bits} is no width of {format.name} in a container of {format.max_bits} bits",
            where=f"qj.encode of shape {jnp.shape(x)}",
            why="codes that the container does not hold would be stored as others",
            fix=f"a whole number up to {format.max_bits}, or a larger container",
        )
