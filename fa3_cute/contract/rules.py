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

from .formats import FP8_HEAD_DIMS, HEAD_DIMS, MAX_SPLITS
from .limits import (
    LARGEST_SCALE,
    MAX_MASKED_ROWS,
    MAX_SIZE,
    MAX_TILES,
    MAX_WINDOW,
    SMALLEST_SCALE,
    SMALLEST_TILE_M,
)
from .params import ARGUMENTS, DESCALES, NUMBERS, OFF, TENSORS, AttentionMode, DataType, is_packed
from .plain import BAD, plain
from .sentences import Sentences, is_int, listed, must
from .status import Problem, Status, shown
from .strides import descale_strides, has_descale_strides, strides

# Alignment in bytes of every pointer field that is read or written.
ALIGNMENT = {
    name: argument.alignment
    for name, argument in ARGUMENTS.items()
    if argument.kind == "pointer" and not argument.refused
}
_read_tensors = attrgetter(*TENSORS)
_read_by_16, _read_by_4 = (attrgetter(*(name for name in ALIGNMENT if ALIGNMENT[name] == n)) for n in (16, 4))
_read_descales = attrgetter(*DESCALES)

# ---- the rules -------------------------------------------------------------------------------------------------------


def _pointers_present(p) -> Sentences:
    if all(_read_tensors(p)):
        return ()
    missing = [name for name in TENSORS if not getattr(p, name)]
    # Of no rows nothing is read or written, and empty arrays have no address in most libraries.
    if is_packed(p) and (p.total_q == 0) != (p.total_k == 0):
        empty = ("q", "out") if p.total_q == 0 else ("k", "v")
        missing = [name for name in missing if name not in empty]
    return [must(p, name, "the device address of a tensor") for name in missing]


def _head_dim(p) -> Sentences:
    return () if p.head_dim in HEAD_DIMS else [must(p, "head_dim", f"{listed(HEAD_DIMS)}")]


def _fp8_head_dim(p) -> Sentences:
    if p.dtype is not DataType.FP8_E4M3 or p.head_dim in FP8_HEAD_DIMS or p.head_dim not in HEAD_DIMS:
        return ()
    return [must(p, "head_dim", f"{listed(FP8_HEAD_DIMS)} with dtype=FP8_E4M3")]


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


def _varlen(p) -> Sentences:
    totals_missing = p.total_q in OFF and p.total_k in OFF
    if not is_packed(p):
        return () if totals_missing else [f"{_totals(p)}: must be 0 without cu_seqlens_q and cu_seqlens_k"]
    found = [
        must(p, name, "a device address: packed sequences need cu_seqlens_q and cu_seqlens_k")
        for name in ("cu_seqlens_q", "cu_seqlens_k")
        if not getattr(p, name)
    ]
    if totals_missing:
        found.append(f"{_totals(p)}: must be the rows of packed q and of packed k and v; one of them may be 0")
    if p.mode is not AttentionMode.VARLEN_PREFILL and p.mode is not BAD:
        found.append(must(p, "mode", "AttentionMode.VARLEN_PREFILL with cu_seqlens_q and cu_seqlens_k"))
    return found


def _totals(p) -> str:
    raw = getattr(p, "raw", p)
    return f"total_q={shown(raw.total_q)}, total_k={shown(raw.total_k)}"


def _lengths(packed: bool) -> tuple[str, str]:
    return ("total_q", "total_k") if packed else ("seqlen_q", "seqlen_k")


def _sizes(p) -> Sentences:
    packed = is_packed(p)
    batch, heads = p.batch_size, p.num_heads
    rows, keys, fewest = (p.total_q, p.total_k, 0) if packed else (p.seqlen_q, p.seqlen_k, 1)
    if not (
        type(batch) is type(rows) is type(keys) is int
        and 1 <= batch <= MAX_SIZE
        and fewest <= rows <= MAX_SIZE
        and fewest <= keys <= MAX_SIZE
    ):
        least = {"batch_size": 1, **dict.fromkeys(_lengths(packed), fewest)}
        return [
            must(p, name, f"an int from {least[name]} to {MAX_SIZE}")
            for name in least
            if not is_int(getattr(p, name), least[name], MAX_SIZE)
        ]
    if type(heads) is not int or heads < 1:
        return ()
    # Every packed sequence may end in a partly filled tile of its own.
    tiles = rows // SMALLEST_TILE_M + batch if packed else batch * -(-rows // SMALLEST_TILE_M)
    splits = max(1, p.num_splits) if type(p.num_splits) is int else 1
    if heads * tiles * splits <= MAX_TILES:
        return ()
    stated = f"batch_size={batch}, num_heads={shown(heads)}, {_lengths(packed)[0]}={rows}"
    times = f", num_splits={shown(splits)}" if splits > 1 else ""
    return [
        (
            f"{stated}{times}: must make at most {MAX_TILES} tiles of {SMALLEST_TILE_M} rows, "
            f"not {shown(heads * tiles * splits)}"
        )
    ]


