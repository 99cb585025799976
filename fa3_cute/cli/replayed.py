"""The arrays of a call that was logged: what its pointers point at, as large as the call reads or writes, of random
numbers. Sequences are as even as they can be, and use all of their rows, where the line does not have their lengths.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from .. import workspace_size
from ..contract import backward_params, merge
from ..contract.append import new_dtype, table_dtype
from ..contract.backward_params import BackwardParams, grad_dtype_of, plain_backward, sizes_of
from ..contract.formats import FP8, FP8_OUT_DTYPES
from ..contract.head_dims import columns_of, value_dim
from ..contract.limits import DIMS
from ..contract.merge import MergeParams, out_dtype_of, plain_merge
from ..contract.params import ARGUMENTS, DESCALES, DTYPE_NAMES
from ..contract.plain import plain
from ..contract.reference import to_bits
from ..runtime.tracing.record import MAX_ALIGNMENT, Ints, Params, Unreadable, lengths_of

APART = 1 << 44  # bytes between addresses that stand for arrays
FP32 = "fp32"
IGNORED_BYTES = 16
BYTES_PER_COUNTER_BYTE = 8  # of workspace_size
# Random numbers drawn per array; a longer one repeats them, with an odd period.
DISTINCT_NUMBERS = 5_000_011
Make = Callable[[np.random.Generator, int], np.ndarray]


class Array(NamedTuple):
    """`size` elements in device memory; of those that are written, the element type is to be read again."""

    size: int
    make: Make
    written: str = ""


# ---- addresses -------------------------------------------------------------------------------------------------------


def pointers_of(params: Params) -> tuple[str, ...]:
    """The pointer fields that are set."""
    arguments = _arguments(params)
    return tuple(name for name, argument in arguments.items() if argument.kind == "pointer" and getattr(params, name))


def _arguments(params: Params) -> dict:
    kinds = {MergeParams: merge.ARGUMENTS, BackwardParams: backward_params.ARGUMENTS}
    return kinds.get(type(params), ARGUMENTS)


def placed(params: Params, place: Callable[[str, int], int]) -> Params:
    """The params with place(field, alignment) for addresses, and the same one where a line says so."""
    found: dict[str, int] = {}
    for name in pointers_of(params):
        shown = getattr(params, name)
        if isinstance(shown, str):
            if shown not in found:
                raise Unreadable(f"{name}={shown!r}: must be a pointer's alignment or a pointer before it")
            found[name] = found[shown]
        elif type(shown) is int and 0 < shown <= MAX_ALIGNMENT:
            found[name] = place(name, shown)
        else:
            raise Unreadable(f"{name}={shown!r}: must be a pointer's alignment, up to {MAX_ALIGNMENT} bytes")
    return replace(params, **found)


def stood_in(params: Params) -> Params:
    """The same with addresses, as aligned and no more, that stand for arrays which do not overlap."""
    numbers = count(1)
    return placed(params, lambda name, alignment: next(numbers) * APART + alignment % MAX_ALIGNMENT)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def arrays_of(params: Params, lengths: dict[str, Any]) -> dict[str, Array]:
    """By pointer field, of good params (`stood_in`); lengths are those that the line has. Raises Unreadable for a
    pointer that nothing is known of."""
    found = _of_merge(params) if isinstance(params, MergeParams) else _of_attention(params, lengths)
    missing = [name for name in pointers_of(params) if name not in found]
    if missing:
        raise Unreadable(f"{', '.join(missing)}: what it points at is not known here")
    return _shared(params, found)


def _shared(params: Params, found: dict[str, Array]) -> dict[str, Array]:
    """The arrays by the first field that points at each: as large as all who do need it, read as who writes it does."""
    firsts: dict[int, str] = {}
    arrays: dict[str, Array] = {}
    for name in pointers_of(params):
        first, own = firsts.setdefault(getattr(params, name), name), found[name]
        before = arrays.get(first, own)
        arrays[first] = Array(max(before.size, own.size), before.make, before.written or own.written)
    return arrays


def extent(sizes: tuple[int, ...], strides: tuple[int, ...], last: int = 1) -> int:
    """Elements from the first to behind the last."""
    if not all(sizes):
        return 0
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + last


def _of_merge(params: MergeParams) -> dict[str, Array]:
    p: Any = plain_merge(params)
    sizes = p.batch_size, p.seqlen_q, p.num_heads
    found = {}
    for name in merge.OUTPUTS + merge.LSES:
        is_lse, is_written = name in merge.LSES, name in ("out", "lse")
        dtype = FP32 if is_lse else DTYPE_NAMES[out_dtype_of(p) if is_written else p.dtype]
        size = extent(sizes, merge.strides_of(p, name), 1 if is_lse else p.head_dim)
        found[name] = written(size, dtype) if is_written else Array(size, normal(dtype))
    return found


def _of_attention(params: Any, lengths: dict[str, Any]) -> dict[str, Array]:
    is_backward = isinstance(params, BackwardParams)
    p: Any = plain_backward(params) if is_backward else plain(params)
    batch, rows, heads = sizes_of(p, "q")
    found = _tensors(p, is_backward) | _scores(p) | _appended(p) | _lengths(p, lengths)
    lse = batch * rows * heads
    if is_backward:
        found |= {"softmax_lse": Array(lse, lse_like(p)), "dlse": Array(lse, normal(FP32))}
        found |= {"d_s_aux": written(heads, FP32), "d_bias": written(_mask_size(p), FP32)}
    else:
        found["softmax_lse"] = written(lse, FP32)
    counters = IGNORED_BYTES
    if params.tile_counter and not is_backward:
        counters += workspace_size(params) // BYTES_PER_COUNTER_BYTE
    zeros = {"workspace": p.workspace_bytes, "tile_counter": counters, "scheduler_metadata": IGNORED_BYTES}
    return found | {name: Array(size, bytes_of_zero) for name, size in zeros.items()}


def _tensors(p: Any, is_backward: bool) -> dict[str, Array]:
    dtype = DTYPE_NAMES[p.dtype]
    of_out = FP8_OUT_DTYPES[0] if dtype == FP8 else dtype
    types = dict.fromkeys(("q", "k", "v", "q_v") if p.q_v else ("q", "k", "v"), dtype)
    outputs = {"out": of_out if p.out_dtype is None else DTYPE_NAMES[p.out_dtype]}
    if is_backward:
        types |= {"out": dtype, "dout": dtype}
        outputs = dict.fromkeys(backward_params.OUTPUTS, DTYPE_NAMES[grad_dtype_of(p)])
    sizes = {
        name: extent(sizes_of(p, name), backward_params.strides_of(p, name), columns_of(p, name))
        for name in (*types, *outputs)
    }
    found = {name: Array(sizes[name], normal(kind)) for name, kind in types.items()}
    return found | {name: written(sizes[name], kind) for name, kind in outputs.items()}


def _scores(p: Any) -> dict[str, Array]:
    """Descales, and what is read for scores."""
    found = {}
    for name in DESCALES:
        heads = p.num_heads if name == "q_descale_ptr" else p.num_heads_k
        stem = name.removesuffix("_ptr")
        strides = getattr(p, f"{stem}_batch_stride"), getattr(p, f"{stem}_head_stride")
        found[name] = Array(extent((p.batch_size, heads), strides), scales)
    sinks = FP32 if p.s_aux_dtype is None else DTYPE_NAMES[p.s_aux_dtype]
    mask = boolean if p.attn_mask_dtype is None else normal(DTYPE_NAMES[p.attn_mask_dtype])
    return found | {
        "s_aux": Array(p.num_heads, normal(sinks)),
        "alibi_slopes": Array(extent((p.batch_size,), (p.alibi_batch_stride,), p.num_heads), scales),
        "attn_mask": Array(_mask_size(p), mask),
        "rng_state": Array(2, lambda rng, size: rng.integers(1 << 40, size=size, dtype=np.uint64)),
    }


def _appended(p: Any) -> dict[str, Array]:
    """New keys and values, and rotary tables."""
    sizes = 1 if p.cu_seqlens_k_new else p.batch_size, p.seqlen_knew, p.num_heads_k
    found = {}
    for name, head_dim in (("k_new", p.head_dim), ("v_new", value_dim(p))):
        contiguous = (math.prod(sizes[1:]) * head_dim, p.num_heads_k * head_dim, head_dim)
        given = [getattr(p, f"{name}_{dim}_stride") for dim in DIMS]
        strides = tuple(own if stride is None else stride for stride, own in zip(given, contiguous, strict=True))
        found[name] = Array(extent(sizes, strides, head_dim), normal(DTYPE_NAMES[new_dtype(p)]))
    columns = p.rotary_dim // 2
    stride = columns if p.rotary_row_stride is None else p.rotary_row_stride
    table = Array(extent((_positions(p),), (stride,), columns), normal(DTYPE_NAMES[table_dtype(p)]))
    return found | {"rotary_cos": table, "rotary_sin": table}


def _positions(p: Any) -> int:
    """How many keys a sequence can have, and rotary tables have rows."""
    return p.rotary_positions or p.seqlen_k


def _mask_size(p: Any) -> int:
    if not p.attn_mask:
        return 0
    sizes = p.batch_size, p.num_heads, p.seqlen_q, p.seqlen_k
    given = p.attn_mask_batch_stride, p.attn_mask_head_stride, p.attn_mask_row_stride, 1
    contiguous = (math.prod(sizes[1:]), math.prod(sizes[2:]), p.seqlen_k, 1)
    strides = tuple(own if stride is None else stride for stride, own in zip(given, contiguous, strict=True))
    return extent(sizes, strides)


# ---- lengths ---------------------------------------------------------------------------------------------------------


def _lengths(p: Any, known: dict[str, Any]) -> dict[str, Array]:
    return {name: _ints(name, array, known.get(name, _assumed(p, name))) for name, array in lengths_of(p).items()}


def _assumed(p: Any, name: str) -> np.ndarray:
    """The lengths, offsets, entries or pages of a call that are not known."""
    batch = p.batch_size
    if name.startswith("cu_seqlens"):
        total = {"cu_seqlens_q": p.total_q, "cu_seqlens_k": p.total_k}.get(name, p.seqlen_knew)
        return np.arange(batch + 1) * total // max(1, batch)
    if name == "kv_batch_idx":
        return np.arange(batch) % max(1, p.batch_size_k or batch)
    if name == "leftpad_k":
        return np.zeros(batch)
    if name == "page_table":
        rows, pages = p.batch_size_k or batch, p.seqlen_k // p.page_size
        order = np.random.default_rng(0).permutation(p.num_pages)
        return np.resize(order, rows * pages).reshape(rows, pages)
    if name == "seqlens_rotary" or name == "seqused_k" and not p.cu_seqlens_k:
        return np.full(batch, _keys_before(p))
    offsets = name.replace("seqused", "cu_seqlens")
    if getattr(p, offsets):
        return np.diff(_assumed(p, offsets))
    return np.full(batch, p.seqlen_q)


def _keys_before(p: Any) -> int:
    """The used length of each sequence in a cache that is as full as can be, and still takes the new rows."""
    new = -(-p.seqlen_knew // max(1, p.batch_size)) if p.cu_seqlens_k_new else p.seqlen_knew
    return max(0, min(p.seqlen_k, _positions(p)) - new)


def _ints(name: str, array: Ints, values: Any) -> Array:
    """int32 with its rows where the stride says."""
    values = np.asarray(values, np.int32)
    if values.size != array.rows * array.columns:
        raise Unreadable(f"lengths.{name}: must be {array.rows} x {array.columns} ints, not {values.size}")
    whole = np.zeros((array.rows, max(array.stride, array.columns)), np.int32)
    whole[:, : array.columns] = values.reshape(array.rows, array.columns)
    return Array(array.extent, lambda rng, size: whole.reshape(-1)[:size])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def normal(dtype: str) -> Make:
    """Standard normal."""
    return lambda rng, size: to_bits(rng.standard_normal(size, np.float32), dtype)


def written(size: int, dtype: str) -> Array:
    """What the call writes: zeros before it."""
    return Array(size, lambda rng, size: to_bits(np.zeros(size, np.float32), dtype), dtype)


def lse_like(p: Any) -> Make:
    """What the LSE of standard normal q and k is about, so that gradients are of the order of 1."""
    keys = p.seqlen_k or p.total_k // max(1, p.batch_size)
    return lambda rng, size: np.full(size, math.log(max(1, keys)) + 0.5, np.float32)


def scales(rng: np.random.Generator, size: int) -> np.ndarray:
    """From 0.5 to 1."""
    return rng.uniform(0.5, 1, size).astype(np.float32)


def boolean(rng: np.random.Generator, size: int) -> np.ndarray:
    """0 and 1, as often."""
    return rng.integers(2, size=size, dtype=np.uint8)


def bytes_of_zero(rng: np.random.Generator, size: int) -> np.ndarray:
    """Scratch memory."""
    return np.zeros(size, np.uint8)
