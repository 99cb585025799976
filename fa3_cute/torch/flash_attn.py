"""flash-attn's functions. Names, order and defaults of arguments are those of FlashAttention-3's
flash_attn_interface.py; what this library has no kernel for is refused by name."""

from typing import Any

import torch
from torch import Tensor

from ..contract.formats import QV_DIMS
from ..contract.status import Status, error_for, shown
from . import ops
from .calls import ForwardCall, MergeCall, Update


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """softmax(softmax_scale * q k^T, masked) v

    q           [batch, seqlen_q, num_heads, head_dim], float16, bfloat16 or float8_e4m3fn
    k, v        [batch, seqlen_k, num_heads_k, head_dim], as q or float8_e4m3fn; num_heads is a multiple of num_heads_k
    causal      bottom-right aligned: query i sees key j iff j <= i + seqlen_k - seqlen_q
    window_size (left, right) keys around that diagonal, inclusive; -1 is unbounded. With causal right is 0
    *_descale   with FP8 keys: float32 [batch, num_heads_k]; q's may be [batch, num_heads] too
    qv          [batch, seqlen_q, num_heads, 512] of q's dtype, with head_dim 64 and v of 512 columns: a second part of
                q, scores are softmax_scale * (q k^T + qv v^T); the default scale is 1/24. It has no gradient
    num_splits  1 never splits keys, 0 is automatic, n exactly n
    s_aux       [num_heads] float32, bfloat16 or float16: attention sinks, logits of one more key, whose value is 0;
                not of FlashAttention-3's own signature
    deterministic  the same bits of dq in every call; all else has them anyway

    Returns out of q's shape and dtype (FP8: bfloat16), with return_attn_probs (out, LSE): LSE is float32
    [batch, num_heads, seqlen_q], the natural logarithm, and differentiable. q, k, v and s_aux have gradients, of their
    own dtypes, where q is of 16 bit with head_dim 64, 96, 128, 192 or 256, which is v's too. Raises FlashAttentionError
    with the status of the contract and a sentence.
    Source: FlashAttention-3 (Shah et al. 2024).
    """
    if qv is not None:
        _require_wide(q, v, qv)
    if q_descale is not None:
        q_descale = _by_query_head(q, k, q_descale)
    given = q_descale, k_descale, v_descale, s_aux, qv, softmax_scale, *_mask(causal, window_size)
    choices = attention_chunk, softcap, 0, num_splits, pack_gqa, sm_margin, deterministic
    # By place: by name it takes twice as long.
    call = ForwardCall._make((q, k, v, *_NO_LENGTHS, *_NO_CACHE, *given, *choices))
    return _attend(call, return_attn_probs)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    s_aux=None,
):
    """`flash_attn_func` of packed sequences.

    q               [total_q, num_heads, head_dim]
    k, v            [total_k, num_heads_k, head_dim]
    cu_seqlens_*    int32 [batch + 1]: where each sequence begins, and the end of the last
    max_seqlen_q    a hint: no sequence has more queries; None is unknown. max_seqlen_k is not needed
    seqused_*       int32 [batch]: rows of each sequence that are used; out and LSE of the others are anything

    LSE is [num_heads, total_q]. Gradients of rows that no sequence uses are 0.
    """
    if qv is not None:
        _require_wide(q, v, qv)
    if q_descale is not None:
        q_descale = _by_query_head(q, k, q_descale)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, *_NO_CACHE
    given = q_descale, k_descale, v_descale, s_aux, qv, softmax_scale, *_mask(causal, window_size)
    hint = 0 if max_seqlen_q is None else max_seqlen_q
    choices = attention_chunk, softcap, hint, num_splits, pack_gqa, sm_margin, deterministic
    return _attend(ForwardCall._make((q, k, v, *lengths, *given, *choices)), return_attn_probs)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    *,
    s_aux=None,
    out=None,
):
    """`flash_attn_func` over a cache of keys and values.

    q                 [batch, seqlen_q, num_heads, head_dim], or [total_q, ...] with cu_seqlens_q, int32 [batch + 1]
    k_cache, v_cache  [batch, capacity, num_heads_k, head_dim], or pages [num_pages, page_size, num_heads_k, head_dim]
    k, v              new rows [batch, seqlen_new, num_heads_k, head_dim], or [rows, ...] with cu_seqlens_k_new, int32
                      [batch + 1]: written to the cache, in place, behind its cache_seqlens rows, then attended too; of
                      its dtype, or, to be quantised for an FP8 cache, of q's
    cache_seqlens     int32 [batch]: keys of each sequence, those of q included, without those of k; an int: of all;
                      None: the capacity
    cache_batch_idx   int32 [batch]: the entry of the cache, or row of page_table, of each sequence
    cache_leftpad     int32 [batch]: first rows of each sequence that do not exist, though cache_seqlens counts them
    page_table        int32 [batch, max_pages]; needs cache_seqlens
    rotary_cos, _sin  [positions, rotary_dim / 2], of q's dtype or float32: q and k are rotated; pairs are (2i, 2i + 1)
                      if rotary_interleaved, else (i, i + rotary_dim / 2)
    rotary_seqlens    int32 [batch]: the position of the first new row; None: cache_seqlens
    out               of q's shape with v's columns: written and returned; not in a compiled function

    Without k only q is rotated, by the positions of the last seqlen_q keys. With k or rotary tables there are no
    gradients. scheduler_metadata is ignored.
    """
    _require_wide(q, v_cache, qv)
    update = _update(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved)
    if k is not None and cache_seqlens is None:
        raise error_for(Status.INVALID_ARGUMENT, "cache_seqlens=None: must be given with k: the rows before the call")
    if isinstance(cache_seqlens, _INTS):
        is_dense = page_table is None and cu_seqlens_q is None and k is None
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        k_cache, v_cache, cache_seqlens = _cut(k_cache, v_cache, cache_seqlens, batch, is_dense)
    scales = _scales(q, k_cache, q_descale, k_descale, v_descale)
    options = _options(softmax_scale, causal, window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin)
    if cu_seqlens_q is not None:
        options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": 0 if max_seqlen_q is None else max_seqlen_q}
    where = {"seqused_k": cache_seqlens, "page_table": page_table, "kv_batch_idx": cache_batch_idx}
    where["leftpad_k"] = cache_leftpad
    call = ForwardCall(q, k_cache, v_cache, s_aux=s_aux, q_v=qv, **where, **scales, **options)
    return _attend(call, return_softmax_lse, update, out)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(out, LSE) of attention over the keys of both of two results over disjoint keys.

    out_a, out_b   [batch, seqlen_q, num_heads, head_dim], or [rows, num_heads, head_dim]; float16, bfloat16 or float32
    lse_a, lse_b   float32 [batch, num_heads, seqlen_q], or [num_heads, rows]; natural logarithms, -inf: saw no key

    Sums are float32. Not differentiable: raises FlashAttentionError where a gradient is asked for.
    """
    return torch.ops.fa3_cute.merge_attention(*MergeCall(out_a, lse_a, out_b, lse_b))


# ---- arguments -------------------------------------------------------------------------------------------------------

_INTS = (int, torch.SymInt)
_NO_LENGTHS = (None,) * 4  # cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
_NO_CACHE = (None,) * 3  # page_table, kv_batch_idx, leftpad_k


def _require_wide(q: Tensor, v: Tensor, qv: Tensor | None) -> None:
    """Raise for a qv of other head dims than there are kernels for."""
    if qv is None or not (isinstance(q, Tensor) and isinstance(v, Tensor)):  # of what is no tensor others speak
        return
    if (q.shape[-1], v.shape[-1]) == QV_DIMS:
        return
    stated = f"{q.shape[-1]} columns of q and {v.shape[-1]} of v"
    sentence = f"qv: must be None with {stated}: it goes with {QV_DIMS[0]} and {QV_DIMS[1]}"
    raise error_for(Status.INVALID_ARGUMENT, sentence)


def _attend(call: ForwardCall, wants_lse: bool, update: Update | None = None, to: Tensor | None = None) -> Any:
    if to is not None:
        out, lse = ops.attend_into(to, call, wants_lse, update)
    else:
        out, lse = ops.attend(call, wants_lse) if update is None else ops.attend_updated(call, update, wants_lse)
    return (out, lse) if wants_lse else out


def _options(scale, causal, window_size, chunk, softcap, num_splits, pack_gqa, sm_margin) -> dict:
    is_causal, left, right = _mask(causal, window_size)
    return {
        "softmax_scale": scale,
        "is_causal": is_causal,
        "window_size_left": left,
        "window_size_right": right,
        "attention_chunk": chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
    }


def _mask(causal, window_size) -> tuple:
    """(is_causal, left, right): flash-attn's causal windows end at the diagonal, whatever their right bound is."""
    try:
        left, right = window_size
    except (TypeError, ValueError) as error:
        sentence = f"window_size={shown(window_size)}: must be a pair (left, right)"
        raise error_for(Status.INVALID_ARGUMENT, sentence) from error
    if causal:
        is_bounded = not isinstance(left, _INTS) or left >= 0
        return (False, left, 0) if is_bounded else (causal, -1, -1)
    return causal, left, right