def _is_masked(p) -> bool:
    bounds = p.window_size_left, p.window_size_right
    return p.is_causal is True or any(type(bound) is int and bound >= 0 for bound in bounds)


def _masked_sizes(p) -> Sentences:
    packed = is_packed(p)
    rows_q, rows_k = (p.total_q, p.total_k) if packed else (p.seqlen_q, p.seqlen_k)
    if type(rows_q) is not int or type(rows_k) is not int or rows_q + rows_k <= MAX_MASKED_ROWS:
        return ()
    if not (is_int(rows_q, 0, MAX_SIZE) and is_int(rows_k, 0, MAX_SIZE)):  # the rule before this one has said so
        return ()
    names = _lengths(packed)
    stated = f"{names[0]}={rows_q}, {names[1]}={rows_k}"
    return [f"{stated}: must add up to at most {MAX_MASKED_ROWS} with is_causal or a window"]


def _is_decode(p) -> bool:
    return p.mode is AttentionMode.DECODE


def _decode(p) -> Sentences:
    return () if p.seqlen_q == 1 else [must(p, "seqlen_q", "1 with mode=DECODE")]


def _alignment(p) -> Sentences:
    bits = 0
    try:
        for value in filter(None, _read_by_4(p)):
            bits |= value
        bits <<= 2
        for value in filter(None, _read_by_16(p)):
            bits |= value
        if not bits & 15 and not bits >> 64:
            return ()
    except TypeError:  # BAD
        pass
    found = []
    for name, alignment in ALIGNMENT.items():
        value = getattr(p, name) or 0
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
            found.append(f"{name}={stated}: must be a device address aligned to {alignment} bytes")
    return found


def _choices(p) -> Sentences:
    dtype, found = p.dtype, []
    if has_no_dtype := dtype is BAD or dtype is DataType.FP32:
        found.append(must(p, "dtype", "DataType.FP16, BF16 or FP8_E4M3"))
    outputs = (DataType.FP16, DataType.BF16) if dtype is DataType.FP8_E4M3 else (dtype,)
    if p.out_dtype is not None and not has_no_dtype and p.out_dtype not in outputs:
        accepted = " or ".join(output.name for output in outputs)
        found.append(must(p, "out_dtype", f"None or {accepted} with dtype={dtype.name}"))
    if p.mode is BAD:
        found.append(must(p, "mode", "AttentionMode.PREFILL, DECODE or VARLEN_PREFILL"))
    if p.is_causal is BAD:
        found.append(must(p, "is_causal", "True or False"))
    if p.pack_gqa is BAD:
        found.append(must(p, "pack_gqa", "None (automatic), True or False"))
    return found


def _counts(p) -> Sentences:
    found = [
        must(p, name, f"an int up to {MAX_WINDOW}; negative is unbounded")
        for name in ("window_size_left", "window_size_right")
        if type(size := getattr(p, name)) is not int or size > MAX_WINDOW
    ]
    if type(p.num_splits) is not int:
        found.append(must(p, "num_splits", f"an int from 0 (automatic) to {MAX_SPLITS}"))
    if type(p.workspace_bytes) is not int or p.workspace_bytes < 0:
        found.append(must(p, "workspace_bytes", "an int of at least 0"))
    return found


def _scale(p) -> Sentences:
    scale = p.softmax_scale
    if scale is None or scale is not BAD and SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        return ()
    accepted = f"a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
    return [must(p, "softmax_scale", f"None (1/sqrt(head_dim)) or {accepted}")]


def _features(p) -> Sentences:
    accepted = f"0 (off) or a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
    values = [(name, getattr(p, name)) for name in NUMBERS]
    return [
        must(p, name, accepted)
        for name, value in values
        if value and (value is BAD or not SMALLEST_SCALE <= value <= LARGEST_SCALE)
    ]


def _workspace(p) -> Sentences:
    size = p.workspace_bytes
    if type(size) is not int or size < 0 or bool(p.workspace) == (size > 0):
        return ()
    return [f"workspace={shown(getattr(p, 'raw', p).workspace)}, workspace_bytes={shown(size)}: must be given together"]


def _has_no_descales(p) -> bool:
    return p.dtype is not DataType.FP8_E4M3 and p.dtype is not BAD


def _descales(p) -> Sentences:
    if not any(_read_descales(p)):
        return ()
    return [
        must(p, name, f"None with dtype={p.dtype.name}: descales belong to FP8_E4M3")
        for name in DESCALES
        if getattr(p, name)
    ]


def _num_splits(p) -> Sentences:
    if type(p.num_splits) is not int or 0 <= p.num_splits <= MAX_SPLITS:
        return ()
    return [must(p, "num_splits", f"from 0 (automatic) to {MAX_SPLITS}")]


