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
from .fp8_cache import has_fp8_cache, has_fp8_keys
from .params import QV, names
from .sentences import Sentences, listed, must

_OR_0 = SERVED_DIMS | {0}
_FIELDS = "head_dim", "head_dim_v"
_MULTIPLE = f"a multiple of {DIM_STEP} from {DIM_STEP} to {HEAD_DIMS[-1]}"
_WITH_WIDE_VALUES = f"head_dim={LARGE_DIM} or {MLA_DIMS[0]}, or with head_dim={QV_DIMS[0]} and q_v"
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
    if is_wide(p):
        return ()
    if p.head_dim == LARGE_DIM and not has_fp8_keys(p):
        return [must(p, "head_dim_v", f"0 or {LARGE_DIM} with head_dim={LARGE_DIM}")]
    found = []
    if p.head_dim not in SERVED_DIMS:
        accepted = f"{_MULTIPLE}, {LARGE_DIM}, or {MLA_DIMS[0]} with head_dim_v={MLA_DIMS[1]}"
        found.append(must(p, "head_dim", _of_fp8(p, "head_dim") or accepted))
    if p.head_dim_v not in _OR_0:
        accepted = f"0 (head_dim) or {_MULTIPLE}; or {LARGE_DIM} with {_WITH_WIDE_VALUES}"
        found.append(must(p, "head_dim_v", _of_fp8(p, "head_dim_v") or accepted))
    return found


def is_wide(p) -> bool:
    """These params, plain or of a shape, have so many columns of V that O takes two warpgroups."""
    return (p.head_dim, p.head_dim_v or p.head_dim) in WIDE_DIMS


def has_qv_dims(p) -> bool:
    """Theirs are the dims of calls with q_v, and of no others."""
    return (p.head_dim, p.head_dim_v) == QV_DIMS


def second_queries(p) -> Sentences:
    """The rule of q_v, without which its dims are not served, of calls of these; in FP8 they never are."""
    if p.q_v or has_fp8_keys(p):
        return ()
    return [must(p, "head_dim_v", f"0 (head_dim) or {_MULTIPLE} without q_v")]


def other_queries(p) -> Sentences:
    """The rule of q_v in calls of other dims, and of its strides without it."""
    if not p.q_v:
        return [must(p, name, "None without q_v") for name in QV_STRIDES if getattr(p, name) is not None]
    if has_qv_dims(p):
        return ()
    return [must(p, "q_v", f"None or 0 unless head_dim={QV_DIMS[0]} and head_dim_v={QV_DIMS[1]}")]


def fp8_head_dims(p) -> Sentences:
    """The rule of those that are served in FP8, of dims that are in 16 bit."""
    if not has_fp8_keys(p) or not is_wide(p) and (p.head_dim not in SERVED_DIMS or p.head_dim_v not in _OR_0):
        return ()
    if has_fp8_cache(p):
        served, served_v = FP8_CACHE_HEAD_DIMS, (0, p.head_dim)
    else:
        served, served_v = FP8_SERVED_DIMS, FP8_SERVED_DIMS | {0}
    return [
        must(p, name, _of_fp8(p, name))
        for name, dims in zip(_FIELDS, (served, served_v), strict=True)
        if getattr(p, name) not in dims
    ]


def _of_fp8(p, name: str) -> str:
    """What is accepted of a dim over FP8 keys; "" where they are of 16 bit."""
    if not has_fp8_keys(p):
        return ""
    is_value, is_cache = name == "head_dim_v", has_fp8_cache(p)
    if is_cache and is_value:
        own = f"={p.head_dim}" if p.head_dim in FP8_CACHE_HEAD_DIMS else ""
        accepted = f"0 or head_dim{own}"
    elif is_cache:
        accepted = listed(FP8_CACHE_HEAD_DIMS)
    else:
        multiple = f"a multiple of {FP8_DIM_STEP} from {FP8_DIM_STEP} to {FP8_HEAD_DIMS[-1]}"
        accepted = f"0 (head_dim) or {multiple}" if is_value else multiple
    return f"{accepted} with {'kv_dtype=FP8_E4M3 and 16-bit queries' if is_cache else 'dtype=FP8_E4M3'}"


def are_served(p) -> bool:
    """The dims of plain params have a kernel; they may lack one for other reasons."""
    return not head_dims(p) and not fp8_head_dims(p)
