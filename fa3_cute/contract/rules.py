"""FlashAttentionParams -> what is wrong with it, in words. Pure Python: no GPU, no CUDA, no CuTe DSL.

`RULES` is the contract: a row per rule, in the order in which `forward` reports. A rule takes the params and yields a
sentence for each thing it objects to: field, value, what is accepted. `problems` walks them all; `first_problem`, which
every launch pays for, first asks quick_check.py whether there is anything to walk for.

A value of the wrong type is a problem like any other, not an exception: it gets the status of its field, and
INVALID_ARGUMENT where the field has none. Integers are whatever has `__index__`, except bool.
"""
from ..contract.formats import FP8_HEAD_DIMS, HEAD_DIMS
from .limits import (DIMS, LARGEST_SCALE, MAX_SIZE, MAX_TILES, MAX_WINDOW, SMALLEST_SCALE, SMALLEST_TILE_M, TENSORS,
                     TMA_ALIGNMENT, TMA_STRIDE_BYTES)
from .params import (AttentionMode, DataType, address, integer, is_given, is_off, is_packed, is_true, member,
                     tensor_sizes)
from .quick_check import is_common
from ..planning.splits import MAX_SPLITS, is_decode, plan_of
from .status import Problem, Status, shown

# Alignment in bytes of every pointer field that is read or written.
ALIGNMENT = {
    **dict.fromkeys((*TENSORS, "workspace"), 16),
    **dict.fromkeys(("softmax_lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
                     "q_descale_ptr", "k_descale_ptr", "v_descale_ptr"), 4),
}
DESCALES = ("q_descale_ptr", "k_descale_ptr", "v_descale_ptr")


def _at_least(value, least: int) -> bool:
    number = integer(value)
    return number is not None and number >= least


def _must(p, name: str, accepted: str) -> str:
    return f"{name}={shown(getattr(p, name))}: must be {accepted}"


# ---- the rules -------------------------------------------------------------------------------------------------------

def _pointers_present(p):
    for name in TENSORS:
        if address(getattr(p, name)) == 0:
            yield _must(p, name, "the device address of a tensor")


def _head_dim(p):
    if integer(p.head_dim) not in HEAD_DIMS:
        yield _must(p, "head_dim", "64, 96, 128, 192 or 256")


def _fp8_head_dim(p):
    is_fp8 = member(DataType, p.dtype) is DataType.FP8_E4M3
    if is_fp8 and integer(p.head_dim) in HEAD_DIMS and integer(p.head_dim) not in FP8_HEAD_DIMS:
        yield _must(p, "head_dim", "64, 96 or 128 with dtype=FP8_E4M3")


def _heads(p):
    heads, heads_k = integer(p.num_heads), integer(p.num_heads_k)
    counts = {"num_heads": heads, "num_heads_k": heads_k}
    bad = [name for name, count in counts.items() if count is None or count < 1]
    for name in bad:
        yield _must(p, name, "a positive int")
    if not bad and heads_k > heads:
        yield _must(p, "num_heads_k", f"at most num_heads={heads}")
    elif not bad and heads % heads_k:
        yield _must(p, "num_heads", f"a multiple of num_heads_k={heads_k}")


def _causal_window(p):
    for name in ("window_size_left", "window_size_right"):
        if is_true(p.is_causal) and _at_least(getattr(p, name), 0):
            yield _must(p, name, "negative (unbounded) with is_causal=True")


