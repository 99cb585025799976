"""Attention of 512 columns of V: MLA decode, of head_dim 576 where V is the first 512 columns of K, or of 64 with q_v;
and heads of 512. The rule of what their kernel does not serve, one table. Pure Python."""

from math import prod
from typing import Any

from .formats import MLA_DIMS, UNBOUNDED_WINDOW
from .limits import DIMS
from .params import tensor_sizes
from .plain import BAD
from .sentences import Sentences, must

SMALLEST_PAGE = 8  # rows that TMA brings at once
# {field: what is accepted}: features of the scores and of the cache that other kernels have.
OFF: dict[str, str] = {
    **dict.fromkeys(("softcap",), "0"),
    **dict.fromkeys(("alibi_slopes", "attn_mask", "score_mod", "mask_mod", "block_mask"), "None or 0"),
    **dict.fromkeys(("k_new", "v_new", "rotary_cos", "leftpad_k"), "None or 0"),
    **dict.fromkeys(("p_dropout", "attention_chunk"), "0"),
}


def is_mla(p: Any) -> bool:
    """These params, plain or of a shape, have V in K."""
    return (p.head_dim, p.head_dim_v) == MLA_DIMS


def wide(p) -> Sentences:
    """The rule of what 512 columns of V have no kernel for."""
    found, reason = [], "with q_v" if p.q_v else f"with head_dim={p.head_dim}"
    if is_mla(p):
        if p.k and p.v and p.k is not BAD and p.v != p.k:
            found.append(must(p, "v", f"k, the same address, {reason}: V is the first {MLA_DIMS[1]} columns of K"))
        found += _strides(p, reason)
    for name, accepted in OFF.items():
        if getattr(p, name):
            found.append(must(p, name, f"{accepted} {reason}"))
    if type(p.window_size_left) is int and 0 <= p.window_size_left < UNBOUNDED_WINDOW:
        found.append(must(p, "window_size_left", f"negative (unbounded) {reason}"))
    if p.page_table and type(p.page_size) is int and p.page_size % SMALLEST_PAGE:
        found.append(must(p, "page_size", f"a multiple of {SMALLEST_PAGE} {reason}"))
    return found


def _strides(p, reason: str) -> Sentences:
    """V has those of K, where they mean something: along dimensions of more than one."""
    sizes, found = tensor_sizes(p, "k"), []
    if not all(type(size) is int for size in sizes):
        return found
    contiguous = (prod(sizes[1:]) * MLA_DIMS[0], sizes[2] * MLA_DIMS[0], MLA_DIMS[0])
    for dim, size, default in zip(DIMS, sizes, contiguous, strict=True):
        stride, stride_k = getattr(p, f"v_{dim}_stride"), getattr(p, f"k_{dim}_stride")
        stride_k = default if stride_k is None else stride_k
        if size > 1 and stride not in (None, stride_k):
            found.append(must(p, f"v_{dim}_stride", f"that of k, {stride_k}, or None, the same, {reason}"))
    return found
