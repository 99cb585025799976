"""Where the rows of each sequence lie in arrays: dense, packed, in the entries of a cache, in pages; and its descales.
NumPy only.
"""

import numpy as np


def used_rows(tensor, cu_seqlens=None, seqused=None, name: str = "seqused_q") -> list[tuple]:
    """Per sequence, the index of its used rows in `tensor`: (b, slice) if dense, (slice,) with cu_seqlens.

    Arguments as `attention_reference`; name is that of seqused. Raises ValueError for a used length that its sequence
    does not have.
    """
    if cu_seqlens is None:
        starts, lengths = np.zeros(len(tensor), int), np.full(len(tensor), tensor.shape[1])
    else:
        starts, lengths = np.asarray(cu_seqlens)[:-1], np.diff(cu_seqlens)
    used = lengths if seqused is None else np.asarray(seqused)
    if used.shape != lengths.shape or (used < 0).any() or (used > lengths).any():
        sentence = f"one entry per sequence, from 0 to its length {lengths.tolist()}"
        raise ValueError(f"{name} {used.tolist()}: must be {sentence}")
    rows = [slice(int(start), int(start + n)) for start, n in zip(starts, used, strict=True)]
    return list(enumerate(rows)) if cu_seqlens is None else [(r,) for r in rows]


def cached_rows(k, batch: int, seqused_k, page_table, kv_batch_idx) -> list[tuple]:
    """Per sequence, the index of its used rows in the k and v of a cache: (entry, slice), or (pages, rows) in pages.

    k      [entries, capacity, num_heads_k, head_dim], with page_table [num_pages, page_size, num_heads_k, head_dim]
    others as `attention_reference`; int64 or None

    Used lengths beyond the capacity are the capacity, as on a device. No entry of the table past the used pages is
    read. Raises ValueError for entries, used pages and used lengths that do not exist.
    """
    in_pages = page_table is not None
    name, cache, capacity = "k", k, k.shape[1]
    if in_pages:
        name, cache, capacity = "page_table", page_table, page_table.shape[1] * k.shape[1]
    entries = np.arange(batch) if kv_batch_idx is None else kv_batch_idx
    if kv_batch_idx is None and len(cache) != batch:
        raise ValueError(f"{name}.shape={cache.shape}: must have a row for each of {batch} sequences, or kv_batch_idx")
    if entries.shape != (batch,) or (entries < 0).any() or (entries >= len(cache)).any():
        sentence = f"one entry for each of {batch} sequences, from 0 to {len(cache) - 1}, a row of {name}"
        raise ValueError(f"kv_batch_idx {entries.tolist()}: must be {sentence}")
    used = np.full(batch, capacity) if seqused_k is None else seqused_k
    if used.shape != (batch,) or (used < 0).any():
        raise ValueError(f"seqused_k {used.tolist()}: must be one entry for each of {batch} sequences, at least 0")
    rows = zip(entries.tolist(), np.minimum(used, capacity).tolist(), strict=True)
    if not in_pages:
        return [(entry, slice(0, n)) for entry, n in rows]
    return [_paged_rows(page_table, entry, n, k.shape) for entry, n in rows]


def _paged_rows(page_table, entry: int, used: int, pool: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(page of each used row, its row there)."""
    num_pages, page_size, *_ = pool
    pages = page_table[entry, : -(-used // page_size)]
    if (pages < 0).any() or (pages >= num_pages).any():
        sentence = f"pages from 0 to {num_pages - 1}, as far as they are used"
        raise ValueError(f"page_table[{entry}] {pages.tolist()}: must be {sentence}")
    rows = np.arange(used)
    return pages[rows // page_size], rows % page_size


def descales_of(name: str, descale, batch: int, heads: int) -> np.ndarray:
    """float64 [batch, heads] of what an option has, None: 1; name is "q", "k" or "v"."""
    descale = np.asarray(1.0 if descale is None else descale, np.float64)
    try:
        return np.broadcast_to(descale, (batch, heads))
    except ValueError as error:
        sentence = f"must broadcast to [batch, heads] = [{batch}, {heads}]"
        raise ValueError(f"{name}_descale.shape={descale.shape}: {sentence}") from error


def are_offsets(offsets: np.ndarray, total: int) -> bool:
    """They never fall and stay within so many packed rows."""
    return bool(offsets.size and offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= total)