def _varlen(p):
    pointers = {name: is_given(getattr(p, name)) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    mode = member(AttentionMode, p.mode)
    totals = f"total_q={shown(p.total_q)}, total_k={shown(p.total_k)}"
    totals_missing = is_off(p.total_q) and is_off(p.total_k)
    if any(pointers.values()) or mode is AttentionMode.VARLEN_PREFILL:
        for name in (name for name, given in pointers.items() if not given):
            yield _must(p, name, "a device address: packed sequences need cu_seqlens_q and cu_seqlens_k")
        if totals_missing:
            yield f"{totals}: must be the rows of packed q and of packed k and v; one of them may be 0"
        if mode not in (AttentionMode.VARLEN_PREFILL, None):
            yield _must(p, "mode", "AttentionMode.VARLEN_PREFILL with cu_seqlens_q and cu_seqlens_k")
    elif not totals_missing:
        yield f"{totals}: must be 0 without cu_seqlens_q and cu_seqlens_k"


def _sizes(p):
    packed = is_packed(p)
    rows_q, rows_k, fewest = ("total_q", "total_k", 0) if packed else ("seqlen_q", "seqlen_k", 1)
    sound = True
    for name, least in (("batch_size", 1), (rows_q, fewest), (rows_k, fewest)):
        size = integer(getattr(p, name))
        if size is None or not least <= size <= MAX_SIZE:
            sound = False
            yield _must(p, name, f"an int from {least} to {MAX_SIZE}")
    batch, rows, heads = integer(p.batch_size), integer(getattr(p, rows_q)), integer(p.num_heads)
    if not sound or heads is None or heads < 1:
        return
    # Every packed sequence may end in a partly filled tile of its own.
    tiles = rows // SMALLEST_TILE_M + batch if packed else batch * -(-rows // SMALLEST_TILE_M)
    splits = max(1, integer(p.num_splits) or 1)
    if heads * tiles * splits > MAX_TILES:
        times = f", num_splits={splits}" if splits > 1 else ""
        yield (f"batch_size={batch}, num_heads={heads}, {rows_q}={rows}{times}: must make at most {MAX_TILES} tiles of "
               f"{SMALLEST_TILE_M} rows, not {heads * tiles * splits}")


def _strides(p):
    for tensor in TENSORS:
        yield from _strides_of(p, tensor)
    for tensor, heads in zip("qkv", (p.num_heads, p.num_heads_k, p.num_heads_k), strict=True):
        for name, size in ((f"{tensor}_descale_batch_stride", p.batch_size), (f"{tensor}_descale_head_stride", heads)):
            stride = 0 if is_off(getattr(p, name)) else integer(getattr(p, name))
            # As with the tensors' strides, that of a dimension of size 1 means nothing.
            if stride is None or integer(size) != 1 and not 0 <= stride <= MAX_SIZE:
                yield _must(p, name, f"an int from 0 to {MAX_SIZE}, in elements; 0: one descale for all along it")


def _strides_of(p, tensor: str):
    names = [f"{tensor}_{dim}_stride" for dim in DIMS]
    given = [getattr(p, name) for name in names]
    bad = [name for name, stride in zip(names, given, strict=True) if stride is not None and integer(stride) is None]
    for name in bad:
        yield _must(p, name, "None (contiguous) or an int, in elements")
    sizes, head_dim = tensor_sizes(p, tensor), integer(p.head_dim)
    if bad or head_dim not in HEAD_DIMS or any(size is None or not 0 < size <= MAX_SIZE for size in sizes):
        return              # an empty tensor has no strides, and those of an impossible one mean nothing
    _, rows, heads = sizes
    contiguous = (rows * heads * head_dim, heads * head_dim, head_dim)
    # Along a dimension of size 1 nothing ever moves: its stride means nothing, and frameworks leave any number there.
    moving = [(f"{name}=None (contiguous: {default})", default, size) if stride is None else
              (f"{name}={stride}", integer(stride), size)
              for name, stride, default, size in zip(names, given, contiguous, sizes, strict=True) if size > 1]
    is_fp8 = tensor != "out" and member(DataType, p.dtype) is DataType.FP8_E4M3
    multiple, limit = (TMA_ALIGNMENT, TMA_STRIDE_BYTES) if is_fp8 else (TMA_ALIGNMENT // 2, TMA_STRIDE_BYTES // 2)
    least, why = (head_dim, " (head_dim: rows must not overlap)") if tensor == "out" else (0, "")
    for stated, stride, _ in moving:
        if not least <= stride < limit or stride % multiple:
            yield (f"{stated}: must be at least {least}{why}, below {limit} and a multiple of {multiple} elements "
                   f"({TMA_ALIGNMENT} bytes, for TMA)")
    if tensor == "out":
        yield from _overlaps(moving, head_dim)


def _overlaps(moving: list[tuple[str, int, int]], head_dim: int):
    """One step of a large stride against steps of a smaller one: finds the usual mistakes, never a false one."""
    by_stride = sorted((dim for dim in moving if dim[1] >= head_dim), key=lambda dim: dim[1])
    for index, (small_stated, small, size) in enumerate(by_stride):
        for large_stated, large, _ in by_stride[index + 1:]:
            steps, rest = divmod(large, small)
            if (rest < head_dim and steps < size) or (small - rest < head_dim and steps + 1 < size):
                yield (f"{small_stated}, {large_stated}: must keep the rows of out apart; {size} steps of {small} run "
                       f"into one of {large}")


def _decode(p):
    if member(AttentionMode, p.mode) is AttentionMode.DECODE and integer(p.seqlen_q) != 1:
        yield _must(p, "seqlen_q", "1 with mode=DECODE")


def _alignment(p):
    for name, alignment in ALIGNMENT.items():
        value = address(getattr(p, name))
        if value is None:
            yield _must(p, name, "an int device address or have __int__; an array or buffer is passed by its address "
                                 "(array.data.ptr, tensor.data_ptr(), buffer.handle)")
        elif value % alignment or not 0 <= value < 2**64:
            yield f"{name}={value:#x}: must be a device address aligned to {alignment} bytes"


def _choices(p):
    dtype = member(DataType, p.dtype)
    if dtype is None:
        yield _must(p, "dtype", "DataType.FP16, BF16 or FP8_E4M3")
    outputs = (DataType.FP16, DataType.BF16) if dtype is DataType.FP8_E4M3 else (dtype,)
    if p.out_dtype is not None and dtype is not None and member(DataType, p.out_dtype) not in outputs:
        yield _must(p, "out_dtype", f"None or {' or '.join(output.name for output in outputs)} with dtype={dtype.name}")
    if member(AttentionMode, p.mode) is None:
        yield _must(p, "mode", "AttentionMode.PREFILL, DECODE or VARLEN_PREFILL")
    if is_true(p.is_causal) is None:
        yield _must(p, "is_causal", "True or False")
    if p.pack_gqa is not None and is_true(p.pack_gqa) is None:
        yield _must(p, "pack_gqa", "None (automatic), True or False")


def _numbers(p):
    for name in ("window_size_left", "window_size_right"):
        size = integer(getattr(p, name))
        if size is None or size > MAX_WINDOW:
            yield _must(p, name, f"an int up to {MAX_WINDOW}; negative is unbounded")
    if p.softmax_scale is not None and not _is_scale(p.softmax_scale):
        accepted = f"a number from {SMALLEST_SCALE:.8g} to {LARGEST_SCALE:.8g}"
        yield _must(p, "softmax_scale", f"None (1/sqrt(head_dim)) or {accepted}")
    if integer(p.num_splits) is None:
        yield _must(p, "num_splits", f"an int from 0 (automatic) to {MAX_SPLITS}")
    workspace_bytes = 0 if is_off(p.workspace_bytes) else integer(p.workspace_bytes)
    if workspace_bytes is None or workspace_bytes < 0:
        yield _must(p, "workspace_bytes", "an int of at least 0")
    elif is_given(p.workspace) != (workspace_bytes > 0):
        yield f"workspace={shown(p.workspace)}, workspace_bytes={workspace_bytes}: must be given together"


def _is_scale(value) -> bool:
    kind = type(value)
    if kind is bool or hasattr(kind, "__dlpack__") or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        return False
    try:
        return SMALLEST_SCALE <= float(value) <= LARGEST_SCALE
    except Exception:       # an int too large for a float, or a foreign class's __float__
        return False


def _descales(p):
    dtype = member(DataType, p.dtype)
    for name in DESCALES:
        if is_given(getattr(p, name)) and dtype not in (DataType.FP8_E4M3, None):
            yield _must(p, name, f"None with dtype={dtype.name}: descales belong to FP8_E4M3")


def _workspace(p):
    others = (row for row in CONTRACT_RULES if row[1] is not _workspace)
    if not is_given(p.workspace) or next(_walk(p, others), None) or not is_decode(p):
        return                  # what it must hold is known for a call that is right otherwise
    needed = plan_of(p).partial_bytes
    if p.workspace_bytes < needed:
        yield _must(p, "workspace_bytes", f"at least workspace_size(params)={needed}")


def _num_splits(p):
    splits = integer(p.num_splits)
    if splits is not None and not 0 <= splits <= MAX_SPLITS:
        yield _must(p, "num_splits", f"from 0 (automatic) to {MAX_SPLITS}")


def _off(*names: str, instead: str = ""):
    """The rule for fields that are part of the interface but of nothing that this library does."""
    def rule(p):
        for name in names:
            if is_given(getattr(p, name)):
                yield _must(p, name, f"None or 0: {name} is not supported{instead}")
    return rule


# Valid by the contract, no kernel yet: (field, when the call asks for the feature, the feature, accepted meanwhile).
# Each row leaves with the kernel that makes it true.
PENDING = (
    ("num_splits", lambda p: is_packed(p) and _at_least(p.num_splits, 2), "split-KV of packed sequences",
     "0 or 1 with cu_seqlens_q and cu_seqlens_k"),
    ("pack_gqa", lambda p: is_packed(p) and is_true(p.pack_gqa) is True, "packed heads of packed sequences",
     "None or False with cu_seqlens_q and cu_seqlens_k"),
)


def _pending(p):
    for name, asks, feature, accepted in PENDING:
        if asks(p):
            yield _must(p, name, f"{accepted}: {feature} not implemented yet")


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
    (Status.INVALID_ARGUMENT, _workspace),
    (Status.SOFTCAP_UNSUPPORTED, _off("softcap")),
    (Status.SPLIT_KV_UNSUPPORTED, _num_splits),
    (Status.PAGED_KV_UNSUPPORTED, _off("page_table", "page_size")),
    (Status.ROTARY_UNSUPPORTED, _off("rotary_cos", "rotary_sin", "rotary_dim",
                                     instead="; rotate q and k before the call")),
    (Status.FEATURE_UNSUPPORTED, _off("p_dropout", "rng_state", "attn_mask")),
    (Status.FEATURE_UNSUPPORTED, _off("leftpad_k", instead="; seqused_k gives the used length of each sequence")),
    (Status.FEATURE_UNSUPPORTED, _off("k_new", "v_new", "seqlen_knew", instead="; append to k and v before the call")),
)
RULES = (*CONTRACT_RULES, (Status.FEATURE_UNSUPPORTED, _pending))


# ---- asking ----------------------------------------------------------------------------------------------------------

def problems(params) -> list[Problem]:
    """Everything that `forward` would object to, in the order in which it would; [] if the call is good."""
    return list(_walk(params, RULES))


def contract_problems(params) -> list[Problem]:
    """`problems` without those that only say that a kernel is not implemented yet."""
    return list(_walk(params, CONTRACT_RULES))


def first_problem(params) -> Problem | None:
    """`problems(params)[0]`, None if the call is good; about 2 us for the common good call."""
    try:
        if is_common(params):
            return None
    except Exception:       # a value that cannot be computed with: the rules put it into words
        pass
    return next(_walk(params, RULES), None)


def _walk(params, rules):
    return (Problem(status, detail) for status, rule in rules for detail in rule(params))