def _update(k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved) -> Update | None:
    """What is done before attention; None for nothing. Without tables their layout means nothing."""
    tensors = k, v, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens
    if all(x is None for x in tensors):
        return None
    if (k is None) != (v is None):
        missing, other = "kv" if k is None else "vk"
        raise error_for(Status.INVALID_ARGUMENT, f"{missing}=None: must be given with {other}")
    return Update(*tensors, False if rotary_cos is rotary_sin is None else rotary_interleaved)


def _scales(q: Tensor, k: Tensor, q_descale, k_descale, v_descale) -> dict:
    if q_descale is k_descale is v_descale is None:
        return {}
    return {"q_descale": _by_query_head(q, k, q_descale), "k_descale": k_descale, "v_descale": v_descale}


def _by_query_head(q: Tensor, k: Tensor, descale: Tensor | None) -> Tensor | None:
    """flash-attn has one q_descale for the query heads of a KV head, this library one for each."""
    if descale is None or descale.dim() != 2 or descale.shape[1] == q.shape[-2] or descale.shape[1] != k.shape[-2]:
        return descale
    return descale.repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)


def _cut(k: Tensor, v: Tensor, length, batch: int, is_dense: bool):
    """(k, v, seqused_k) of a cache of which each sequence uses so many rows: a slice where that is one."""
    if not is_dense:
        return k, v, torch.full((batch,), length, dtype=torch.int32, device=k.device)
    if not 0 <= length <= k.shape[1]:
        sentence = f"cache_seqlens={length}: must be from 0 to the capacity of the cache, {k.shape[1]}"
        raise error_for(Status.INVALID_SHAPE, sentence)
    if length == 0:
        return k, v, torch.zeros(batch, dtype=torch.int32, device=k.device)
    return k[:, :length], v[:, :length], None
