"""The rules of head_dim and head_dim_v. Pure Python."""

from .formats import (
    DIM_STEP,
    FP8_CACHE_HEAD_DIMS,
    FP8_DIM_STEP,
    FP8_HEAD_DIMS,
    FP8_SERVED_DIMS,
    HEAD_DIMS,
    MLA_DIMS,
    SERVED_DIMS,
)
from .fp8_cache import has_fp8_cache
from .params import DataType
from .sentences import Sentences, listed, must

_OR_0 = SERVED_DIMS | {0}
_FIELDS = "head_dim", "head_dim_v"


def value_dim(p) -> int:
    """Columns of v and out of plain params: head_dim where head_dim_v is 0, or none that is served."""
    is_own = p.head_dim_v in SERVED_DIMS or (p.head_dim, p.head_dim_v) == MLA_DIMS
    return p.head_dim_v if is_own else p.head_dim


def columns_of(p, tensor: str) -> int:
    """Of a tensor of plain params, or of a gradient."""
    return p.head_dim if tensor in ("q", "k", "dq", "dk") else value_dim(p)


def head_dims(p) -> Sentences:
    """The rule of the dims that are served."""
    found = []
    if (p.head_dim, p.head_dim_v) == MLA_DIMS:
        return found
    if p.head_dim not in SERVED_DIMS:
        accepted = f"a multiple of {DIM_STEP} from {DIM_STEP} to {HEAD_DIMS[-1]}, or {MLA_DIMS[0]} with"
        found.append(must(p, "head_dim", f"{accepted} head_dim_v={MLA_DIMS[1]}"))
    if p.head_dim_v not in _OR_0:
        accepted = f"0 (head_dim) or a multiple of {DIM_STEP} from {DIM_STEP} to {HEAD_DIMS[-1]}"
        found.append(must(p, "head_dim_v", accepted))
    return found


def fp8_head_dims(p) -> Sentences:
    """The rule of those that are served in FP8."""
    if has_fp8_cache(p):
        return _fp8_cache_dims(p)
    if p.dtype is not DataType.FP8_E4M3:
        return ()
    accepted = f"a multiple of {FP8_DIM_STEP} from {FP8_DIM_STEP} to {FP8_HEAD_DIMS[-1]} with dtype=FP8_E4M3"
    return [
        must(p, name, accepted)
        for name in _FIELDS
        if (p.head_dim, p.head_dim_v) == MLA_DIMS
        or (dim := getattr(p, name)) in SERVED_DIMS
        and dim not in FP8_SERVED_DIMS
    ]


def _fp8_cache_dims(p) -> Sentences:
    if p.head_dim not in SERVED_DIMS or p.head_dim_v not in _OR_0:
        return ()
    found, of = [], "with kv_dtype=FP8_E4M3 and 16-bit queries"
    if p.head_dim not in FP8_CACHE_HEAD_DIMS:
        found.append(must(p, "head_dim", f"{listed(FP8_CACHE_HEAD_DIMS)} {of}"))
    if p.head_dim_v not in (0, p.head_dim):
        found.append(must(p, "head_dim_v", f"0 or head_dim={p.head_dim} {of}"))
    return found


def are_served(p) -> bool:
    """The dims of plain params have a kernel; they may lack one for other reasons."""
    return not head_dims(p) and not fp8_head_dims(p)
