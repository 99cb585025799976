"""The rules of head_dim and head_dim_v. Pure Python."""

from .formats import (
    DIM_STEP,
    FP8_CACHE_HEAD_DIMS,
    FP8_DIM_STEP,
    FP8_HEAD_DIMS,
    FP8_SERVED_DIMS,
    HEAD_DIMS,
    LARGE_DIM,
    MLA_DIMS,
    QV_DIMS,
    SERVED_DIMS,
    WIDE_DIMS,
)
from .fp8_cache import has_fp8_cache
from .params import QV, DataType, names
from .sentences import Sentences, listed, must

_OR_0 = SERVED_DIMS | {0}
_FIELDS = "head_dim", "head_dim_v"
QV_STRIDES = names(kind="stride", takers=(QV,))


def value_dim(p) -> int:
    """Columns of v and out of plain params: head_dim where head_dim_v is 0, or none that is served."""
    is_own = p.head_dim_v in SERVED_DIMS or (p.head_dim, p.head_dim_v) in WIDE_DIMS
    return p.head_dim_v if is_own else p.head_dim


def columns_of(p, tensor: str) -> int:
    """Of a tensor of plain params, or of a gradient."""
    return p.head_dim if tensor in ("q", "k", "dq", "dk") else value_dim(p)


def head_dims(p) -> Sentences:
    """The rule of the dims that are served."""
    found, multiple = [], f"a multiple of {DIM_STEP} from {DIM_STEP} to {HEAD_DIMS[-1]}"
    if is_wide(p):
        return found
    if p.head_dim not in SERVED_DIMS and p.head_dim != LARGE_DIM:
        accepted = f"{multiple}, {LARGE_DIM}, or {MLA_DIMS[0]} with head_dim_v={MLA_DIMS[1]}"
        found.append(must(p, "head_dim", accepted))
    if p.head_dim == LARGE_DIM:
        found.append(must(p, "head_dim_v", f"0 or {LARGE_DIM} with head_dim={LARGE_DIM}"))
    elif p.head_dim_v not in _OR_0:
        found.append(must(p, "head_dim_v", f"0 (head_dim) or {multiple}"))
    return found


def is_wide(p) -> bool:
    """These params, plain or of a shape, have so many columns of V that O takes two warpgroups."""
    return (p.head_dim, p.head_dim_v or p.head_dim) in WIDE_DIMS


def has_qv_dims(p) -> bool:
    """Theirs are the dims of calls with q_v, and of no others."""
    return (p.head_dim, p.head_dim_v) == QV_DIMS


def second_queries(p) -> Sentences:
    """The rule of q_v, without which its dims are not served, of calls of these."""
    if p.q_v:
        return ()
    accepted = f"0 (head_dim) or a multiple of {DIM_STEP} from {DIM_STEP} to {HEAD_DIMS[-1]} without q_v"
    return [must(p, "head_dim_v", accepted)]


def other_queries(p) -> Sentences:
    """The rule of q_v in calls of other dims, and of its strides without it."""
    if not p.q_v:
        return [must(p, name, "None without q_v") for name in QV_STRIDES if getattr(p, name) is not None]
    if has_qv_dims(p):
        return ()
    return [must(p, "q_v", f"None or 0 unless head_dim={QV_DIMS[0]} and head_dim_v={QV_DIMS[1]}")]


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
        if is_wide(p) or (dim := getattr(p, name)) in SERVED_DIMS and dim not in FP8_SERVED_DIMS
    ]


def _fp8_cache_dims(p) -> Sentences:
    if not is_wide(p) and (p.head_dim not in SERVED_DIMS or p.head_dim_v not in _OR_0):
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
