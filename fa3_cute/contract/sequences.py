"""The rules of sequences: how many rows they have, and whether they are packed, dense, in a cache or in pages.

Packed queries go with packed keys, or with the keys of a cache, which dense queries have too: seqlen_k rows for each
sequence, of which seqused_k are used, dense or in pages. Pure Python.
"""

from .formats import MAX_SPLITS
from .limits import MAX_MASKED_ROWS, MAX_SIZE, MAX_TILES, SMALLEST_TILE_M
from .params import OFF, AttentionMode, has_packed_keys, is_packed, is_paged
from .plain import BAD
from .sentences import Sentences, is_int, must
from .status import shown


def are_totals_missing(p) -> bool:
    """Packed queries with packed keys have rows of one of them at least; a cache always has its own."""
    return has_packed_keys(p) and p.total_q in OFF and p.total_k in OFF


def varlen(p) -> Sentences:
    """The rule of what is given together where sequences are packed, and of what is not."""
    if not is_packed(p):
        return _off(p, ("total_q", "total_k", "max_seqlen_q"), "without cu_seqlens_q")
    found: list[str] = []
    if not p.cu_seqlens_q:
        found.append(must(p, "cu_seqlens_q", "a device address: cu_seqlens_k and VARLEN_PREFILL need packed queries"))
    if has_packed_keys(p):
        found += _packed_keys(p)
    else:
        found += _off(p, ("total_k",), "without cu_seqlens_k: seqlen_k and seqused_k say how many keys there are")
    if p.mode is not AttentionMode.VARLEN_PREFILL and p.mode is not BAD:
        found.append(must(p, "mode", "AttentionMode.VARLEN_PREFILL with cu_seqlens_q"))
    return found


def _packed_keys(p) -> Sentences:
    found: list[str] = []
    if not p.cu_seqlens_k:
        found.append(must(p, "cu_seqlens_k", "a device address: cu_seqlens_q needs cu_seqlens_k, or seqused_k"))
    if are_totals_missing(p):
        raw = getattr(p, "raw", p)
        stated = f"total_q={shown(raw.total_q)}, total_k={shown(raw.total_k)}"
        found.append(f"{stated}: must be the rows of packed q and of packed k and v; one of them may be 0")
    return [*found, *_off(p, ("page_table", "kv_batch_idx", "batch_size_k"), "with cu_seqlens_k: packed, not a cache")]


def _off(p, fields: tuple[str, ...], reason: str) -> list[str]:
    """A sentence for each of the fields that is given."""
    return [must(p, name, f"None or 0 {reason}") for name in fields if getattr(p, name) not in OFF]


def rows_of(p) -> tuple[tuple[str, int], tuple[str, int]]:
    """(field, least value) of the rows of q and of the keys: those of each sequence, or of all packed ones."""
    packed = is_packed(p)
    packed_keys = packed and has_packed_keys(p)
    return ("total_q", 0) if packed else ("seqlen_q", 1), ("total_k", 0) if packed_keys else ("seqlen_k", 1)


