"""A tensor held as codes: :class:`QTensor`, and :func:`encode`, which makes one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams
from quantjax.fake_quant import Arithmetic, centered_codes, check_floating
from quantjax.formats import Format
from quantjax.granularity import expand
from quantjax.rounding import HALF_EVEN, Rounding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "qparams"),
    meta_fields=("format", "dtype"),
)
class QTensor:
    """Integer codes with the parameters that give them meaning; a pytree.

    Groups are found from the shapes of codes and scale, never from stored axes, so a ``QTensor``
    survives ``vmap``, ``scan``, slicing and stacking of its leaves.

    Attributes:
      codes: integers in ``format.storage_dtype``, one an entry.
      qparams: scale, zero point and width.
      format: static.
      dtype: static; what :meth:`dequantize` returns and what the float tensor was.
    """

    codes: Int[Array, "..."]
    qparams: QParams
    format: Format
    dtype: jnp.dtype

    def __init__(self, codes: Any, qparams: QParams, format: Format, dtype: Any) -> None:
        self.codes, self.qparams = codes, qparams
        self.format, self.dtype = format, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the codes stand for."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Rank of the tensor."""
        return int(self.codes.ndim)

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(self.codes.size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and parameters together."""
        leaves = jax.tree.leaves((self.codes, self.qparams))
        return sum(int(leaf.size) * int(leaf.dtype.itemsize) for leaf in leaves)

    def dequantize(self) -> Float[Array, "..."]:
        """``scale · (codes - round(zero_point))``, in float32, cast to ``dtype``."""
        scale = expand(jnp.asarray(self.qparams.scale, jnp.float32), self.codes.shape)
        zero_point = expand(jnp.asarray(self.qparams.zero_point, jnp.float32), self.codes.shape)
        centered = self.codes.astype(jnp.float32) - jnp.round(zero_point)
        return (centered * scale).astype(self.dtype)

    def __repr__(self) -> str:
        # Leaves need not be arrays: trees of shapes, of None, of booleans are printed as well.
        shape = "x".join(map(str, getattr(self.codes, "shape", ()))) or "scalar"
        scales = "x".join(map(str, getattr(self.qparams.scale, "shape", ()))) or "scalar"
        bits = concrete(self.qparams.bits)
        if bits is None or not np.issubdtype(bits.dtype, np.number):  # a tracer or a spec
            width = "?"
        else:
            width = ",".join(f"{b:g}" for b in np.ravel(bits)[:4])
        return f"QTensor({self.format.name}{width}[{shape}], scale[{scales}], {self.dtype})"


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a :class:`QTensor`; for the ``is_leaf`` of tree functions."""
    return isinstance(leaf, QTensor)


def encode(
    x: Float[Array, "..."], qparams: QParams, format: Format, *, rounding: Rounding = HALF_EVEN
) -> QTensor:
    """The codes of ``x``: ``clip(round(x/s) + z, low, high)``, stored in the format's container.

    ``encode(x, p, f).dequantize()`` equals ``fake_quant`` of ``x`` exactly.

    Args:
      x: float array; float32 arithmetic whatever its dtype.
      qparams: its parameters; ``bits`` may be traced but must not be 0.

    Raises:
      BitsError: a concrete width of 0: a tensor that passes through has no codes; or one that the
        container does not hold.
      DataError: a concrete tensor with NaN, for which no integer code stands. Under a trace, check
        beforehand: an integer array cannot carry NaN.

    >>> import jax.numpy as jnp
    >>> from quantjax.formats import integer
    >>> p = QParams(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(8.0))
    >>> encode(jnp.array([1.2, 3.5, -127.5, 129.0, -1300.0]), p, integer()).codes.tolist()
    [1, 4, -128, 127, -128]
    """
    bits = concrete(qparams.bits)
    if bits is not None and np.any(bits == 0):
        raise errors.BitsError(
            "a tensor at 0 bits (bypass) has no codes",
            where=f"qj.encode of shape {jnp.shape(x)}",
            fix="give a width of 1 or more, or keep the float tensor",
        )
    if bits is not None and not np.all(np.isin(bits, np.arange(1, format.max_bits + 1))):
        raise errors.BitsError(
            f"bits = {bits} is no width of a container of {format.max_bits} bits",
            where=f"qj.encode of shape {jnp.shape(x)}",
            why="codes that the container does not hold would be stored as others",
            fix=f"a whole number from 1 to {format.max_bits}, or qj.integer(max_bits=16)",
        )
    known = concrete(x)
    if known is not None and np.any(np.isnan(known)):
        raise errors.DataError(
            "the tensor holds NaN, for which no code stands",
            where=f"qj.encode of shape {known.shape}",
            fix="find its source with jax.config.update('jax_debug_nans', True)",
        )
    x = jnp.asarray(x)
    check_floating(x, "qj.encode")
    arithmetic = Arithmetic(format, rounding)
    zero_point = jnp.round(expand(jnp.asarray(qparams.zero_point, jnp.float32), x.shape))
    codes = centered_codes(x, qparams, arithmetic) + zero_point
    return QTensor(codes.astype(format.storage_dtype), qparams, format, x.dtype)
