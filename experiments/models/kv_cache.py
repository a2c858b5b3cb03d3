"""Caches whose keys and values are integer codes, each position and head with a scale of its own.

The arithmetic is quantjax's: :func:`quantjax.affine.qparams_from_range` gives the scales,
:func:`quantjax.qtensor.encode_codes` the codes, and ``QTensor.dequantize`` reads them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.models.attention import CacheCodec, place_at
from quantjax import errors
from quantjax._compat import concrete
from quantjax.affine import QParams, qparams_from_range
from quantjax.formats import Format, IntegerFormat, integer
from quantjax.qtensor import QTensor, encode_codes, packed

NARROW_INT8 = integer(max_bits=8, narrow=True)
"""Codes ``-(2^(b-1)-1) .. 2^(b-1)-1``, so that the largest number of a head has a code of its own
and keys of either sign are treated alike."""


def quantized_cache(
    bits: Float[Array, ""] | Int[Array, ""] | int | None = None, *, format: Format = NARROW_INT8
) -> CacheCodec:
    """A codec that writes each position once, as codes ``q = clip(round(x / s))``.

    ``s`` is the largest absolute number of one position and head over the largest code, found when
    the position is written and never again. Reading gives ``s · q`` in float32.

    Args:
      bits: the width in use, 1 to ``format.max_bits``; may be traced, and is kept in the store, so
        that layers may be given widths each. None takes all bits of the format. One bit has no 0:
        positions that were not written read as 1, and are for a mask to hide.
      format: the codes; a container of 4, 2 or 1 bits is stored 2, 4 or 8 codes a byte.

    Raises:
      BitsError: a concrete width of 0, or one that the format does not hold. Traced, such a width
        makes scales NaN.
      QuantizerError: a format whose codes are not signed, or no integers.

    >>> import jax.numpy as jnp
    >>> codec = quantized_cache(3)
    >>> x = jnp.array([0.6, -1.5, 0.1, 0.0]).reshape(1, 1, 1, 4)
    >>> store = codec.write(codec.empty((1, 2, 1, 4)), x, jnp.int32(1))
    >>> store.codes[0, 1, 0].tolist(), float(store.qparams.scale[0, 1, 0, 0])
    ([1, -3, 0, 0], 0.5)
    >>> codec.read(store).ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.5, -1.5, 0.0, 0.0]
    """
    if not isinstance(format, IntegerFormat) or not format.signed:
        raise errors.QuantizerError(
            f"a cache of {format.name} codes",
            where="quantized_cache",
            why="keys and values have both signs, and their codes no zero point",
            fix="format=qj.integer(max_bits=8)",
        )
    width = format.max_bits if bits is None else bits
    known = concrete(width)
    if format.known_valid(width) is False or (known is not None and np.any(known == 0)):
        raise errors.BitsError(
            f"a cache of {known} bits",
            where=f"quantized_cache in {format.name}, {format.max_bits} bits a code",
            why="codes have at least one bit, and a whole number of them",
            fix=f"bits={format.max_bits}, or FLOAT_CACHE to keep floats",
        )
    bits = jnp.asarray(width, jnp.float32)
    # Width 0 passes tensors through elsewhere; codes cannot, and NaN makes the scales say so.
    return CacheCodec(
        partial(_empty, bits=jnp.where(bits == 0.0, jnp.nan, bits), format=format), _write, _read
    )


def _empty(shape: tuple[int, ...], *, bits: jax.Array, format: Format) -> QTensor:
    per_head = (*shape[:-1], 1)
    # Symmetric codes have one zero point, which is 0, for all positions.
    qparams = QParams(
        jnp.ones(per_head, jnp.float32), jnp.zeros((1,) * len(shape), jnp.float32), bits
    )
    return _coded(jnp.zeros(shape, jnp.float32), qparams, format)


def _write(store: QTensor, values: jax.Array, position: jax.Array) -> QTensor:
    values = values.astype(jnp.float32)
    low, high = (reduce(values, axis=-1, keepdims=True) for reduce in (jnp.min, jnp.max))
    found = qparams_from_range(
        low,
        high,
        store.qparams.bits,
        format=store.format,
        symmetric=True,
        calibrated=jnp.asarray(True),
    )
    new = _coded(values, found, store.format)
    return QTensor(
        place_at(store.stored, new.stored, position),
        store.qparams._replace(scale=place_at(store.qparams.scale, found.scale, position)),
        store.format,
        store.dtype,
        store.packing,
    )


def _coded(values: jax.Array, qparams: QParams, format: Format) -> QTensor:
    return packed(encode_codes(values, qparams, format), qparams, format, jnp.dtype(jnp.float32))


def _read(store: Any) -> jax.Array:
    return store.dequantize()
