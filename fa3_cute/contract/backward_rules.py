"""BackwardParams -> what is wrong with it, in words. Pure Python: no GPU, no CUDA, no CuTe DSL.

The call that `backward` differentiates must be one that `forward` takes, so forward's rules hold for forward's fields;
the rules here are of what `backward` adds, and of what it does not serve yet: `REFUSED`, a reason for each field. A
refusal for the latter comes last, when all else about the call is good.
"""

from collections.abc import Iterator, Sequence
from math import prod
from operator import attrgetter

from .backward_params import (
    ARGUMENTS,
    INPUTS,
    LSES,
    NEW,
    OUTPUTS,
    SCORE_INPUTS,
    SCORE_OUTPUTS,
    BackwardParams,
    grad_dtype_of,
    plain_backward,
    sizes_of,
    strides_of,
)
from .formats import HEAD_DIMS
from .head_dims import are_served, columns_of, is_wide
from .limits import DIMS, MAX_SIZE, MAX_TILES, SMALLEST_TILE_M, TMA_ALIGNMENT, TMA_STRIDE_BYTES
from .params import DataType, has_packed_keys, is_packed
from .plain import BAD
from .rules import RULES as FORWARD_RULES
from .rules import Rule
from .scores import ELEMENT_BYTES as SCORE_BYTES
from .scores import MASK_STRIDES
from .sentences import Sentences, is_int, must
from .status import Problem, Status, shown
from .strides import overlap

# What has kernels.
SERVED_DTYPES = (DataType.FP16, DataType.BF16)
SERVED_GRAD_DTYPES: tuple[DataType, ...] = ()  # besides that of q, k and v

# LSE / softmax_scale, where scores start, is then finite in FP32 whatever the LSE.
SMALLEST_SCALE = 2.0**-96

_NO_GRADIENT = "backward has no kernel for it yet"
_NO_SPLITS = "it is of forward's split-KV"
# Fields that must be off, and why. A row goes when its kernel comes.
REFUSED = {
    **dict.fromkeys(
        ("score_mod", "mask_mod"),
        _NO_GRADIENT,
    ),
    "block_mask": _NO_GRADIENT,
    "q_v": _NO_GRADIENT,
    "accumulate_dkv": "backward overwrites dk and dv; add them up after the call",
    "page_table": "dk and dv are those of dense or packed keys, not of pages",
    "kv_batch_idx": "dk and dv are those of each sequence, not of entries of a cache",
    "leftpad_k": "give the rows that exist as packed keys, with cu_seqlens_k",
    "batch_size_k": "dk and dv are those of each sequence, not of entries of a cache",
    **dict.fromkeys(("k_new", "v_new"), "dk and dv are those of keys that are there before the call"),
    **dict.fromkeys(("rotary_cos", "rotary_sin"), "rotate q and k before the call, and turn dq and dk back after it"),
    "num_splits": f"{_NO_SPLITS}; deterministic=True gives the same bits in every call",
    "max_num_splits": _NO_SPLITS,
    "fixed_split_size": f"{_NO_SPLITS}; deterministic=True gives the same bits in every call",
    "pack_gqa": "it chooses a kernel of forward",
    "zero_padding": "gradients of rows that no sequence has stay as they are",
    "scheduler_metadata": "it is of forward's schedule",
    "sm_margin": "the kernels before and after the main one take every SM",
    "tile_counter": "what backward counts lies in its workspace",
}
_TENSORS = ("dout", *OUTPUTS)  # whose strides forward's rules do not know
STRIDES = {name: tuple(f"{name}_{dim}_stride" for dim in DIMS) for name in (*INPUTS, *OUTPUTS)}
_CONTIGUOUS = (None,) * len(DIMS)
_read_strides = {name: attrgetter(*STRIDES[name]) for name in STRIDES}
_ADDRESSES = (*INPUTS, *LSES, *OUTPUTS)
_OF_SCORES = (*SCORE_INPUTS, *SCORE_OUTPUTS)
_WRITTEN = (*OUTPUTS, *SCORE_OUTPUTS)
_read_addresses, _read_of_scores = attrgetter(*_ADDRESSES), attrgetter(*_OF_SCORES)
_read_mask_strides = attrgetter(*MASK_STRIDES)
_OF_KEYS = ("k", "v", "dk", "dv")
_GRADIENT_BYTES = {DataType.FP32: 4}  # else 2
_FLAGS = ("deterministic", "accumulate_dkv")

