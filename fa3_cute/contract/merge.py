"""MergeParams: one call of merge_attention as data, what is wrong with it, and what its kernel takes. Pure Python.

    m = max(lse_a, lse_b),   w_x = base^(lse_x - m)
    out = (w_a out_a + w_b out_b) / (w_a + w_b),   lse = m + log_base(w_a + w_b)

A rule takes plain params and returns a sentence for each thing that it objects to, as those of rules.py do.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from operator import attrgetter

from .arguments import entry_of
from .limits import DIMS, MAX_SIZE
from .params import Argument, DataType, address, integer, is_array, is_given, member
from .plain import BAD
from .sentences import Sentences, is_int, must
from .status import Problem, Status, shown
from .strides import overlap

MERGE = "merge"  # the kernel
ELEMENT_BYTES = {DataType.FP16: 2, DataType.BF16: 2, DataType.FP32: 4}  # of the partial results and of out
MAX_HEAD_DIM, HEAD_DIM_STEP = 512, 8
MAX_STRIDE = 2**40  # elements
VECTOR_BYTES = 16  # what a thread loads at a time: of addresses and strides
BASES = (math.e, 2.0)


def _field(default, kind: str, **facts):
    takers = () if kind == "choice" else (MERGE,)  # types are compile time
    return field(default=default, metadata={"argument": Argument(kind, takers=takers, **facts)})


def _tensor(element: str):
    return _field(None, "pointer", element=element, alignment=VECTOR_BYTES, changes=True)


def _lse():
    return _field(None, "pointer", element="float32", alignment=4, changes=True)


def _stride():
    return _field(None, "stride", varies=True)


@dataclass(slots=True, kw_only=True)
class MergeParams:
    """Arguments of `merge_attention`. Mutable; pointers, strides and what a field holds as in FlashAttentionParams.

    Packed rows are one batch entry: batch_size 1, seqlen_q the rows of all sequences.
    """

    # [batch, seqlen_q, num_heads, head_dim], 16-byte aligned, last dimension contiguous: results over disjoint keys.
    # out may be out_a or out_b.
    out_a: int | None = _tensor("input")
    lse_a: int | None = (
        _lse()
    )  # FP32 [batch, num_heads, seqlen_q]; -inf: the row saw no key, its out_a is not looked at
    out_b: int | None = _tensor("input")
    lse_b: int | None = _lse()
    out: int | None = _tensor("output")
    lse: int | None = _lse()  # output, optional; may be lse_a or lse_b

    batch_size: int = _field(1, "size", varies=True)
    seqlen_q: int | None = _field(None, "size", varies=True)  # 0: nothing is done
    num_heads: int = _field(0, "size")  # query heads
    head_dim: int = _field(0, "size")  # of out: a multiple of 8 up to 512

    out_a_batch_stride: int | None = _stride()
    out_a_row_stride: int | None = _stride()
    out_a_head_stride: int | None = _stride()
    out_b_batch_stride: int | None = _stride()
    out_b_row_stride: int | None = _stride()
    out_b_head_stride: int | None = _stride()
    out_batch_stride: int | None = _stride()
    out_row_stride: int | None = _stride()
    out_head_stride: int | None = _stride()
    lse_a_batch_stride: int | None = _stride()
    lse_a_row_stride: int | None = _stride()
    lse_a_head_stride: int | None = _stride()
    lse_b_batch_stride: int | None = _stride()
    lse_b_row_stride: int | None = _stride()
    lse_b_head_stride: int | None = _stride()
    lse_batch_stride: int | None = _stride()
    lse_row_stride: int | None = _stride()
    lse_head_stride: int | None = _stride()

    dtype: DataType = _field(DataType.FP16, "choice")  # of out_a and out_b: FP16, BF16 or FP32
    out_dtype: DataType | None = _field(None, "choice")  # of out, likewise; None: dtype
    lse_base: float = _field(math.e, "number", entry="log2_base")  # of all LSEs: math.e, as `forward` has them, or 2


ARGUMENTS: dict[str, Argument] = {item.name: item.metadata["argument"] for item in fields(MergeParams)}
MERGE_ENTRY = entry_of((MERGE,), (), (), ARGUMENTS)
POINTERS = tuple(name for name, argument in ARGUMENTS.items() if argument.kind == "pointer")
SHAPE = tuple(name for name in ARGUMENTS if name not in POINTERS)
OUTPUTS, LSES = ("out_a", "out_b", "out"), ("lse_a", "lse_b", "lse")
IN_PLACE = (("out", "out_a"), ("out", "out_b"), ("lse", "lse_a"), ("lse", "lse_b"))  # that may be the same memory
read_shape, read_pointers = attrgetter(*SHAPE), attrgetter(*POINTERS)


# ---- plain values ----------------------------------------------------------------------------------------------------


class PlainMerge(MergeParams):
    """A call whose values are plain; `raw` is the caller's."""

    __slots__ = ("raw",)
    raw: MergeParams


