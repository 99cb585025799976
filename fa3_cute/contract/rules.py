"""FlashAttentionParams -> what is wrong with it, in words. Pure Python: no GPU, no CUDA, no CuTe DSL.

`RULES` is the contract: a row per rule, in the order in which `forward` reports. A rule takes the params (plain.py) and
returns a sentence for each thing it objects to: field, value, what is accepted. A good call in plain values walks them
all in about 10 us.

A value of the wrong type is a problem like any other, not an exception: it gets the status of its field, and
INVALID_ARGUMENT where the field has none. Integers are whatever has `__index__`, except bool and arrays.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

from .append import fp8_rotary, new_keys, new_sizes, rotary
from .formats import MAX_SPLITS
from .fp8_cache import has_fp8_cache, has_fp8_keys, kv_dtype, unserved
from .head_dims import fp8_head_dims, has_qv_dims, head_dims, is_wide, other_queries, second_queries
from .limits import LARGEST_SCALE, MAX_WINDOW, SMALLEST_SCALE
from .mla import wide
from .mod_rules import block_mask, listed_blocks, mod_arguments, mods
from .params import (
    ARGUMENTS,
    DESCALES,
    TENSORS,
    AttentionMode,
    DataType,
    has_packed_keys,
    is_packed,
)
from .plain import BAD, plain
from .scores import (
    alibi_stride,
    alignment_of,
    has_alibi_stride,
    has_optionals,
    lone_strides,
    mask_strides,
    packed_masks,
    rng_state,
    score_choices,
    softcap,
)
from .sentences import Sentences, must
from .sequences import (
    are_totals_missing,
    cache_sizes,
    fixed_splits,
    has_fixed_splits,
    is_masked,
    masked_sizes,
    padded_places,
    pages,
    sizes,
    varlen,
)
from .status import Problem, Status, shown
from .strides import descale_strides, has_descale_strides, lone_descale_strides, strides

# Alignment in bytes of every pointer field that is read or written.
ALIGNMENT = {name: argument.alignment for name, argument in ARGUMENTS.items() if argument.kind == "pointer"}
_read_tensors = attrgetter(*TENSORS)
_read_by_16, _read_by_4 = (attrgetter(*(name for name in ALIGNMENT if ALIGNMENT[name] == n)) for n in (16, 4))
_read_descales = attrgetter(*DESCALES)

SPLIT_FIELDS = {
    "num_splits": f"an int from 0 (automatic) to {MAX_SPLITS}",
    "max_num_splits": f"an int from 0 (as many as {MAX_SPLITS}) to {MAX_SPLITS}",
    "fixed_split_size": "an int of at least 0, in tokens; 0: off",
}

# ---- the rules -------------------------------------------------------------------------------------------------------


def _pointers_present(p) -> Sentences:
    if all(_read_tensors(p)):
        return ()
    missing = [name for name in TENSORS if not getattr(p, name)]
    # Of no rows nothing is read or written, and empty arrays have no address in most libraries.
    empty = ()
    if is_packed(p) and not are_totals_missing(p):
        empty = (("q", "out") if p.total_q == 0 else ()) + (("k", "v") if has_packed_keys(p) and not p.total_k else ())
    return [must(p, name, "the device address of a tensor") for name in missing if name not in empty]


def _heads(p) -> Sentences:
    heads, heads_k = p.num_heads, p.num_heads_k
    bad = [name for name in ("num_heads", "num_heads_k") if type(count := getattr(p, name)) is not int or count < 1]
    if bad:
        return [must(p, name, "a positive int") for name in bad]
    if heads_k > heads:
        return [must(p, "num_heads_k", f"at most num_heads={shown(heads)}")]
    return [must(p, "num_heads", f"a multiple of num_heads_k={shown(heads_k)}")] if heads % heads_k else ()


def _causal_window(p) -> Sentences:
    if p.is_causal is not True:
        return ()
    return [
        must(p, name, "negative (unbounded) with is_causal=True")
        for name in ("window_size_left", "window_size_right")
        if type(size := getattr(p, name)) is int and size >= 0
    ]


def _is_decode(p) -> bool:
    return p.mode is AttentionMode.DECODE


def _decode(p) -> Sentences:
    return () if p.seqlen_q == 1 else [must(p, "seqlen_q", "1 with mode=DECODE")]


def _alignment(p) -> Sentences:
    try:
        bits = (p.scheduler_metadata or 0) << 2
        for value in filter(None, _read_by_4(p)):
            bits |= value
        bits <<= 2
        for value in filter(None, _read_by_16(p)):
            bits |= value
        if not bits & 15 and not bits >> 64 and not has_optionals(p):
            return ()
    except TypeError:  # BAD
        pass
    found = []
    for name, declared in ALIGNMENT.items():
        value, alignment = getattr(p, name) or 0, alignment_of(p, name, declared)
        if value is BAD:
            found.append(
                must(
                    p,
                    name,
                    "an int device address or have __int__; an array or buffer is passed by its "
                    "address (array.data.ptr, tensor.data_ptr(), buffer.handle)",
                )
            )
        elif value % alignment or not 0 <= value < 2**64:
            stated = f"{value:#x}" if abs(value) < 2**128 else shown(value)
            aligned = f" aligned to {alignment} bytes" if alignment > 1 else ""
            found.append(f"{name}={stated}: must be a device address{aligned}")
    return found


def _choices(p) -> Sentences:
    dtype, found = p.dtype, []
    if has_no_dtype := dtype is BAD or dtype is DataType.FP32:
        found.append(must(p, "dtype", "DataType.FP16, BF16 or FP8_E4M3"))
    outputs = (*((DataType.FP16, DataType.BF16) if dtype is DataType.FP8_E4M3 else (dtype,)), DataType.FP32)
    if p.out_dtype is not None and not has_no_dtype and p.out_dtype not in outputs:
        accepted = " or ".join(output.name for output in outputs)
        found.append(must(p, "out_dtype", f"None or {accepted} with dtype={dtype.name}"))
    if p.mode is BAD:
        found.append(must(p, "mode", "AttentionMode.PREFILL, DECODE or VARLEN_PREFILL"))
    if p.is_causal is BAD:
        found.append(must(p, "is_causal", "True or False"))
    if p.pack_gqa is BAD:
        found.append(must(p, "pack_gqa", "None (automatic), True or False"))
    if p.zero_padding is BAD:
        found.append(must(p, "zero_padding", "True or False"))
    elif p.zero_padding and p.mode is not AttentionMode.VARLEN_PREFILL:
        found.append(must(p, "zero_padding", "False without cu_seqlens_q: dense queries have no padding"))
    return found


def _counts(p) -> Sentences:
    found = [
        must(p, name, f"an int up to {MAX_WINDOW}; negative is unbounded")
        for name in ("window_size_left", "window_size_right")
        if type(size := getattr(p, name)) is not int or size > MAX_WINDOW
    ]
    found += [must(p, name, accepted) for name, accepted in SPLIT_FIELDS.items() if type(getattr(p, name)) is not int]
    return found + [
        must(p, name, "an int of at least 0")
        for name in ("workspace_bytes", "sm_margin")
        if type(size := getattr(p, name)) is not int or size < 0
    ]


def _scale(p) -> Sentences:
    scale = p.softmax_scale
    if scale is None or scale is not BAD and SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        return ()
    accepted = f"a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
    return [must(p, "softmax_scale", f"None (1/sqrt(head_dim)) or {accepted}")]


def _workspace(p) -> Sentences:
    size = p.workspace_bytes
    if type(size) is not int or size < 0 or bool(p.workspace) == (size > 0):
        return ()
    return [f"workspace={shown(getattr(p, 'raw', p).workspace)}, workspace_bytes={shown(size)}: must be given together"]


def _has_no_descales(p) -> bool:
    return not has_fp8_keys(p) and p.dtype is not BAD and p.kv_dtype is not BAD


def _descales(p) -> Sentences:
    if not any(_read_descales(p)):
        return ()
    return [
        must(p, name, f"None with dtype={p.dtype.name}: descales belong to FP8_E4M3")
        for name in DESCALES
        if getattr(p, name)
    ]


def _num_splits(p) -> Sentences:
    splits, most, size = values = p.num_splits, p.max_num_splits, p.fixed_split_size
    if not type(splits) is type(most) is type(size) is int:
        return ()
    found = [
        must(p, name, accepted)
        for (name, accepted), value in zip(SPLIT_FIELDS.items(), values, strict=True)
        if value < 0 or value > MAX_SPLITS and name != "fixed_split_size"
    ]
    if not found and size and splits > 1:
        found.append(must(p, "num_splits", f"0 or 1 with fixed_split_size={shown(size)}"))
    if not found and most and splits > most:
        found.append(must(p, "num_splits", f"at most max_num_splits={most}"))
    return found


class Rule(NamedTuple):
    """A row of the table.

    of_choices   it reads choices (params.CHOICES) alone: asked once, it holds for every call that makes the same ones
    concerns     whether it has anything to say of calls of these choices; it too reads choices alone. None: of all
    """

    status: Status
    objections: Callable[..., Sentences]
    of_choices: bool = False
    concerns: Callable[..., bool] | None = None


RULES = (
    Rule(Status.NULL_POINTER, _pointers_present),
    Rule(Status.UNSUPPORTED_HEAD_DIM, head_dims, of_choices=True),
    Rule(Status.UNSUPPORTED_HEAD_DIM, second_queries, concerns=has_qv_dims),
    Rule(Status.FP8_HEAD_DIM, fp8_head_dims, of_choices=True),
    Rule(Status.INVALID_HEADS, _heads, of_choices=True),
    Rule(Status.CAUSAL_WINDOW_CONFLICT, _causal_window, of_choices=True),
    Rule(Status.VARLEN_MISMATCH, varlen),
    Rule(Status.INVALID_SHAPE, sizes),
    Rule(Status.INVALID_SHAPE, cache_sizes),
    Rule(Status.INVALID_SHAPE, masked_sizes, concerns=is_masked),
    Rule(Status.INVALID_SHAPE, strides),
    Rule(Status.INVALID_SHAPE, descale_strides, concerns=has_descale_strides),
    Rule(Status.INVALID_SHAPE, alibi_stride, concerns=has_alibi_stride),
    Rule(Status.INVALID_SHAPE, mask_strides),
    Rule(Status.INVALID_SHAPE, new_sizes),
    Rule(Status.MODE_MISMATCH, _decode, concerns=_is_decode),
    Rule(Status.INVALID_ARGUMENT, _alignment),
    Rule(Status.INVALID_ARGUMENT, _choices, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, kv_dtype, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _counts, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _scale),
    Rule(Status.INVALID_ARGUMENT, score_choices, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, lone_strides),
    Rule(Status.INVALID_ARGUMENT, rng_state),
    Rule(Status.INVALID_ARGUMENT, mods, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, mod_arguments),
    Rule(Status.INVALID_ARGUMENT, block_mask),
    Rule(Status.INVALID_ARGUMENT, new_keys),
    Rule(Status.INVALID_ARGUMENT, other_queries),
    Rule(Status.INVALID_ARGUMENT, _workspace),
    Rule(Status.INVALID_ARGUMENT, _descales, concerns=_has_no_descales),
    Rule(Status.INVALID_ARGUMENT, lone_descale_strides, concerns=has_descale_strides),
    Rule(Status.SOFTCAP_UNSUPPORTED, softcap, of_choices=True),
    Rule(Status.SPLIT_KV_UNSUPPORTED, _num_splits, of_choices=True),
    Rule(Status.SPLIT_KV_UNSUPPORTED, fixed_splits, concerns=has_fixed_splits),
    Rule(Status.PAGED_KV_UNSUPPORTED, pages),
    Rule(Status.ROTARY_UNSUPPORTED, rotary),
    Rule(Status.FEATURE_UNSUPPORTED, padded_places),
    Rule(Status.FEATURE_UNSUPPORTED, fp8_rotary),
    Rule(Status.FEATURE_UNSUPPORTED, packed_masks),
    Rule(Status.FEATURE_UNSUPPORTED, listed_blocks),
    Rule(Status.FEATURE_UNSUPPORTED, wide, concerns=is_wide),
    Rule(Status.FEATURE_UNSUPPORTED, unserved, concerns=has_fp8_cache),
)


# ---- asking ----------------------------------------------------------------------------------------------------------


def contract_problems(params) -> list[Problem]:
    """What the contract objects to; nothing about how large a workspace must be, which the plan knows
    (planning/operations.py)."""
    return list(walk(plain(params)))


def first_problem(p) -> Problem | None:
    """The first of the problems of plain params."""
    return next(walk(p), None)


def walk(p) -> Iterator[Problem]:
    """The problems of plain params, in the order of the rules."""
    for status, objections, _, concerns in RULES:
        if concerns is None or concerns(p):
            for detail in objections(p):
                yield Problem(status, detail)


def remaining(p) -> tuple[Callable[..., Sentences], ...]:
    """The rules that remain to be asked of other calls that make the choices of these plain params, which are good."""
    return tuple(
        rule.objections for rule in RULES if not rule.of_choices and (rule.concerns is None or rule.concerns(p))
    )