# ---- the rules -------------------------------------------------------------------------------------------------------


def _pointers_present(p) -> Sentences:
    has_rows = not (is_packed(p) and p.total_q == 0)
    found = [
        must(p, name, what)
        for name, what in (
            ("softmax_lse", "the device address of forward's LSE"),
            ("dout", "the device address of a tensor"),
        )
        if has_rows and not getattr(p, name)
    ]
    # Where there is no query or no key, gradients may be empty, and empty arrays have no address in most libraries.
    may_be_empty = is_packed(p) and 0 in (p.total_q, p.total_k)
    if not may_be_empty and not any(getattr(p, name) for name in OUTPUTS):
        stated = ", ".join(f"{name}={shown(getattr(getattr(p, 'raw', p), name))}" for name in OUTPUTS)
        found.append(f"{stated}: one of them must be the device address of a tensor")
    return found


def _key_tiles(p) -> Sentences:
    """The rule of how many tiles keys make, which backward walks as forward does those of queries."""
    packed = has_packed_keys(p)
    batch, heads, rows = p.batch_size, p.num_heads_k, p.total_k if packed else p.seqlen_k
    if not all(is_int(size, 1, MAX_SIZE) for size in (batch, heads, rows)):  # of these other rules speak
        return ()
    tiles = heads * (rows // SMALLEST_TILE_M + batch if packed else batch * -(-rows // SMALLEST_TILE_M))
    if tiles <= MAX_TILES:
        return ()
    stated = f"batch_size={batch}, num_heads_k={heads}, {'total_k' if packed else 'seqlen_k'}={rows}"
    return [f"{stated}: must make at most {MAX_TILES} tiles of {SMALLEST_TILE_M} keys, not {tiles}"]


def _strides(p) -> Sentences:
    """Given ones of an absent gradient too: a shape does not say which of them a call wants."""
    looked_at = [tensor for tensor in _TENSORS if getattr(p, tensor) or _read_strides[tensor](p) != _CONTIGUOUS]
    return [sentence for tensor in looked_at for sentence in _strides_of(p, tensor)]


def _strides_of(p, tensor: str) -> Sentences:
    values, sizes, columns = _read_strides[tensor](p), sizes_of(p, tensor), columns_of(p, tensor)
    given = dict(zip(STRIDES[tensor], values, strict=True))
    bad = [must(p, name, "None (contiguous) or an int, in elements") for name, stride in given.items() if stride is BAD]
    if bad or not are_served(p) or not all(is_int(size, 1, MAX_SIZE) for size in sizes):
        return bad  # an empty tensor has no strides, and those of an impossible one mean nothing
    if tensor == "dout" and 0 in (placed := strides_of(p, tensor)):
        name = list(given)[placed.index(0)]
        return [must(p, name, "not 0, as that of an expanded tensor is: copy it to a contiguous one before the call")]
    element_bytes = _element_bytes(p, tensor)
    if values == _CONTIGUOUS and sizes[1] * sizes[2] * columns * element_bytes < TMA_STRIDE_BYTES:
        return ()
    multiple, limit = TMA_ALIGNMENT // element_bytes, TMA_STRIDE_BYTES // element_bytes
    field = "head_dim_v" if tensor == "dv" and p.head_dim_v else "head_dim"
    least, why = (columns, f" ({field}: rows must not overlap)") if tensor in OUTPUTS else (1, "")
    dims = list(zip(given.items(), strides_of(p, tensor), sizes, strict=True))
    found = [
        f"{name}={'None (contiguous: ' + shown(stride) + ')' if raw is None else shown(raw)}: must be at least {least}"
        f"{why}, below {limit} and a multiple of {multiple} elements ({TMA_ALIGNMENT} bytes, for TMA)"
        for (name, raw), stride, size in dims
        if size > 1 and (not least <= stride < limit or stride % multiple)
    ]
    if tensor in OUTPUTS and not found and overlap([(stride, size) for _, stride, size in dims], columns):
        stated = ", ".join(f"{name}={shown(raw)}" for name, raw in given.items())
        return [f"{stated}: must keep the rows of {tensor} apart; with sizes {list(sizes)} some overlap"]
    return found


def _bias_strides(p) -> Sentences:
    """The rule of d_bias, which has the strides of attn_mask, of which forward's rule says what they may be."""
    keys, dims = p.seqlen_k, _dims_of_mask(p)
    if not p.d_bias or not dims or not is_int(keys, 1, MAX_SIZE):
        return ()
    moving = [(name, stride, size) for name, stride, size in dims if size > 1 and stride > 0]
    accepted = f"0 or at least {keys} (seqlen_k) with d_bias: rows of a gradient must not overlap"
    found = [must(p, name, accepted) for name, stride, _ in moving if stride < keys]
    if found or not overlap([(stride, size) for _, stride, size in moving], keys):
        return found
    stated = ", ".join(f"{name}={shown(getattr(getattr(p, 'raw', p), name))}" for name in MASK_STRIDES)
    return [f"{stated}: must keep the rows of d_bias apart; with sizes {[size for _, _, size in dims]} some overlap"]


def _dims_of_mask(p) -> list[tuple[str, int, int]]:
    """(field, stride, size) along batches, heads and rows of attn_mask; none where another rule has to speak."""
    sizes, given = (p.batch_size, p.num_heads, p.seqlen_q), _read_mask_strides(p)
    if is_packed(p) or BAD in given or not all(is_int(size, 1, MAX_SIZE) for size in (*sizes, p.seqlen_k)):
        return []
    contiguous = p.num_heads * p.seqlen_q * p.seqlen_k, p.seqlen_q * p.seqlen_k, p.seqlen_k
    strides = [default if stride is None else stride for stride, default in zip(given, contiguous, strict=True)]
    return list(zip(MASK_STRIDES, strides, sizes, strict=True))


def _element_bytes(p, tensor: str) -> int:
    return _GRADIENT_BYTES.get(grad_dtype_of(p), 2) if tensor in OUTPUTS else 2


def _alignment(p) -> Sentences:
    found = []
    for name in NEW:
        if ARGUMENTS[name].kind != "pointer":
            continue
        value, alignment = getattr(p, name) or 0, ARGUMENTS[name].alignment
        if value is BAD:
            accepted = "an int device address or have __int__; an array or buffer is passed by its address"
            found.append(must(p, name, accepted))
        elif value % alignment or not 0 <= value < 2**64:
            stated = f"{value:#x}" if abs(value) < 2**128 else shown(value)
            found.append(f"{name}={stated}: must be a device address aligned to {alignment} bytes")
    return found


def _choices(p) -> Sentences:
    found = [must(p, name, "True or False") for name in _FLAGS if getattr(p, name) is BAD]
    if p.grad_dtype not in (None, p.dtype, DataType.FP32) or p.grad_dtype is BAD:
        found.append(must(p, "grad_dtype", f"None, FP32 or dtype={shown(p.dtype)}"))
    return found


def _score_gradients(p) -> Sentences:
    """The rule of gradients that need what they are of."""
    is_added = bool(p.attn_mask) and p.attn_mask_dtype is not None
    needed = (
        ("d_s_aux", bool(p.s_aux), "s_aux, whose gradient it is"),
        ("d_bias", is_added, "an attn_mask that is added: one whose attn_mask_dtype is FP16, BF16 or FP32"),
    )
    return [
        must(p, name, f"None or 0 without {what}")
        for name, is_there, what in needed
        if not is_there and getattr(p, name) and getattr(p, name) is not BAD
    ]


def _not_served(p) -> Sentences:
    """The rule of what has no kernel; the rest of the call is good."""
    found = [must(p, name, f"off: {why}") for name, why in REFUSED.items() if getattr(p, name)]
    if p.deterministic and p.d_bias:
        sums = [name for name, stride, size in _dims_of_mask(p) if stride == 0 and size > 1]
        if sums:
            stated = " and ".join(f"{name}=0" for name in sums)
            found.append(must(p, "deterministic", f"False with d_bias and {stated}: it is a sum in any order"))
    if p.dtype is DataType.FP8_E4M3:
        found.append(must(p, "dtype", "DataType.FP16 or BF16: backward has no kernel for FP8"))
    if p.kv_dtype not in (None, p.dtype):
        found.append(must(p, "kv_dtype", "None or dtype: backward has no kernel for FP8"))
    if is_wide(p):
        large = [name for name in ("head_dim", "head_dim_v") if getattr(p, name) > HEAD_DIMS[-1]]
        stated = ", ".join(f"{name}={getattr(p, name)}" for name in large)
        found.append(f"{stated}: must be at most {HEAD_DIMS[-1]}: {_NO_GRADIENT}")
    if p.out_dtype not in (None, p.dtype, BAD):
        found.append(must(p, "out_dtype", "None: out is an input in dtype"))
    if p.grad_dtype is not None and p.grad_dtype not in (p.dtype, *SERVED_GRAD_DTYPES, BAD):
        found.append(must(p, "grad_dtype", "None: dq, dk and dv are of the dtype of q, k and v"))
    if is_packed(p) and not has_packed_keys(p):
        found.append(
            must(p, "cu_seqlens_k", "a device address with cu_seqlens_q: backward has no packed q with dense k")
        )
    return found


def _scale(p) -> Sentences:
    scale = p.softmax_scale
    if (
        scale is None or scale is BAD or not 0 < scale < SMALLEST_SCALE
    ):  # of what is no scale at all forward's rule speaks
        return ()
    return [must(p, "softmax_scale", f"None (1/sqrt(head_dim)) or at least {SMALLEST_SCALE:.8g} in backward")]


# ---- do tensors overlap ----------------------------------------------------------------------------------------------


def _apart(p) -> Sentences:
    """The rule of outputs, which must not lie where an input or another output does."""
    spans = _spans(p)
    outputs = [(name, spans[name]) for name in _WRITTEN if name in spans]
    met = [
        (output, other)
        for output, (start, stop) in outputs
        for other, (first, end) in spans.items()
        if first < stop and start < end and (other not in _WRITTEN or _WRITTEN.index(other) > _WRITTEN.index(output))
    ]
    return [
        f"{output}={spans[output][0]:#x}: must not overlap {other}={spans[other][0]:#x}"
        for output, other in met
        if not (output in STRIDES and other in STRIDES and _are_columns(p, output, other))
    ]


def _spans(p) -> dict[str, tuple[int, int]]:
    """{name: (address, end)} of all tensors with elements; none at all where another rule has to speak."""
    sizes_q, sizes_k = sizes_of(p, "q"), sizes_of(p, "k")
    addresses = _read_addresses(p)
    if BAD in addresses or not are_served(p) or not all(type(n) is int for n in sizes_q + sizes_k):
        return {}
    vectors_q, vectors_k = prod(sizes_q), prod(sizes_k)
    found = {}
    for name, address in zip(_ADDRESSES, addresses, strict=True):
        vectors = vectors_k if name in _OF_KEYS else vectors_q
        if not address or vectors <= 0:
            continue
        if name in LSES:
            size = vectors * 4
        elif _read_strides[name](p) == _CONTIGUOUS:
            size = vectors * columns_of(p, name) * _element_bytes(p, name)
        elif BAD in strides_of(p, name):
            return {}
        else:
            size = _reach(p, name)
        found[name] = address, address + size
    return found | _spans_of_scores(p)


def _spans_of_scores(p) -> dict[str, tuple[int, int]]:
    """The same of what scores are changed with, and of its gradients; of those whose size another rule objects to, none
    is looked at."""
    addresses, heads, slopes = _read_of_scores(p), p.num_heads, p.alibi_batch_stride
    if not any(addresses) or BAD in addresses:
        return {}
    dims = _dims_of_mask(p)
    scores = sum(stride * (size - 1) for _, stride, size in dims) + p.seqlen_k if dims else 0
    rows = slopes * (p.batch_size - 1) if type(slopes) is type(p.batch_size) is int else 0
    sizes = {
        "s_aux": heads * SCORE_BYTES.get(p.s_aux_dtype, 4),
        "alibi_slopes": (rows + heads) * 4,
        "attn_mask": scores * SCORE_BYTES.get(p.attn_mask_dtype, 1),
        "rng_state": 16,
        "d_s_aux": heads * 4,
        "d_bias": scores * 4,
    }
    given = zip(_OF_SCORES, addresses, strict=True)
    return {name: (address, address + sizes[name]) for name, address in given if address and sizes[name] > 0}


def _reach(p, tensor: str, pitch: int = 0) -> int:
    """Bytes from a tensor's address to behind its last element, modulo the pitch if there is one."""
    element_bytes = _element_bytes(p, tensor)
    steps = [
        stride * element_bytes * (size - 1)
        for stride, size in zip(strides_of(p, tensor), sizes_of(p, tensor), strict=True)
        if not pitch or stride * element_bytes % pitch
    ]
    return sum(steps) + columns_of(p, tensor) * element_bytes


def _are_columns(p, a: str, b: str) -> bool:
    """Whether two tensors are different columns of one buffer, as those of a packed dqkv are: modulo a stride that both
    have, they are apart. Others whose spans meet are held to overlap."""
    pitches = [{stride * _element_bytes(p, name) for stride in strides_of(p, name)} for name in (a, b)]
    offset = getattr(p, b) - getattr(p, a)
    return any(
        _reach(p, a, pitch) <= offset % pitch and offset % pitch + _reach(p, b, pitch) <= pitch
        for pitch in pitches[0] & pitches[1]
        if pitch > 0
    )


# ---- asking ----------------------------------------------------------------------------------------------------------

_OWN_RULES = (
    Rule(Status.NULL_POINTER, _pointers_present),
    Rule(Status.INVALID_SHAPE, _key_tiles),
    Rule(Status.INVALID_SHAPE, _strides),
    Rule(Status.INVALID_SHAPE, _bias_strides),
    Rule(Status.INVALID_ARGUMENT, _alignment),
    Rule(Status.INVALID_ARGUMENT, _choices, of_choices=True),
    Rule(Status.INVALID_ARGUMENT, _scale),
    Rule(Status.INVALID_ARGUMENT, _score_gradients),
    Rule(Status.INVALID_ARGUMENT, _apart),
    Rule(Status.FEATURE_UNSUPPORTED, _not_served),
)
# Forward's and these, in the order of the table.
RULES: Sequence[Rule] = sorted((*FORWARD_RULES, *_OWN_RULES), key=lambda rule: -rule.status)


def contract_problems(params: BackwardParams) -> list[Problem]:
    """All that the contract objects to; nothing about how large a workspace must be, which the plan knows."""
    return list(walk(plain_backward(params)))


def first_problem(p: BackwardParams) -> Problem | None:
    """The first of the problems of plain params (plain_backward); None if the call is good."""
    return next(walk(p), None)


def walk(p: BackwardParams) -> Iterator[Problem]:
    """The problems of plain params, in the order of the rules."""
    for status, objections, _, concerns in RULES:
        if concerns is None or concerns(p):
            for detail in objections(p):
                yield Problem(status, detail)