def plain_merge(params: MergeParams) -> PlainMerge:
    """The same call in plain values; where one means nothing, its field holds BAD."""
    copy = PlainMerge()
    copy.raw = params
    for name, argument in ARGUMENTS.items():
        setattr(copy, name, _plain(name, argument.kind, getattr(params, name)))
    return copy


def _plain(name: str, kind: str, value):
    if kind == "pointer":
        found = address(value) if is_given(value) else 0
    elif kind == "number":
        found = _base(value)
    elif value is None and (kind == "stride" or name == "out_dtype"):
        return None
    elif kind == "choice":
        found = member(DataType, value)
    else:
        found = integer(value)
    return BAD if found is None else found


def _base(value) -> float | None:
    """The one of BASES that a number is; None for anything else."""
    if type(value) is bool or is_array(type(value)):
        return None
    try:
        return next((base for base in BASES if value == base), None)
    except Exception:  # a foreign class may refuse to be compared
        return None


def out_dtype_of(p: PlainMerge) -> DataType:
    """The element type of out."""
    return p.dtype if p.out_dtype is None else p.out_dtype


def strides_of(p: PlainMerge, tensor: str) -> tuple[int, ...]:
    """(batch, row, head) of a tensor or an LSE of good sizes; the contiguous ones where they are None, or never used
    because the dimension has one entry."""
    given = [getattr(p, f"{tensor}_{dim}_stride") for dim in DIMS]
    return tuple(
        default if stride is None or size == 1 else stride
        for stride, default, size in zip(given, _contiguous(p, tensor), _sizes_of(p), strict=True)
    )


def _sizes_of(p) -> tuple[int, int, int]:
    return p.batch_size, p.seqlen_q, p.num_heads


def _contiguous(p, tensor: str) -> tuple[int, int, int]:
    _, rows, heads = _sizes_of(p)
    if tensor in LSES:
        return heads * rows, 1, rows
    return rows * heads * p.head_dim, heads * p.head_dim, p.head_dim


# ---- the rules -------------------------------------------------------------------------------------------------------


def _present(p) -> Sentences:
    if p.batch_size == 0 or p.seqlen_q == 0:
        return ()  # empty arrays have no address in most libraries
    return [
        must(p, name, "the device address of a tensor") for name in POINTERS if name != "lse" and not getattr(p, name)
    ]


def _head_dim(p) -> Sentences:
    if is_int(p.head_dim, HEAD_DIM_STEP, MAX_HEAD_DIM) and p.head_dim % HEAD_DIM_STEP == 0:
        return ()
    return [must(p, "head_dim", f"a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}")]


def _heads(p) -> Sentences:
    return () if is_int(p.num_heads, 1, MAX_SIZE) else [must(p, "num_heads", f"an int from 1 to {MAX_SIZE}")]


def _sizes(p) -> Sentences:
    found = [
        must(p, name, f"an int from 0 to {MAX_SIZE}")
        for name in ("batch_size", "seqlen_q")
        if not is_int(getattr(p, name), 0, MAX_SIZE)
    ]
    if found or not is_int(p.num_heads, 1, MAX_SIZE):
        return found
    if (rows := p.batch_size * p.seqlen_q * p.num_heads) <= MAX_SIZE:
        return ()
    stated = f"batch_size={p.batch_size}, seqlen_q={p.seqlen_q}, num_heads={p.num_heads}"
    return [f"{stated}: must make at most {MAX_SIZE} rows of all heads, not {rows}"]


def _strides(p) -> Sentences:
    return [sentence for tensor in OUTPUTS + LSES for sentence in _strides_of(p, tensor)]


