"""FlashAttentionParams -> what is wrong with it, in words. Pure Python: no GPU, no CUDA, no CuTe DSL.

`RULES` is the contract: a row per rule, in the order in which `forward` reports. A rule takes the params (plain.py) and
returns a sentence for each thing it objects to: field, value, what is accepted. A good call in plain values walks them
all in about 10 us.

A value of the wrong type is a problem like any other, not an exception: it gets the status of its field, and
INVALID_ARGUMENT where the field has none. Integers are whatever has `__index__`, except bool.
"""

from collections.abc import Iterable, Iterator
from operator import attrgetter

from .formats import FP8_HEAD_DIMS, HEAD_DIMS, MAX_SPLITS
from .limits import (
    DIMS,
    LARGEST_SCALE,
    MAX_SIZE,
    MAX_TILES,
    MAX_WINDOW,
    SMALLEST_SCALE,
    SMALLEST_TILE_M,
    TMA_ALIGNMENT,
    TMA_STRIDE_BYTES,
)
from .params import ARGUMENTS, DESCALES, OFF, TENSORS, AttentionMode, DataType, is_packed, names, tensor_sizes
from .plain import BAD, plain
from .status import Problem, Status, shown

# Alignment in bytes of every pointer field that is read or written.
ALIGNMENT = {
    name: argument.alignment
    for name, argument in ARGUMENTS.items()
    if argument.kind == "pointer" and not argument.refused
}
_STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in TENSORS for dim in DIMS)
_DESCALE_STRIDES = names(kind="stride", is_fp8=True)
_CONTIGUOUS, _CONTIGUOUS_OUT = (None,) * len(_STRIDES), (None,) * len(DIMS)
_COMMON_DESCALES = (0,) * len(_DESCALE_STRIDES)
_read_tensors, _read_strides, _read_descale_strides = (
    attrgetter(*fields) for fields in (TENSORS, _STRIDES, _DESCALE_STRIDES)
)
_read_by_16, _read_by_4 = (attrgetter(*(name for name in ALIGNMENT if ALIGNMENT[name] == n)) for n in (16, 4))
_read_descales = attrgetter(*DESCALES)

Sentences = Iterable[str]


