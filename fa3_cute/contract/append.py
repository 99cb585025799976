"""The rules of new keys and values, and of rotary positions; what their kernel takes. Pure Python."""

from dataclasses import replace
from operator import attrgetter

from .arguments import DECODE_ENTRY, Entry
from .fp8_cache import has_fp8_cache, keys_dtype
from .limits import DIMS, MAX_SIZE, TMA_ALIGNMENT, TMA_STRIDE_BYTES
from .params import OFF, DataType, has_packed_keys
from .plain import BAD
from .sentences import Sentences, is_int, must

ROTARY_STEP = 16  # of rotary_dim: the halves of a row are then whole pieces of 16 bytes
NEW_STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in ("k_new", "v_new") for dim in DIMS)
TABLE_BYTES = {DataType.FP16: 2, DataType.BF16: 2, DataType.FP32: 4}  # of an element of the rotary tables
_OF_NEW = ("seqlen_knew", "cu_seqlens_k_new", "kv_new_dtype")
_OF_ROTARY = ("rotary_dim", "rotary_positions", "rotary_row_stride", "rotary_dtype", "seqlens_rotary")
_read_new = attrgetter("k_new", "v_new", *_OF_NEW, *NEW_STRIDES)
_read_rotary = attrgetter("rotary_cos", "rotary_sin", "rotary_interleaved", *_OF_ROTARY)