def _off(status: Status):
    """The rule for fields that are part of the interface but of nothing that this library does."""
    refused = {
        name: f"; {argument.instead}" if argument.instead else ""
        for name, argument in ARGUMENTS.items()
        if argument.refused is status
    }

    def refused_is_off(p) -> Sentences:
        return [
            must(p, name, f"None or 0: {name} is not supported{instead}")
            for name, instead in refused.items()
            if getattr(p, name) not in OFF
        ]

    return refused_is_off


# Valid by the contract, no kernel yet: of packed sequences (field, whether its value asks for the feature, the feature,
# accepted meanwhile). Each row leaves with the kernel that makes it true.
PENDING = (
    (
        "num_splits",
        lambda value: type(value) is int and value >= 2,
        "split-KV of packed sequences",
        "0 or 1 with cu_seqlens_q and cu_seqlens_k",
    ),
    (
        "pack_gqa",
        lambda value: value is True,
        "packed heads of packed sequences",
        "None or False with cu_seqlens_q and cu_seqlens_k",
    ),
)


def _pending(p) -> Sentences:
    if not is_packed(p):
        return ()
    return [
        must(p, name, f"{accepted}: {feature} not implemented yet")
        for name, asks, feature, accepted in PENDING
        if asks(getattr(p, name))
    ]


class Rule(NamedTuple):
    """A row of the table.

    of_choices   it reads choices (params.CHOICES) alone: asked once, it holds for every call that makes the same ones
    concerns     whether it has anything to say of calls of these choices; it too reads choices alone. None: of all
    """

    status: Status
    objections: Callable[..., Sentences]
    of_choices: bool = False
    concerns: Callable[..., bool] | None = None


CONTRACT_RULES = (
    Rule(Status.NULL_POINTER, _pointers_present),
    Rule(Status.UNSUPPORTED_HEAD_DIM, _head_dim, of_choices=True),
    Rule(Status.FP8_HEAD_DIM, _fp8_head_dim, of_choices=True),
    Rule(Status.INVALID_HEADS, _heads, of_choices=True),
    Rule(Status.CAUSAL_WINDOW_CONFLICT, _causal_window, of_choices=True),
    Rule(Status.VARLEN_MISMATCH, _varlen),
    Rule(Status.INVALID_SHAPE, _sizes),
    Rule(Status.INVALID_SHAPE, _masked_sizes, concerns=_is_masked),
    Rule(Status.INVALID_SHAPE, strides),
    Rule(Status.INVALID_SHAPE, descale_strides, concerns=has_descale_strides),
    Rule(Status.MODE_MISMATCH, _decode, concerns=_is_decode),
    Rule(Status.INVALID_ARGUMENT, _alignment),
    Rule(Status.INVALID_ARGUMENT, _choices, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _counts, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _scale),
    Rule(Status.INVALID_ARGUMENT, _features, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _workspace),
    Rule(Status.INVALID_ARGUMENT, _descales, concerns=_has_no_descales),
    Rule(Status.SOFTCAP_UNSUPPORTED, _off(Status.SOFTCAP_UNSUPPORTED), of_choices=True),
    Rule(Status.SPLIT_KV_UNSUPPORTED, _num_splits, of_choices=True),
    Rule(Status.PAGED_KV_UNSUPPORTED, _off(Status.PAGED_KV_UNSUPPORTED), of_choices=True),
    Rule(Status.ROTARY_UNSUPPORTED, _off(Status.ROTARY_UNSUPPORTED), of_choices=True),
    Rule(Status.FEATURE_UNSUPPORTED, _off(Status.FEATURE_UNSUPPORTED), of_choices=True),
)
RULES = (*CONTRACT_RULES, Rule(Status.FEATURE_UNSUPPORTED, _pending))


# ---- asking ----------------------------------------------------------------------------------------------------------


def contract_problems(params) -> list[Problem]:
    """What the contract objects to; nothing about kernels that are not implemented yet, nor how large a workspace must
    be, which the plan knows (planning/problem.py)."""
    return list(walk(plain(params), CONTRACT_RULES))


def first_problem(p) -> Problem | None:
    """The first of the problems of plain params."""
    return next(walk(p), None)


def walk(p, rules=RULES) -> Iterator[Problem]:
    """The problems of plain params, in the order of the rules."""
    for status, objections, _, concerns in rules:
        if concerns is None or concerns(p):
            for detail in objections(p):
                yield Problem(status, detail)


def remaining(p) -> tuple[Callable[..., Sentences], ...]:
    """The rules that remain to be asked of other calls that make the choices of these plain params, which are good."""
    return tuple(
        rule.objections for rule in RULES if not rule.of_choices and (rule.concerns is None or rule.concerns(p))
    )