def _strides_of(p, tensor: str) -> Sentences:
    given = {f"{tensor}_{dim}_stride": getattr(p, f"{tensor}_{dim}_stride") for dim in DIMS}
    bad = [must(p, name, "None (contiguous) or an int, in elements") for name, stride in given.items() if stride is BAD]
    if bad or _head_dim(p) or _heads(p) or _sizes(p) or not all(_sizes_of(p)):
        return bad  # an empty tensor has no strides, and those of an impossible one mean nothing
    extent = p.head_dim if tensor in OUTPUTS else 1  # of a row, in elements
    least = extent if tensor in ("out", "lse") else 0
    multiple = _multiple(p, tensor)
    said = f"from {least} to {MAX_STRIDE}" + (f", a multiple of {multiple} (16 bytes)" if multiple > 1 else "")
    found = [
        must(p, name, f"None (contiguous) or {said}, in elements")
        for (name, stride), size in zip(given.items(), _sizes_of(p), strict=True)
        if stride is not None and size > 1 and (not least <= stride <= MAX_STRIDE or stride % multiple)
    ]
    dims = list(zip(strides_of(p, tensor), _sizes_of(p), strict=True))
    if not found and tensor in ("out", "lse") and overlap(dims, extent):
        stated = ", ".join(f"{name}={shown(stride)}" for name, stride in given.items())
        return [f"{stated}: must keep the rows of {tensor} apart; with sizes {list(_sizes_of(p))} some overlap"]
    return found


def _multiple(p, tensor: str) -> int:
    """What strides are multiples of; 1 where the dtype is none, which another rule says."""
    if tensor in LSES:
        return 1
    return VECTOR_BYTES // ELEMENT_BYTES.get(out_dtype_of(p) if tensor == "out" else p.dtype, VECTOR_BYTES)


def _alignment(p) -> Sentences:
    found = []
    for name in POINTERS:
        value, alignment = getattr(p, name), ARGUMENTS[name].alignment
        if value is BAD:
            found.append(
                must(p, name, "an int device address or have __int__; an array or buffer is passed by its address")
            )
        elif value % alignment or not 0 <= value < 2**64:
            stated = f"{value:#x}" if abs(value) < 2**128 else shown(value)
            found.append(f"{name}={stated}: must be a device address aligned to {alignment} bytes")
    return found


def _choices(p) -> Sentences:
    accepted = "DataType.FP16, BF16 or FP32"
    found = [] if p.dtype in ELEMENT_BYTES else [must(p, "dtype", accepted)]
    if p.out_dtype is not None and p.out_dtype not in ELEMENT_BYTES:
        found.append(must(p, "out_dtype", f"None (dtype), {accepted}"))
    return found if p.lse_base is not BAD else [*found, must(p, "lse_base", "math.e or 2")]


def _in_place(p) -> Sentences:
    addresses = [getattr(p, name) for pair in IN_PLACE for name in pair]
    if _choices(p) or _strides(p) or not all(type(value) is int for value in (*_sizes_of(p), *addresses)):
        return ()
    return [
        f"{result}={getattr(p, result):#x}: is {source}, and must have the same strides"
        f"{' and element type' if result == 'out' else ''} then"
        for result, source in IN_PLACE
        if getattr(p, result) == getattr(p, source) != 0 and not fits_in_place(p, result, source)
    ]


def fits_in_place(p, result: str, source: str) -> bool:
    """Whether each element of a result of good params would take the place of the one that it is made of."""
    is_same_type = result == "lse" or out_dtype_of(p) is p.dtype
    return is_same_type and strides_of(p, result) == strides_of(p, source)


RULES = (
    (Status.NULL_POINTER, _present),
    (Status.UNSUPPORTED_HEAD_DIM, _head_dim),
    (Status.INVALID_HEADS, _heads),
    (Status.INVALID_SHAPE, _sizes),
    (Status.INVALID_SHAPE, _strides),
    (Status.INVALID_ARGUMENT, _alignment),
    (Status.INVALID_ARGUMENT, _choices),
    (Status.INVALID_ARGUMENT, _in_place),
)


def walk(p: PlainMerge) -> Iterator[Problem]:
    """The problems of plain params, in the order of the rules."""
    for status, objections in RULES:
        for detail in objections(p):
            yield Problem(status, detail)