def sizes(p) -> Sentences:
    """The rule of the numbers of sequences and rows, and of the tiles that they make."""
    (name_q, least_q), (name_k, least_k) = rows_of(p)
    batch, rows, keys = p.batch_size, getattr(p, name_q), getattr(p, name_k)
    if not (
        type(batch) is type(rows) is type(keys) is int
        and 1 <= batch <= MAX_SIZE
        and least_q <= rows <= MAX_SIZE
        and least_k <= keys <= MAX_SIZE
    ):
        least = {"batch_size": 1, name_q: least_q, name_k: least_k}
        return [
            must(p, name, f"an int from {least[name]} to {MAX_SIZE}")
            for name in least
            if not is_int(getattr(p, name), least[name], MAX_SIZE)
        ]
    heads = p.num_heads
    if type(heads) is not int or heads < 1:
        return ()
    # Every packed sequence may end in a partly filled tile of its own.
    tiles = rows // SMALLEST_TILE_M + batch if is_packed(p) else batch * -(-rows // SMALLEST_TILE_M)
    splits = max(1, p.num_splits) if type(p.num_splits) is int else 1
    if is_int(p.fixed_split_size, 1, MAX_SIZE):
        splits = max(splits, -(-keys // p.fixed_split_size))
    if heads * tiles * splits <= MAX_TILES:
        return ()
    stated = f"batch_size={batch}, num_heads={shown(heads)}, {name_q}={rows}"
    times = f" in {shown(splits)} splits" if splits > 1 else ""
    return [
        (
            f"{stated}{times}: must make at most {MAX_TILES} tiles of {SMALLEST_TILE_M} rows, "
            f"not {shown(heads * tiles * splits)}"
        )
    ]


def cache_sizes(p) -> Sentences:
    """The rule of the entries of a cache, and of the bound of packed queries."""
    entries, longest, batch = p.batch_size_k, p.max_seqlen_q, p.batch_size
    if entries == longest == 0 and not p.kv_batch_idx:
        return ()
    found = []
    if p.kv_batch_idx and not is_int(entries, 1, MAX_SIZE):
        found.append(must(p, "batch_size_k", f"an int from 1 to {MAX_SIZE} with kv_batch_idx"))
    elif entries != 0 and not p.kv_batch_idx and not (is_int(batch, 1, MAX_SIZE) and is_int(entries, batch, MAX_SIZE)):
        accepted = f"0 or an int from batch_size={shown(batch)} to {MAX_SIZE} without kv_batch_idx"
        found.append(must(p, "batch_size_k", accepted))
    if not is_int(longest, 0, MAX_SIZE):
        found.append(must(p, "max_seqlen_q", f"an int from 0 (unknown) to {MAX_SIZE}"))
    return found


def padded_places(p) -> Sentences:
    """The rule of what left padding has no kernel for: what counts keys from the sequence's first row."""
    if not p.leftpad_k:
        return ()
    reason = "with leftpad_k: keys are counted from the first that exists"
    found = _off(p, ("attn_mask", "p_dropout"), reason)
    return found + [
        must(p, name, f"None {reason}") for name in ("score_mod", "mask_mod") if getattr(p, name) is not None
    ]


def is_masked(p) -> bool:
    """There is a mask, which counts from the diagonal."""
    bounds = p.window_size_left, p.window_size_right
    is_chunked = p.attention_chunk is not BAD and bool(p.attention_chunk)
    return p.is_causal is True or is_chunked or any(type(bound) is int and bound >= 0 for bound in bounds)


def masked_sizes(p) -> Sentences:
    """The rule of how many rows may meet under a mask."""
    (name_q, _), (name_k, _) = rows_of(p)
    rows_q, rows_k = getattr(p, name_q), getattr(p, name_k)
    if type(rows_q) is not int or type(rows_k) is not int or rows_q + rows_k <= MAX_MASKED_ROWS:
        return ()
    if not (is_int(rows_q, 0, MAX_SIZE) and is_int(rows_k, 0, MAX_SIZE)):  # the rule before this one has said so
        return ()
    stated = f"{name_q}={rows_q}, {name_k}={rows_k}"
    return [f"{stated}: must add up to at most {MAX_MASKED_ROWS} with is_causal, a window or attention_chunk"]


def has_fixed_splits(p) -> bool:
    """Splits are so many keys, not so many of a sequence."""
    return type(p.fixed_split_size) is int and p.fixed_split_size > 0


def fixed_splits(p) -> Sentences:
    """The rule of how many splits of so many keys a sequence may have."""
    _, (name, _) = rows_of(p)
    keys, most = getattr(p, name), p.max_num_splits
    if not (is_int(keys, 0, MAX_SIZE) and is_int(most, 0, MAX_SPLITS)):  # of these other rules speak
        return ()
    most = most or MAX_SPLITS
    least = -(-keys // most)
    if p.fixed_split_size >= least:
        return ()
    return [must(p, "fixed_split_size", f"at least {least}, so that {name}={keys} is at most {most} splits")]


def pages(p) -> Sentences:
    """The rule of the page table and of the pages."""
    stride, counts = p.page_table_batch_stride, ("page_size", "num_pages")
    if not is_paged(p):
        if not (p.page_size or p.num_pages or stride):
            return ()
        return _off(p, (*counts, "page_table_batch_stride"), "without page_table")
    found = []
    if not p.seqused_k:
        found.append(must(p, "seqused_k", "a device address with page_table: the used rows of each sequence"))
    bad = [name for name in counts if not is_int(getattr(p, name), 1, MAX_SIZE)]
    found += [must(p, name, f"an int from 1 to {MAX_SIZE} with page_table") for name in bad]
    if not bad and is_int(p.seqlen_k, 1, MAX_SIZE) and p.seqlen_k % p.page_size:
        found.append(must(p, "seqlen_k", f"a multiple of page_size={p.page_size}"))
    # As with the tensors' strides, that of a table of one row means nothing.
    is_one_row = (p.batch_size_k or p.batch_size) == 1
    if stride is None or type(stride) is int and (is_one_row or 0 <= stride <= MAX_SIZE):
        return found
    accepted = f"None (contiguous: seqlen_k / page_size) or an int from 0 to {MAX_SIZE}, in entries"
    return [*found, must(p, "page_table_batch_stride", accepted)]
