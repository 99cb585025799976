"""MLA decode: head_dim 576 and head_dim_v 512, where V is the first 512 columns of K. The rule of what its kernel does
not serve, one table. Pure Python."""

from math import prod
from typing import Any

from .formats import MLA_DIMS
from .limits import DIMS
from .params import tensor_sizes
from .plain import BAD
from .sentences import Sentences, must

WITH_MLA = f"with head_dim={MLA_DIMS[0]}"
SMALLEST_PAGE = 8  # rows that TMA brings at once
# {field: what is accepted}: features of the scores and of the cache that other kernels have.
OFF: dict[str, str] = {
    **dict.fromkeys(("softcap",), "0"),
    **dict.fromkeys(("alibi_slopes", "attn_mask", "score_mod", "mask_mod", "block_mask"), "None or 0"),
    **dict.fromkeys(("k_new", "v_new", "rotary_cos"), "None or 0"),
    **dict.fromkeys(("p_dropout", "attention_chunk"), "0"),
}


def is_mla(p: Any) -> bool:
    """These params, plain or of a shape, ask for MLA decode."""
    return (p.head_dim, p.head_dim_v) == MLA_DIMS


def mla(p) -> Sentences:
    """The rule of what MLA decode has no kernel for."""
    found = []
    if p.k and p.v and p.k is not BAD and p.v != p.k:
        found.append(must(p, "v", f"k, the same address, {WITH_MLA}: V is the first {MLA_DIMS[1]} columns of K"))
    found += _strides(p)
    for name, accepted in OFF.items():
        if getattr(p, name):
            found.append(must(p, name, f"{accepted} {WITH_MLA}"))
    if type(p.window_size_left) is int and p.window_size_left >= 0:
        found.append(must(p, "window_size_left", f"negative (unbounded) {WITH_MLA}"))
    if p.page_table and type(p.page_size) is int and p.page_size % SMALLEST_PAGE:
        found.append(must(p, "page_size", f"a multiple of {SMALLEST_PAGE} {WITH_MLA}"))
    return found


def _strides(p) -> Sentences:
    """V has those of K, where they mean something: along dimensions of more than one."""
    sizes, found = tensor_sizes(p, "k"), []
    if not all(type(size) is int for size in sizes):
        return found
    contiguous = (prod(sizes[1:]) * MLA_DIMS[0], sizes[2] * MLA_DIMS[0], MLA_DIMS[0])
    for dim, size, default in zip(DIMS, sizes, contiguous, strict=True):
        stride, stride_k = getattr(p, f"v_{dim}_stride"), getattr(p, f"k_{dim}_stride")
        stride_k = default if stride_k is None else stride_k
        if size > 1 and stride not in (None, stride_k):
            found.append(must(p, f"v_{dim}_stride", f"that of k, {stride_k}, or None, the same, {WITH_MLA}"))
    return found