# What the kernel takes: (name, element, alignment in bytes) of pointers, of which the first change in every call.
CHANGING = (("q", "input", 16), ("k", "stored", 16), ("v", "stored", 16))
DESCALES = (("k_descale", "float32", 4), ("v_descale", "float32", 4))  # where new rows are quantised
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "kv_batch_idx")
LISTS = ("cu_seqlens_k_new", "seqlens_rotary")
NEW_POINTERS = ("k_new", "v_new", "rotary_cos", "rotary_sin")
SCRATCH = (("rotated_q", "input", 16), ("new_lengths", "int32", 4))
POINTERS = (
    *((name, "int32", 4) for name in LENGTHS + LISTS),
    ("k_new", "input", 16),
    ("v_new", "input", 16),
    ("rotary_cos", "bytes", 16),
    ("rotary_sin", "bytes", 16),
    *SCRATCH,
)
STRIDES = (
    *(f"{tensor}_{dim}_stride" for tensor in ("q", "k", "v") for dim in DIMS),
    *NEW_STRIDES,
    "page_table_batch_stride",
    "rotary_row_stride",
)
KV_DESCALE_STRIDES = tuple(f"{name}_{dim}_stride" for name, *_ in DESCALES for dim in ("batch", "head"))
# query_step: positions from a query to the next, 0 or 1. num_new: rows of k_new, all together.
SIZES = (
    *("batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "head_dim", "head_dim_v", "page_size"),
    *(
        "num_pages",
        "batch_size_k",
        "seqlen_knew",
        "num_new",
        "num_queries",
        "rotary_dim",
        "rotary_positions",
        "query_step",
    ),
)


def _entry(changing: tuple, descale_strides: tuple[str, ...] = ()) -> Entry:
    return Entry(
        arguments=(
            *((name, "pointer") for name, *_ in changing + POINTERS),
            *((name, "int64") for name in STRIDES + descale_strides),
            *((name, "int32") for name in SIZES),
            ("stream", "stream"),
        ),
        per_call=(*(name for name, *_ in changing + SCRATCH), "stream"),
        fp8_only=frozenset(),
        optional=(),
        pointers=changing + POINTERS,
    )


APPEND_ENTRY = _entry(CHANGING)
# Of kernels that quantise what they append.
QUANTISE_ENTRY = _entry(CHANGING + DESCALES, KV_DESCALE_STRIDES)

# Of decode kernels that append one row to each sequence: what their entry takes besides, in front of the stream.
DECODE_POINTERS = ("seqlens_rotary", *NEW_POINTERS)
DECODE_STRIDES, DECODE_SIZES = (*NEW_STRIDES, "rotary_row_stride"), ("rotary_dim", "rotary_positions", "query_step")


def _of_decode() -> Entry:
    *others, stream = DECODE_ENTRY.arguments
    added = (
        *((name, "pointer") for name in DECODE_POINTERS),
        *((name, "int64") for name in DECODE_STRIDES),
        *((name, "int32") for name in DECODE_SIZES),
    )
    pointers = *DECODE_ENTRY.pointers, *(row for row in POINTERS if row[0] in DECODE_POINTERS)
    return replace(DECODE_ENTRY, arguments=(*others, *added, stream), pointers=pointers)


DECODE_APPEND_ENTRY = _of_decode()

# ---- the rules -------------------------------------------------------------------------------------------------------


def has_new_keys(p) -> bool:
    """Plain params append to the cache, or are meant to."""
    return bool(p.k_new or p.v_new)


def new_dtype(p) -> DataType:
    """Of k_new and v_new of plain params."""
    return keys_dtype(p) if p.kv_new_dtype is None else p.kv_new_dtype


def has_rotary(p) -> bool:
    """Plain params rotate q, or are meant to."""
    return bool(p.rotary_cos or p.rotary_sin)


def new_sizes(p) -> Sentences:
    """The rule of how many new rows there are, and of their strides."""
    if not any(_read_new(p)):
        return ()
    rows, found = p.seqlen_knew, []
    if has_new_keys(p) and not is_int(rows, 1, MAX_SIZE):
        of = "of all sequences together with cu_seqlens_k_new" if p.cu_seqlens_k_new else "of each sequence"
        found.append(must(p, "seqlen_knew", f"an int from 1 to {MAX_SIZE} with k_new, rows {of}"))
    elif has_new_keys(p) and not p.cu_seqlens_k_new and is_int(p.batch_size, MAX_SIZE // rows + 1, MAX_SIZE):
        found.append(must(p, "seqlen_knew", f"at most {MAX_SIZE // p.batch_size}: {MAX_SIZE} rows of all sequences"))
    element_bytes = 1 if new_dtype(p) is DataType.FP8_E4M3 else 2
    multiple, limit = TMA_ALIGNMENT // element_bytes, TMA_STRIDE_BYTES // element_bytes
    sizes = (1 if p.cu_seqlens_k_new else p.batch_size, rows, p.num_heads_k) * 2
    for name, size in zip(NEW_STRIDES, sizes, strict=True):
        stride = getattr(p, name)
        if stride is None or stride is not BAD and (size == 1 or 0 <= stride < limit and stride % multiple == 0):
            continue
        accepted = f"an int from 0 to below {limit}, a multiple of {multiple} elements ({TMA_ALIGNMENT} bytes)"
        found.append(must(p, name, f"None (contiguous) or {accepted}"))
    return found


def new_keys(p) -> Sentences:
    """The rule of what new keys and values come with."""
    if not any(_read_new(p)):
        return ()
    if not has_new_keys(p):
        fields = [name for name in (*_OF_NEW, *NEW_STRIDES) if getattr(p, name) not in OFF]
        bad = [name for name in NEW_STRIDES if getattr(p, name) is BAD]  # of which new_sizes speaks
        return [must(p, name, "None or 0 without k_new and v_new") for name in fields if name not in bad]
    found = [
        must(p, name, f"a device address with {other}")
        for name, other in (("k_new", "v_new"), ("v_new", "k_new"))
        if not getattr(p, name)
    ]
    if p.kv_new_dtype not in (None, p.dtype, keys_dtype(p)):
        found.append(must(p, "kv_new_dtype", "None (as k and v), what dtype is, or what kv_dtype is"))
    if has_packed_keys(p):
        found.append(must(p, "k_new", "None or 0 with cu_seqlens_k: rows are appended to a cache, not to packed keys"))
    elif not p.seqused_k and not p.page_table:  # that pages need it too is said of them
        found.append(must(p, "seqused_k", "a device address with k_new: the used rows before the call"))
    return found


def rotary(p) -> Sentences:
    """The rule of the rotary tables."""
    if not any(_read_rotary(p)):
        return ()
    found = [must(p, "rotary_interleaved", "True or False")] if p.rotary_interleaved is BAD else []
    if not has_rotary(p):
        reason = "None or 0 without rotary_cos and rotary_sin"
        return found + [must(p, name, reason) for name in _OF_ROTARY if getattr(p, name) not in (None, 0)]
    found += [
        must(p, name, f"a device address with {other}")
        for name, other in (("rotary_cos", "rotary_sin"), ("rotary_sin", "rotary_cos"))
        if not getattr(p, name)
    ]
    most = p.head_dim if type(p.head_dim) is int else MAX_SIZE
    if not is_int(p.rotary_dim, ROTARY_STEP, most) or p.rotary_dim % ROTARY_STEP:
        found.append(must(p, "rotary_dim", f"a multiple of {ROTARY_STEP} from {ROTARY_STEP} to head_dim={most}"))
    if not is_int(p.rotary_positions, 0, MAX_SIZE):
        found.append(must(p, "rotary_positions", f"an int from 0 (as many as keys can be) to {MAX_SIZE}"))
    if p.rotary_dtype is not None and p.rotary_dtype not in TABLE_BYTES:
        return [*found, must(p, "rotary_dtype", "None (dtype), FP16, BF16 or FP32")]
    stride, multiple = p.rotary_row_stride, TMA_ALIGNMENT // TABLE_BYTES.get(table_dtype(p), 2)
    if stride is not None and (stride is BAD or not 0 <= stride < TMA_STRIDE_BYTES or stride % multiple):
        accepted = f"an int from 0 to below {TMA_STRIDE_BYTES}, a multiple of {multiple} elements"
        found.append(must(p, "rotary_row_stride", f"None (contiguous: rotary_dim / 2) or {accepted}"))
    return found


def table_dtype(p) -> DataType:
    """The element type of the rotary tables of plain params."""
    return p.dtype if p.rotary_dtype is None else p.rotary_dtype


def fp8_rotary(p) -> Sentences:
    """The rule of what rotary positions have no kernel for."""
    if not has_rotary(p):
        return ()
    if p.dtype is DataType.FP8_E4M3:
        return [must(p, "rotary_cos", "None or 0 with dtype=FP8_E4M3: rotate before q and k are quantised")]
    if has_fp8_cache(p) and has_new_keys(p) and new_dtype(p) is DataType.FP8_E4M3:
        instead = f"rotate before k_new is quantised, or give it in 16 bit, kv_new_dtype={p.dtype.name}"
        return [must(p, "rotary_cos", f"None or 0 with k_new of FP8_E4M3: {instead}")]
    return ()
