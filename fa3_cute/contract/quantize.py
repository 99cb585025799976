"""Float arrays to FP8 E4M3 with their descales, and back: real value = FP8 value * descale. NumPy and ml_dtypes only.

For arrays on the host. Users of CuPy, JAX and PyTorch quantise on the device with their own library, in the same three
steps: descale = amax / 448; x / descale, clipped to +-448; cast.
"""

from typing import Any

import numpy as np

from .number_formats import as_float
from .rows import used_rows

LARGEST = 448.0  # of E4M3, which has no infinity
# A descale that a GPU flushes to zero would take all values with it: none is below the normal numbers of FP32.
SMALLEST_DESCALE = 2.0**-126
# Granularity -> the axes of amax [batch, heads] that share a descale.
SHARED_AXES = {"tensor": (0, 1), "head": (0,), "batch_head": ()}
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Elements at a time: their temporary arrays then stay in the L2 cache of a CPU core.
CHUNK = 1 << 16


def quantize_fp8(x, granularity: str = "tensor", *, descale=None, cu_seqlens=None, seqused=None):
    """(FP8 array, descale): x / descale, saturated at +-448 and rounded to the nearest E4M3 number, ties to even.

    x            [batch, seqlen, heads, head_dim] or packed [total, heads, head_dim]; any strides; float16, bfloat16 (of
                 ml_dtypes), float32 or float64
    granularity  what one descale is for: "tensor" all of x; "head" a head of all sequences; "batch_head" a head of one
                 sequence, packed ones being told apart by cu_seqlens
    descale      given scales, such as a KV cache keeps: a number, [heads], [batch, 1] or [batch, heads], positive;
                 granularity then says nothing. None: amax / 448, in float32, which uses all of the range of E4M3
    cu_seqlens   [batch + 1] first rows of the packed sequences, then their end; seqused [batch] rows used of each

    The FP8 array is ml_dtypes.float8_e4m3fn, C-contiguous, of x's shape; rows that no sequence uses may hold anything
    in x and are 0 in it. The descale is float32, of shape [], [heads] or [batch, heads] (a given one keeps its shape),
    as `attention` takes it; in FlashAttentionParams its batch and head strides are 0 and 0, 0 and 1, or heads and 1.
    What is all zeros gets 1.0, an amax below 448 * 2^-126 gets 2^-126. What is rounded to E4M3 is the float32 quotient.

    Raises ValueError for NaN and infinities, naming the first, for values whose descale would be infinite, and for
    arguments that do not fit together; TypeError for what is no NumPy array; ImportError without ml_dtypes.
    """
    float8 = _float8_e4m3fn()
    _check("x", x, FLOATS, cu_seqlens)
    sequences = _sequences(x, cu_seqlens, seqused)
    if descale is None:
        descale = _measured_descale(x, sequences, _shared_axes(x, granularity, cu_seqlens))
    descale, of_head = _per_head(descale, len(sequences), x.shape[-2])
    fp8 = np.zeros(x.shape, float8)
    for sequence, rows, values in _chunks(x, sequences):
        with np.errstate(over="ignore"):  # by a small given descale: saturated all the same
            scaled = values / of_head[sequence, :, None]
        fp8[rows] = np.clip(scaled, -LARGEST, LARGEST).astype(float8)  # the cast alone makes NaN of 465
    return fp8, descale


def dequantize_fp8(fp8, descale, *, cu_seqlens=None):
    """FP8 values * descale, as float32 of the same shape, C-contiguous.

    fp8         [batch, seqlen, heads, head_dim] or packed [total, heads, head_dim]: ml_dtypes.float8_e4m3fn, or uint8
                of the bits; any strides
    descale     a number, [heads], [batch, 1] or [batch, heads]
    cu_seqlens  [batch + 1] for packed sequences with descales of their own; rows outside all sequences become 0

    Raises ValueError for arguments that do not fit together, TypeError for what is no NumPy array.
    """
    _check("fp8", fp8, ("float8_e4m3fn", "uint8"), cu_seqlens)
    sequences = _sequences(fp8, cu_seqlens, None)
    _, of_head = _per_head(descale, len(sequences), fp8.shape[-2])
    x = np.zeros(fp8.shape, np.float32)
    for sequence, rows in enumerate(sequences):
        x[rows] = as_float(fp8[rows]) * of_head[sequence, :, None]
    return x


# ---- descales --------------------------------------------------------------------------------------------------------