def _is_int(value, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _must(p, name: str, accepted: str) -> str:
    return f"{name}={shown(getattr(getattr(p, 'raw', p), name))}: must be {accepted}"


# ---- the rules -------------------------------------------------------------------------------------------------------


def _pointers_present(p) -> Sentences:
    if all(_read_tensors(p)):
        return ()
    return [_must(p, name, "the device address of a tensor") for name in TENSORS if not getattr(p, name)]


def _head_dim(p) -> Sentences:
    return () if p.head_dim in HEAD_DIMS else [_must(p, "head_dim", f"{listed(HEAD_DIMS)}")]


def _fp8_head_dim(p) -> Sentences:
    if p.dtype is not DataType.FP8_E4M3 or p.head_dim in FP8_HEAD_DIMS or p.head_dim not in HEAD_DIMS:
        return ()
    return [_must(p, "head_dim", f"{listed(FP8_HEAD_DIMS)} with dtype=FP8_E4M3")]


def listed(numbers: tuple[int, ...]) -> str:
    """In words: 64, 96 or 128."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"


def _heads(p) -> Sentences:
    heads, heads_k = p.num_heads, p.num_heads_k
    bad = [name for name in ("num_heads", "num_heads_k") if type(count := getattr(p, name)) is not int or count < 1]
    if bad:
        return [_must(p, name, "a positive int") for name in bad]
    if heads_k > heads:
        return [_must(p, "num_heads_k", f"at most num_heads={heads}")]
    return [_must(p, "num_heads", f"a multiple of num_heads_k={heads_k}")] if heads % heads_k else ()


def _causal_window(p) -> Sentences:
    if p.is_causal is not True:
        return ()
    return [
        _must(p, name, "negative (unbounded) with is_causal=True")
        for name in ("window_size_left", "window_size_right")
        if type(size := getattr(p, name)) is int and size >= 0
    ]


def _varlen(p) -> Sentences:
    totals_missing = p.total_q in OFF and p.total_k in OFF
    if not is_packed(p):
        return () if totals_missing else [f"{_totals(p)}: must be 0 without cu_seqlens_q and cu_seqlens_k"]
    found = [
        _must(p, name, "a device address: packed sequences need cu_seqlens_q and cu_seqlens_k")
        for name in ("cu_seqlens_q", "cu_seqlens_k")
        if not getattr(p, name)
    ]
    if totals_missing:
        found.append(f"{_totals(p)}: must be the rows of packed q and of packed k and v; one of them may be 0")
    if p.mode is not AttentionMode.VARLEN_PREFILL and p.mode is not BAD:
        found.append(_must(p, "mode", "AttentionMode.VARLEN_PREFILL with cu_seqlens_q and cu_seqlens_k"))
    return found


def _totals(p) -> str:
    raw = getattr(p, "raw", p)
    return f"total_q={shown(raw.total_q)}, total_k={shown(raw.total_k)}"


def _sizes(p) -> Sentences:
    packed = is_packed(p)
    rows_q, rows_k, fewest = ("total_q", "total_k", 0) if packed else ("seqlen_q", "seqlen_k", 1)
    batch, rows, heads = p.batch_size, getattr(p, rows_q), p.num_heads
    if not (
        _is_int(batch, 1, MAX_SIZE)
        and _is_int(rows, fewest, MAX_SIZE)
        and _is_int(getattr(p, rows_k), fewest, MAX_SIZE)
    ):
        least = {"batch_size": 1, rows_q: fewest, rows_k: fewest}
        return [
            _must(p, name, f"an int from {least[name]} to {MAX_SIZE}")
            for name in least
            if not _is_int(getattr(p, name), least[name], MAX_SIZE)
        ]
    if type(heads) is not int or heads < 1:
        return ()
    # Every packed sequence may end in a partly filled tile of its own.
    tiles = rows // SMALLEST_TILE_M + batch if packed else batch * -(-rows // SMALLEST_TILE_M)
    splits = max(1, p.num_splits) if type(p.num_splits) is int else 1
    if heads * tiles * splits <= MAX_TILES:
        return ()
    times = f", num_splits={splits}" if splits > 1 else ""
    return [
        (
            f"batch_size={batch}, num_heads={heads}, {rows_q}={rows}{times}: must make at most {MAX_TILES} tiles of "
            f"{SMALLEST_TILE_M} rows, not {heads * tiles * splits}"
        )
    ]


def _strides(p) -> Sentences:
    if _read_descale_strides(p) == _COMMON_DESCALES and _are_common(p, _read_strides(p)):
        return ()
    found = [sentence for tensor in TENSORS for sentence in _strides_of(p, tensor)]
    for tensor, heads in zip("qkv", (p.num_heads, p.num_heads_k, p.num_heads_k), strict=True):
        for name, size in ((f"{tensor}_descale_batch_stride", p.batch_size), (f"{tensor}_descale_head_stride", heads)):
            stride = getattr(p, name)
            # As with the tensors' strides, that of a dimension of size 1 means nothing.
            if type(stride) is not int or size != 1 and not 0 <= stride <= MAX_SIZE:
                found.append(
                    _must(p, name, f"an int from 0 to {MAX_SIZE}, in elements; 0: one descale for all along it")
                )
    return found


def _are_common(p, strides: tuple) -> bool:
    """At a glance: TMA takes all of these strides, whatever the sizes, and out is contiguous. False says nothing."""
    head_dim, (_, rows_q, heads), (_, rows_k, heads_k) = p.head_dim, tensor_sizes(p, "q"), tensor_sizes(p, "k")
    if not (
        head_dim in HEAD_DIMS
        and type(rows_q) is type(rows_k) is type(heads) is type(heads_k) is int
        and 0 <= rows_q * heads * head_dim < TMA_STRIDE_BYTES // 2
        and 0 <= rows_k * heads_k * head_dim < TMA_STRIDE_BYTES // 2
    ):
        return False
    if strides == _CONTIGUOUS:
        return True
    bits = 0
    for stride in strides[: -len(DIMS)]:
        if stride is not None:
            if type(stride) is not int:
                return False
            bits |= stride
    fit = not bits & TMA_ALIGNMENT - 1 and 0 <= bits < TMA_STRIDE_BYTES // 2
    return fit and strides[-len(DIMS) :] == _CONTIGUOUS_OUT


def _strides_of(p, tensor: str) -> Sentences:
    fields = [f"{tensor}_{dim}_stride" for dim in DIMS]
    given = [getattr(p, name) for name in fields]
    if BAD in given:
        return [
            _must(p, name, "None (contiguous) or an int, in elements")
            for name, stride in zip(fields, given, strict=True)
            if stride is BAD
        ]
    sizes, head_dim = tensor_sizes(p, tensor), p.head_dim
    if head_dim not in HEAD_DIMS or not all(_is_int(size, 1, MAX_SIZE) for size in sizes):
        return ()  # an empty tensor has no strides, and those of an impossible one mean nothing
    _, rows, heads = sizes
    contiguous = (rows * heads * head_dim, heads * head_dim, head_dim)
    # Along a dimension of size 1 nothing ever moves: its stride means nothing, and frameworks leave any number there.
    moving = [
        (f"{name}=None (contiguous: {default})", default, size)
        if stride is None
        else (f"{name}={stride}", stride, size)
        for name, stride, default, size in zip(fields, given, contiguous, sizes, strict=True)
        if size > 1
    ]
    is_fp8 = tensor != "out" and p.dtype is DataType.FP8_E4M3
    multiple, limit = (TMA_ALIGNMENT, TMA_STRIDE_BYTES) if is_fp8 else (TMA_ALIGNMENT // 2, TMA_STRIDE_BYTES // 2)
    least, why = (head_dim, " (head_dim: rows must not overlap)") if tensor == "out" else (0, "")
    found = [
        f"{stated}: must be at least {least}{why}, below {limit} and a multiple of {multiple} elements "
        f"({TMA_ALIGNMENT} bytes, for TMA)"
        for stated, stride, _ in moving
        if not least <= stride < limit or stride % multiple
    ]
    return [*found, *_overlaps(moving, head_dim)] if tensor == "out" else found


def _overlaps(moving: list[tuple[str, int, int]], head_dim: int) -> Iterator[str]:
    """One step of a large stride against steps of a smaller one: finds the usual mistakes, never a false one."""
    by_stride = sorted((dim for dim in moving if dim[1] >= head_dim), key=lambda dim: dim[1])
    for index, (small_stated, small, size) in enumerate(by_stride):
        for large_stated, large, _ in by_stride[index + 1 :]:
            steps, rest = divmod(large, small)
            if (rest < head_dim and steps < size) or (small - rest < head_dim and steps + 1 < size):
                yield (
                    f"{small_stated}, {large_stated}: must keep the rows of out apart; {size} steps of {small} run "
                    f"into one of {large}"
                )


def _decode(p) -> Sentences:
    if p.mode is not AttentionMode.DECODE or p.seqlen_q == 1:
        return ()
    return [_must(p, "seqlen_q", "1 with mode=DECODE")]


def _alignment(p) -> Sentences:
    by_16, by_4 = _read_by_16(p), _read_by_4(p)
    if BAD not in by_16 and BAD not in by_4:
        bits = 0
        for value in by_4:
            bits |= value or 0
        bits <<= 2
        for value in by_16:
            bits |= value or 0
        if not bits & 15 and not bits >> 64:
            return ()
    found = []
    for name, alignment in ALIGNMENT.items():
        value = getattr(p, name) or 0
        if value is BAD:
            found.append(
                _must(
                    p,
                    name,
                    "an int device address or have __int__; an array or buffer is passed by its "
                    "address (array.data.ptr, tensor.data_ptr(), buffer.handle)",
                )
            )
        elif value % alignment or not 0 <= value < 2**64:
            found.append(f"{name}={value:#x}: must be a device address aligned to {alignment} bytes")
    return found


def _choices(p) -> Sentences:
    dtype, found = p.dtype, []
    if dtype is BAD:
        found.append(_must(p, "dtype", "DataType.FP16, BF16 or FP8_E4M3"))
    outputs = (DataType.FP16, DataType.BF16) if dtype is DataType.FP8_E4M3 else (dtype,)
    if p.out_dtype is not None and dtype is not BAD and p.out_dtype not in outputs:
        accepted = " or ".join(output.name for output in outputs)
        found.append(_must(p, "out_dtype", f"None or {accepted} with dtype={dtype.name}"))
    if p.mode is BAD:
        found.append(_must(p, "mode", "AttentionMode.PREFILL, DECODE or VARLEN_PREFILL"))
    if p.is_causal is BAD:
        found.append(_must(p, "is_causal", "True or False"))
    if p.pack_gqa is BAD:
        found.append(_must(p, "pack_gqa", "None (automatic), True or False"))
    return found


def _numbers(p) -> Sentences:
    found = [
        _must(p, name, f"an int up to {MAX_WINDOW}; negative is unbounded")
        for name in ("window_size_left", "window_size_right")
        if type(size := getattr(p, name)) is not int or size > MAX_WINDOW
    ]
    scale = p.softmax_scale
    if scale is not None and (scale is BAD or not SMALLEST_SCALE <= scale <= LARGEST_SCALE):
        accepted = f"a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
        found.append(_must(p, "softmax_scale", f"None (1/sqrt(head_dim)) or {accepted}"))
    if type(p.num_splits) is not int:
        found.append(_must(p, "num_splits", f"an int from 0 (automatic) to {MAX_SPLITS}"))
    size = p.workspace_bytes
    if type(size) is not int or size < 0:
        found.append(_must(p, "workspace_bytes", "an int of at least 0"))
    elif bool(p.workspace) != (size > 0):
        workspace = shown(getattr(p, "raw", p).workspace)
        found.append(f"workspace={workspace}, workspace_bytes={size}: must be given together")
    return found


def _descales(p) -> Sentences:
    if p.dtype is DataType.FP8_E4M3 or p.dtype is BAD or not any(_read_descales(p)):
        return ()
    return [
        _must(p, name, f"None with dtype={p.dtype.name}: descales belong to FP8_E4M3")
        for name in DESCALES
        if getattr(p, name)
    ]


def _num_splits(p) -> Sentences:
    if type(p.num_splits) is not int or 0 <= p.num_splits <= MAX_SPLITS:
        return ()
    return [_must(p, "num_splits", f"from 0 (automatic) to {MAX_SPLITS}")]


def _off(status: Status):
    """The rule for fields that are part of the interface but of nothing that this library does."""
    refused = {
        name: f"; {argument.instead}" if argument.instead else ""
        for name, argument in ARGUMENTS.items()
        if argument.refused is status
    }
    read = attrgetter(*refused) if len(refused) > 1 else lambda p: (getattr(p, next(iter(refused))),)

    def refused_is_off(p) -> Sentences:
        if OFF.issuperset(read(p)):
            return ()
        return [
            _must(p, name, f"None or 0: {name} is not supported{instead}")
            for name, instead in refused.items()
            if getattr(p, name) not in OFF
        ]

    return refused_is_off


# Valid by the contract, no kernel yet: (field, when the call asks for the feature, the feature, accepted meanwhile).
# Each row leaves with the kernel that makes it true.
PENDING = (
    (
        "num_splits",
        lambda p: is_packed(p) and type(p.num_splits) is int and p.num_splits >= 2,
        "split-KV of packed sequences",
        "0 or 1 with cu_seqlens_q and cu_seqlens_k",
    ),
    (
        "pack_gqa",
        lambda p: is_packed(p) and p.pack_gqa is True,
        "packed heads of packed sequences",
        "None or False with cu_seqlens_q and cu_seqlens_k",
    ),
)


def _pending(p) -> Sentences:
    return [
        _must(p, name, f"{accepted}: {feature} not implemented yet")
        for name, asks, feature, accepted in PENDING
        if asks(p)
    ]


CONTRACT_RULES = (
    (Status.NULL_POINTER, _pointers_present),
    (Status.UNSUPPORTED_HEAD_DIM, _head_dim),
    (Status.FP8_HEAD_DIM, _fp8_head_dim),
    (Status.INVALID_HEADS, _heads),
    (Status.CAUSAL_WINDOW_CONFLICT, _causal_window),
    (Status.VARLEN_MISMATCH, _varlen),
    (Status.INVALID_SHAPE, _sizes),
    (Status.INVALID_SHAPE, _strides),
    (Status.MODE_MISMATCH, _decode),
    (Status.INVALID_ARGUMENT, _alignment),
    (Status.INVALID_ARGUMENT, _choices),
    (Status.INVALID_ARGUMENT, _numbers),
    (Status.INVALID_ARGUMENT, _descales),
    (Status.SOFTCAP_UNSUPPORTED, _off(Status.SOFTCAP_UNSUPPORTED)),
    (Status.SPLIT_KV_UNSUPPORTED, _num_splits),
    (Status.PAGED_KV_UNSUPPORTED, _off(Status.PAGED_KV_UNSUPPORTED)),
    (Status.ROTARY_UNSUPPORTED, _off(Status.ROTARY_UNSUPPORTED)),
    (Status.FEATURE_UNSUPPORTED, _off(Status.FEATURE_UNSUPPORTED)),
)
RULES = (*CONTRACT_RULES, (Status.FEATURE_UNSUPPORTED, _pending))
# Of a call that sets none of the refused fields.
_read_refused = attrgetter(*(name for name, argument in ARGUMENTS.items() if argument.refused))
_RULES_IF_OFF = tuple(row for row in RULES if row[1].__name__ != "refused_is_off")


# ---- asking ----------------------------------------------------------------------------------------------------------


def contract_problems(params) -> list[Problem]:
    """What the contract objects to; nothing about kernels that are not implemented yet, nor how large a workspace must
    be, which the plan knows (planning/problem.py)."""
    return list(walk(plain(params), CONTRACT_RULES))


def first_problem(p) -> Problem | None:
    """The first of the problems of plain params."""
    rules = _RULES_IF_OFF if OFF.issuperset(_read_refused(p)) else RULES
    for status, rule in rules:
        for detail in rule(p):
            return Problem(status, detail)
    return None


def walk(p, rules=RULES) -> Iterator[Problem]:
    """The problems of plain params, in the order of the rules."""
    for status, rule in rules:
        for detail in rule(p):
            yield Problem(status, detail)
