"""Whether a call is one of those that a launch meets every time, and good: asked before validate.py's rules are walked.

It answers in about 3 us, the rules in more than 40. A test holds it to them.
"""
from dataclasses import fields
from operator import attrgetter

from ..contract.formats import FP8_HEAD_DIMS, HEAD_DIMS
from .limits import (DIMS, LARGEST_SCALE, MAX_SIZE, MAX_TILES, MAX_WINDOW, SMALLEST_SCALE, SMALLEST_TILE_M, TENSORS,
                     TMA_STRIDE_BYTES)
from .params import OFF, AttentionMode, DataType, FlashAttentionParams, address
from ..planning.splits import MAX_SPLITS

_FP16, _BF16, _FP8 = DataType
_PREFILL, _DECODE, _VARLEN = AttentionMode
_STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in TENSORS for dim in DIMS)
_CONTIGUOUS = (None,) * len(_STRIDES)
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "total_q", "total_k")
_READ_BY_IS_COMMON = (
    "q", "k", "v", "out", "softmax_lse", "batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "head_dim",
    "dtype", "out_dtype", "mode", "num_splits", "softmax_scale", "is_causal", "window_size_left", "window_size_right",
    *_STRIDES, *_LENGTHS)
_DESCALES = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr",
             *(f"{tensor}_descale_{dim}_stride" for tensor in "qkv" for dim in ("batch", "head")))
_strides_in, _lengths_in, _descales_in = attrgetter(*_STRIDES), attrgetter(*_LENGTHS), attrgetter(*_DESCALES)
_REST = [field.name for field in fields(FlashAttentionParams) if field.name not in _READ_BY_IS_COMMON]
_rest_of = attrgetter(*_REST)
_rest_of_fp8 = attrgetter(*(name for name in _REST if name not in _DESCALES))


def is_common(p) -> bool:
    """True only if no rule of validate.py objects; False says nothing. It knows calls given in plain ints.

    Every launch pays for this, hence one expression over locals. Its groups: pointers, sizes, choices, strides; and
    every field that it does not read, a future one too, must be off. May raise for a value that is no plain int.
    """
    q, k, v, out, lse = p.q, p.k, p.v, p.out, p.softmax_lse
    if not type(q) is type(k) is type(v) is type(out) is int:
        q, k, v, out = address(q), address(k), address(v), address(out)
    bits = q | k | v | out
    if lse is not None:
        bits |= address(lse) << 2       # aligned to 4 bytes where the others are to 16
    batch, rows_q, rows_k, mode = p.batch_size, p.seqlen_q, p.seqlen_k, p.mode
    batches, suits = batch, rows_q and rows_k and (mode is _PREFILL or mode is _DECODE and rows_q == 1)
    if not OFF.issuperset(lengths := _lengths_in(p)):
        *pointers, total_q, total_k = lengths
        cu_q, cu_k, used_q, used_k = map(address, pointers)
        bits |= (cu_q | cu_k | used_q | used_k) << 2
        if cu_q and cu_k:               # packed: one batch of total rows
            batches, rows_q, rows_k, suits = 1, total_q, total_k, mode is _VARLEN and (total_q or total_k)
        elif cu_q or cu_k or not OFF.issuperset((total_q, total_k)):
            return False
    heads, heads_k, head_dim = p.num_heads, p.num_heads_k, p.head_dim
    dtype, out_dtype, splits, scale = p.dtype, p.out_dtype, p.num_splits, p.softmax_scale
    left, right, is_causal, strides = p.window_size_left, p.window_size_right, p.is_causal, _strides_in(p)
    return (
        q and k and v and out and not bits & 15 and not bits >> 64

        and type(batch) is type(rows_q) is type(rows_k) is type(heads) is type(heads_k) is type(head_dim) is int
        and suits and 0 < batch <= MAX_SIZE and 0 <= rows_q <= MAX_SIZE and 0 <= rows_k <= MAX_SIZE
        and head_dim in HEAD_DIMS and 0 < heads_k <= heads and not heads % heads_k
        and type(splits) is int and (0 <= splits <= 1 or 1 < splits <= MAX_SPLITS and mode is not _VARLEN)
        and heads * (batches * rows_q + batch * SMALLEST_TILE_M) * (splits or 1) <= MAX_TILES * SMALLEST_TILE_M

        and type(left) is type(right) is int
        and (is_causal is False and left <= MAX_WINDOW >= right or is_causal is True and left < 0 > right)
        and (scale is None or type(scale) is float and SMALLEST_SCALE <= scale <= LARGEST_SCALE)

        and (rows_q * heads | rows_k * heads_k) * head_dim < TMA_STRIDE_BYTES // 4
        and (strides == _CONTIGUOUS or _are_common(strides, batches, rows_q, heads, head_dim))

        and (_is_common_fp8(p, strides) if dtype is _FP8 else
             (dtype is _FP16 or dtype is _BF16) and (out_dtype is None or out_dtype is dtype)
             and OFF.issuperset(_rest_of(p)))
    )


def _is_common_fp8(p, strides) -> bool:
    """What FP8 asks besides; the strides suit 16-bit elements already."""
    q, k, v, *steps = _descales_in(p)
    bits = address(q) | address(k) | address(v)
    for step in steps:
        if type(step) is not int or not 0 <= step <= MAX_SIZE:
            return False
    if strides != _CONTIGUOUS:
        for stride in strides[:-len(DIMS)]:     # all but out's
            if stride is not None and stride & 15:
                return False
    out_dtype = p.out_dtype
    return (not bits & 3 and not bits >> 64 and p.head_dim in FP8_HEAD_DIMS
            and (out_dtype is None or out_dtype is _FP16 or out_dtype is _BF16) and OFF.issuperset(_rest_of_fp8(p)))


def _are_common(strides, batch: int, rows_q: int, heads: int, head_dim: int) -> bool:
    """These strides (as _STRIDES names them) suit TMA, and each of out's steps over all that lies within it."""
    for stride in strides:
        if stride is not None and (type(stride) is not int or stride & 7 or not 0 <= stride < TMA_STRIDE_BYTES // 2):
            return False
    contiguous = (rows_q * heads * head_dim, heads * head_dim, head_dim)
    moving = sorted((default if stride is None else stride, size) for stride, default, size
                    in zip(strides[-3:], contiguous, (batch, rows_q, heads), strict=True) if size > 1)
    reach = head_dim
    for stride, size in moving:
        if stride < reach:
            return False
        reach = stride * size
    return True