def _shared_axes(x, granularity: str, cu_seqlens) -> tuple[int, ...]:
    if granularity not in SHARED_AXES:
        raise ValueError(f"granularity={granularity!r}: must be one of {', '.join(SHARED_AXES)}")
    if granularity == "batch_head" and x.ndim == 3 and cu_seqlens is None:
        raise ValueError("granularity='batch_head' of packed rows: cu_seqlens must say where the sequences begin")
    return SHARED_AXES[granularity]


def _measured_descale(x, sequences, shared_axes) -> np.ndarray:
    """amax / 448 of what shares a descale."""
    amax = np.zeros((len(sequences), x.shape[-2]))
    for sequence, _, values in _chunks(x, sequences):
        np.maximum(amax[sequence], np.abs(values).max(axis=(0, 2), initial=0), out=amax[sequence])
    amax = np.max(amax, axis=shared_axes, initial=0)
    with np.errstate(over="ignore"):
        descale = np.asarray(np.where(amax > 0, np.maximum(amax / LARGEST, SMALLEST_DESCALE), 1), np.float32)
    if not np.isfinite(descale).all():
        raise ValueError(f"x holds values up to {amax.max():.1e}: a float32 descale reaches 448 * 3.4e38")
    return descale


def _per_head(descale, batch: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The descale as a float32 array of its own shape, and as one of [batch, heads]."""
    with np.errstate(over="ignore"):
        descale = np.array(descale, np.float32)
    if not (np.isfinite(descale) & (descale > 0)).all():
        raise ValueError("descale: must be positive and finite in float32")
    try:
        return descale, np.broadcast_to(descale, (batch, heads))
    except ValueError as error:
        raise ValueError(
            f"descale {descale.shape}: must broadcast to [batch, heads] = [{batch}, {heads}]; packed "
            "sequences are told apart by cu_seqlens"
        ) from error


# ---- rows ------------------------------------------------------------------------------------------------------------


def _sequences(x, cu_seqlens, seqused) -> list[tuple]:
    """Per sequence, the index of its used rows; packed rows without cu_seqlens are one sequence."""
    if x.ndim == 3 and cu_seqlens is None:
        cu_seqlens = (0, len(x))
    return used_rows(x, cu_seqlens, seqused)


def _chunks(x, sequences):
    """Yield (sequence, index of some of its rows, their values as floats), through all used rows. Finite ones only."""
    dtype: Any = np.float64 if x.dtype == np.float64 else np.float32
    step = max(1, CHUNK // max(1, x.shape[-2] * x.shape[-1]))
    for sequence, (*outer, rows) in enumerate(sequences):
        for first in range(rows.start, rows.stop, step):
            index = (*outer, slice(first, min(first + step, rows.stop)))
            values = as_float(x[index], dtype)
            is_finite = np.isfinite(values)
            if not is_finite.all():
                row, *place = np.argwhere(~is_finite)[0].tolist()
                place = [*outer, first + row, *place]
                raise ValueError(f"x{place} is {x[tuple(place)]}: must be finite (seqused leaves padding out)")
            yield sequence, index, values


def _check(name: str, array, dtypes: tuple[str, ...], cu_seqlens) -> None:
    """Raise for the first rule that the array and its packing break."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(array).__name__}")
    if array.dtype.name not in dtypes:
        raise ValueError(f"{name} is {array.dtype.name}: must be one of {', '.join(dtypes)}")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} {array.shape}: must be [batch, seqlen, heads, head_dim] or [total, heads, head_dim]")
    if cu_seqlens is None:
        return
    if array.ndim == 4:
        raise ValueError(f"cu_seqlens with {name} {array.shape}: packed rows are [total, heads, head_dim]")
    offsets = np.asarray(cu_seqlens)
    if (
        offsets.ndim != 1
        or not offsets.size
        or offsets.dtype.kind not in "iu"
        or offsets[0] < 0
        or (np.diff(offsets.astype(np.int64)) < 0).any()
        or offsets[-1] > len(array)
    ):
        raise ValueError(f"cu_seqlens {offsets.tolist()}: must be integers that never fall, of 0 to {len(array)} rows")


def _float8_e4m3fn():
    try:
        from ml_dtypes import float8_e4m3fn
    except ImportError as error:
        sentence = "quantize_fp8 needs ml_dtypes, which has NumPy's FP8: pip install 'fa3_cute[dtypes]'"
        raise ImportError(sentence) from error
    return float8_e4m3fn
