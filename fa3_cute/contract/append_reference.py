"""What becomes of a cache and of q before attention: rotary positions, new keys and values. Part of reference.py, which
says what every option means. NumPy only.

Pairs of the first rotary_dim elements of a row at position p turn by the angles whose cosines and sines are row p of
rotary_cos and rotary_sin:

    x[a] = x[a] cos[p, i] - x[b] sin[p, i]
    x[b] = x[a] sin[p, i] + x[b] cos[p, i]      (a, b) = (2i, 2i + 1) if interleaved, else (i, i + rotary_dim / 2)

New key t of a sequence is at position start + t, where start is seqlens_rotary, else the old length. Query i is at
start + i under a mask (causal, window or chunk), else at start. Without new keys queries are at start + i, and start is
seqlens_rotary, else n_k - n_q. Positions outside of the tables are their first or last row.

New key t, rotated, and new value t are then row n + t of the sequence, n the old length; those beyond the capacity are
dropped. Rotated rows are rounded to the element type that they are stored in.

New rows of more bits than an FP8 cache are quantised, rotated ones without being rounded before: what is rounded to
E4M3 is the float32 quotient of a number and the descale of its sequence and KV head, k's or v's, saturated at +-448.
"""

from typing import Any

import numpy as np

from .number_formats import as_float, e4m3_bits, to_bits
from .rows import cached_rows, descales_of, used_rows


def rotated(x: np.ndarray, positions: np.ndarray, options: Any) -> np.ndarray:
    """Rows [rows, heads, head_dim] at these positions [rows], in x's element type.

    options   rotary_cos and rotary_sin [positions, rotary_dim / 2], rotary_interleaved
    """
    columns = slice(2 * np.shape(options.rotary_cos)[1])
    found = x.copy()  # behind rotary_dim the bits as they are
    found[..., columns] = stored(turned(x, positions, options)[..., columns], x)
    return found


def turned(x: np.ndarray, positions: np.ndarray, options: Any) -> np.ndarray:
    """The same before it is rounded, float64."""
    cos, sin = (as_float(np.asarray(table), np.float64) for table in (options.rotary_cos, options.rotary_sin))
    half = cos.shape[1]
    places = np.clip(positions, 0, len(cos) - 1)
    cos, sin = cos[places][:, None], sin[places][:, None]
    first, second = slice(0, half), slice(half, 2 * half)
    if options.rotary_interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    wide = as_float(x, np.float64)
    a, b = wide[..., first], wide[..., second]
    found = wide.copy()
    found[..., first], found[..., second] = a * cos - b * sin, a * sin + b * cos
    return found


