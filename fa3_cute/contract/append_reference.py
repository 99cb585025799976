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
"""

from typing import Any

import numpy as np

from .number_formats import as_float, e4m3_bits, to_bits
from .rows import cached_rows, used_rows


def rotated(x: np.ndarray, positions: np.ndarray, options: Any) -> np.ndarray:
    """Rows [rows, heads, head_dim] at these positions [rows], in x's element type.

    options   rotary_cos and rotary_sin [positions, rotary_dim / 2], rotary_interleaved
    """
    cos, sin = (as_float(np.asarray(table), np.float64) for table in (options.rotary_cos, options.rotary_sin))
    half = cos.shape[1]
    places = np.clip(positions, 0, len(cos) - 1)
    cos, sin = cos[places][:, None], sin[places][:, None]
    first, second = slice(0, half), slice(half, 2 * half)
    if options.rotary_interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    wide = as_float(x, np.float64)
    a, b = wide[..., first], wide[..., second]
    turned = x.copy()
    turned[..., first], turned[..., second] = stored(a * cos - b * sin, x), stored(a * sin + b * cos, x)
    return turned


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
        for b, rows in enumerate(new_rows):
            _write(k, v, (options.k_new[rows], options.v_new[rows]), (places[b], old[b], starts[b]), options)
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


def _write(k, v, new, sequence, options) -> None:
    """The new rows of one sequence: where it lies, its old length, the position of its first new key."""
    (keys, values), ((pages, rows), old, start) = new, sequence
    if options.rotary_cos is not None:
        keys = rotated(keys, start + np.arange(len(keys)), options)
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