def quantised(x: np.ndarray, descale: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Numbers [rows, heads, columns], divided by the descales [heads], in the element type of an FP8 array."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # as on a device
        bits = e4m3_bits(x.astype(np.float32) / descale.astype(np.float32)[:, None])
    return bits.view(like.dtype)


def is_fp8(x: np.ndarray) -> bool:
    """Bits, or ml_dtypes' own type."""
    return x.dtype == np.uint8 or x.dtype.name == "float8_e4m3fn"


def stored(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Numbers in the element type of an array, whose uint16 are BF16 bits, and whose uint8 are those of FP8."""
    if like.dtype == np.uint16:
        return to_bits(values, "bf16")
    return e4m3_bits(values) if like.dtype == np.uint8 else values.astype(like.dtype)


def updated(q: np.ndarray, k: np.ndarray, v: np.ndarray, options: Any) -> tuple[np.ndarray, Any]:
    """(q that is rotated, seqused_k with the new rows); these are written to k and v, in place.

    options   as reference.Options, integers as int64. Raises ValueError for what does not fit together.
    """
    _check(k, v, options)
    q_rows = used_rows(q, options.cu_seqlens_q, options.seqused_q)
    batch, has_new = len(q_rows), options.k_new is not None
    starts = old = np.zeros(batch, int)
    used, new_rows = options.seqused_k, []
    if has_new:
        capacity = _capacity(k, options)
        starts = old = np.minimum(used, capacity)
        new_rows = used_rows(options.k_new, options.cu_seqlens_k_new)
        if len(new_rows) != batch:
            raise ValueError(f"k_new.shape={options.k_new.shape}: must have rows for each of {batch} sequences")
        used = np.minimum(old + [rows.stop - rows.start for *_, rows in new_rows], capacity)
    elif options.seqlens_rotary is None:
        starts = _key_lengths(k, batch, options) - [rows.stop - rows.start for *_, rows in q_rows]
    if options.seqlens_rotary is not None:
        starts = options.seqlens_rotary
    if options.rotary_cos is not None:
        q = _rotated_queries(q, q_rows, starts, options)
    if has_new:
        places = cached_rows(k, batch, used, options.page_table, options.kv_batch_idx)
        descales = [descales_of(of, getattr(options, f"{of}_descale"), batch, k.shape[-2]) for of in "kv"]
        for b, rows in enumerate(new_rows):
            keys, values = options.k_new[rows], options.v_new[rows]
            positions = starts[b] + np.arange(len(keys))
            if is_fp8(k) and not is_fp8(keys):
                wide = as_float(keys) if options.rotary_cos is None else turned(keys, positions, options)
                keys, values = quantised(wide, descales[0][b], k), quantised(as_float(values), descales[1][b], v)
            elif options.rotary_cos is not None:
                keys = rotated(keys, positions, options)
            _write(k, v, (keys, values), places[b], old[b])
    return q, used


def _capacity(k: np.ndarray, options: Any) -> int:
    return k.shape[1] * (1 if options.page_table is None else options.page_table.shape[1])


def _key_lengths(k: np.ndarray, batch: int, options: Any) -> np.ndarray:
    """n_k of each sequence."""
    if options.cu_seqlens_k is not None:
        lengths = np.diff(options.cu_seqlens_k)
        return lengths if options.seqused_k is None else options.seqused_k
    capacity = np.full(batch, _capacity(k, options))
    return capacity if options.seqused_k is None else np.minimum(options.seqused_k, capacity)


def _rotated_queries(q, q_rows, starts, options) -> np.ndarray:
    is_masked = options.causal or max(options.window_size) >= 0 or options.attention_chunk > 0
    turned = q.copy()
    for b, rows in enumerate(q_rows):
        queries = np.arange(rows[-1].stop - rows[-1].start) * (is_masked or options.k_new is None)
        turned[rows] = rotated(q[rows], starts[b] + queries, options)
    return turned


def _write(k, v, new, place, old: int) -> None:
    """The new rows of one sequence behind its old length, in place."""
    (keys, values), (pages, rows) = new, place
    if isinstance(rows, slice):
        count = rows.stop - old
        place = pages, slice(old, rows.stop)
    else:
        count = len(rows) - old
        place = pages[old:], rows[old:]
    k[place], v[place] = keys[:count], values[:count]


def _check(k, v, options) -> None:
    """Raise ValueError for the first rule that shapes and options break."""
    has_new, tables = options.k_new is not None, (options.rotary_cos, options.rotary_sin)
    packed = options.cu_seqlens_k_new is not None
    rules = (
        (lambda: has_new == (options.v_new is not None), "k_new, v_new: come together"),
        (lambda: has_new or not packed, "cu_seqlens_k_new: needs k_new"),
        (lambda: not has_new or options.seqused_k is not None, "k_new: needs seqused_k, the lengths before"),
        (lambda: not has_new or options.cu_seqlens_k is None, "k_new with cu_seqlens_k: packed, not a cache"),
        (lambda: (tables[0] is None) == (tables[1] is None), "rotary_cos, rotary_sin: come together"),
        (
            lambda: (
                not has_new or options.k_new.ndim == (3 if packed else 4) and options.k_new.shape[-2:] == k.shape[-2:]
            ),
            "k_new: must be [batch, rows, num_heads_k, head_dim], packed [rows, num_heads_k, head_dim]",
        ),
        (
            lambda: not has_new or options.v_new.shape == (*options.k_new.shape[:-1], v.shape[-1]),
            "k_new, v_new: must be alike, with the columns of v",
        ),
        (
            lambda: tables[0] is None or np.shape(tables[0]) == np.shape(tables[1]) and np.ndim(tables[0]) == 2,
            "rotary_cos, rotary_sin: must be [positions, rotary_dim / 2] both",
        ),
        (
            lambda: tables[0] is None or 0 < 2 * np.shape(tables[0])[1] <= k.shape[-1] and len(tables[0]) > 0,
            f"rotary_cos: must have a position, and at most head_dim / 2 = {k.shape[-1] // 2} columns",
        ),
    )
    for holds, sentence in rules:
        if not holds():
            raise ValueError(sentence)
