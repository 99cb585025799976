"""The rules of strides: what TMA takes, and that the rows of out lie apart. Pure Python.

A row is head_dim contiguous elements, of v and out head_dim_v. Three strides, along batch, row and head, place the
rows of a tensor.
"""

from math import prod
from operator import attrgetter

from .formats import SERVED_DIMS
from .fp8_cache import keys_dtype
from .head_dims import QV_STRIDES, are_served, columns_of, has_qv_dims, value_dim
from .limits import DIMS, MAX_ROWS, MAX_SIZE, TMA_ALIGNMENT, TMA_STRIDE_BYTES
from .params import OFF, TENSORS, DataType, all_sizes, is_packed, names, tensor_sizes
from .plain import BAD
from .sentences import Sentences, is_int, must
from .status import shown

STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in TENSORS for dim in DIMS)
DESCALE_STRIDES = names(kind="stride", is_fp8=True)
_CONTIGUOUS, _CONTIGUOUS_OUT = (None,) * len(STRIDES), (None,) * len(DIMS)
_OF_DESCALES = {
    f"{tensor}_descale_{dim}_stride": f"{tensor}_descale_ptr" for tensor in "qkv" for dim in ("batch", "head")
}
_COMMON_DESCALES = (0,) * len(DESCALE_STRIDES)
_read_strides, _read_descale_strides = attrgetter(*STRIDES), attrgetter(*DESCALE_STRIDES)
_read_qv_strides = attrgetter(*QV_STRIDES)


def strides(p) -> Sentences:
    """The rule of the strides of q, k, v, out and q_v."""
    if _are_common(p, _read_strides(p)):
        return ()
    tensors = (*TENSORS, "q_v") if has_qv_dims(p) else TENSORS
    return [sentence for tensor in tensors for sentence in _strides_of(p, tensor)]


def has_descale_strides(p) -> bool:
    """The descales of a tensor are not one for all."""
    return _read_descale_strides(p) != _COMMON_DESCALES


def descale_strides(p) -> Sentences:
    """The rule of the strides of descales."""
    found = []
    for tensor, heads in zip("qkv", (p.num_heads, p.num_heads_k, p.num_heads_k), strict=True):
        for name, size in ((f"{tensor}_descale_batch_stride", p.batch_size), (f"{tensor}_descale_head_stride", heads)):
            stride = getattr(p, name)
            # As with the tensors' strides, that of a dimension of size 1 means nothing.
            if type(stride) is not int or size != 1 and not 0 <= stride <= MAX_SIZE:
                found.append(
                    must(p, name, f"an int from 0 to {MAX_SIZE}, in elements; 0: one descale for all along it")
                )
    return found


def lone_descale_strides(p) -> Sentences:
    """The rule of the strides of descales that are not there."""
    return lone(p, _OF_DESCALES)


def lone(p, fields: dict[str, str]) -> Sentences:
    """A sentence for each of the strides {field: its pointer} that is given without its pointer."""
    return [
        must(p, name, f"None or 0 without {pointer}")
        for name, pointer in fields.items()
        if not getattr(p, pointer) and (stride := getattr(p, name)) not in OFF and stride is not BAD
    ]


def qv_strides(p) -> tuple[int, ...]:
    """The strides of q_v of good plain params, contiguous ones where they are None or mean nothing; () without it."""
    if not p.q_v:
        return ()
    batch, rows, heads = tensor_sizes(p, "q_v")
    columns = value_dim(p)
    contiguous = 0 if is_packed(p) else rows * heads * columns, heads * columns, columns
    return tuple(
        [
            default if stride is None or size == 1 else stride
            for stride, default, size in zip(_read_qv_strides(p), contiguous, (batch, rows, heads), strict=True)
        ]
    )


def _are_common(p, given: tuple) -> bool:
    """At a glance: TMA takes all of these strides and the rows of out are nested. False says nothing."""
    heads, heads_k, dim_v = p.num_heads, p.num_heads_k, value_dim(p)
    batch, rows_q, _, rows_k = all_sizes(p)
    if not (
        p.head_dim in SERVED_DIMS
        and dim_v in SERVED_DIMS
        and type(batch) is type(rows_q) is type(rows_k) is type(heads) is type(heads_k) is int
        and 0 <= rows_q * heads * max(p.head_dim, dim_v) < TMA_STRIDE_BYTES // 2
        and 0 <= rows_k * heads_k * max(p.head_dim, dim_v) < TMA_STRIDE_BYTES // 2
    ):
        return False
    if given == _CONTIGUOUS:
        return True
    bits = 0
    for stride in given:
        if stride is not None:
            if type(stride) is not int:
                return False
            bits |= stride
    if bits & TMA_ALIGNMENT - 1 or not 0 <= bits < TMA_STRIDE_BYTES // 2:
        return False
    of_out = given[-len(DIMS) :]
    if of_out == _CONTIGUOUS_OUT:
        return True
    contiguous = rows_q * heads * dim_v, heads * dim_v, dim_v
    placed = zip(of_out, contiguous, (batch, rows_q, heads), strict=True)
    return _are_nested([(default if stride is None else stride, size) for stride, default, size in placed], dim_v)


def _strides_of(p, tensor: str) -> Sentences:
    fields = [f"{tensor}_{dim}_stride" for dim in DIMS]
    given = [getattr(p, name) for name in fields]
    if BAD in given:
        return [
            must(p, name, "None (contiguous) or an int, in elements")
            for name, stride in zip(fields, given, strict=True)
            if stride is BAD
        ]
    sizes, head_dim = tensor_sizes(p, tensor), columns_of(p, tensor)
    if not are_served(p) or not all(is_int(size, 1, MAX_SIZE) for size in sizes):
        return ()  # an empty tensor has no strides, and those of an impossible one mean nothing
    _, rows, heads = sizes
    contiguous = (rows * heads * head_dim, heads * head_dim, head_dim)
    # Along a dimension of size 1 nothing ever moves: its stride means nothing, and frameworks leave any number there.
    moving = [
        (f"{name}=None (contiguous: {shown(default)})", default, size)
        if stride is None
        else (f"{name}={shown(stride)}", stride, size)
        for name, stride, default, size in zip(fields, given, contiguous, sizes, strict=True)
        if size > 1
    ]
    dtype = keys_dtype(p) if tensor in ("k", "v") else p.dtype
    element_bytes = 1 if tensor != "out" and dtype is DataType.FP8_E4M3 else 2
    if tensor == "out" and p.out_dtype is DataType.FP32:
        element_bytes = 4
    multiple, limit = TMA_ALIGNMENT // element_bytes, TMA_STRIDE_BYTES // element_bytes
    least, why = (head_dim, f" ({_dim_of_out(p)}: rows must not overlap)") if tensor == "out" else (0, "")
    found = [
        f"{stated}: must be at least {least}{why}, below {limit} and a multiple of {multiple} elements "
        f"({TMA_ALIGNMENT} bytes, for TMA)"
        for stated, stride, _ in moving
        if not least <= stride < limit or stride % multiple
    ]
    if tensor == "out" and not found and overlap([dim[1:] for dim in moving], head_dim):
        stated = ", ".join(dim[0] for dim in moving)
        return [f"{stated}: must keep the rows of out apart; with sizes {[dim[2] for dim in moving]} some overlap"]
    return found


def _dim_of_out(p) -> str:
    """The field that says how many columns out has."""
    return "head_dim_v" if p.head_dim_v else "head_dim"


# ---- do rows overlap -------------------------------------------------------------------------------------------------


def overlap(dims: list[tuple[int, int]], head_dim: int) -> bool:
    """Whether two rows of a tensor share an element. Exact.

    dims   (stride, size) along each dimension; strides are positive

    Two rows overlap iff the steps between them, fewer than the size along each dimension, sum up to less than head_dim
    elements. The smallest dimension's steps are tried in turn, at most 5,160 of them; the other two's are counted.
    """
    dims = sorted((dim for dim in dims if dim[1] > 1), key=lambda dim: dim[1])
    if _are_nested(dims, head_dim) or prod(size for _, size in dims) > MAX_ROWS:  # of too many rows others speak
        return False
    (stride, size), first, second = ((1, 1),) * (3 - len(dims)) + tuple(dims)
    return any(_meet(first, second, steps * stride, head_dim) for steps in range(size))


def _are_nested(dims: list[tuple[int, int]], head_dim: int) -> bool:
    """Each stride is beyond all that the smaller ones reach, so that no rows overlap."""
    reach = head_dim
    for stride, size in sorted(dims):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


def _meet(first: tuple[int, int], second: tuple[int, int], offset: int, head_dim: int) -> bool:
    """Whether steps of two dimensions, (stride, size) each, come within head_dim of -offset; offset is not negative.

    Of offset 0 not without a step: then one of the second, as strides are at least head_dim, and it may go forward.
    """
    (stride, size), (stride_2, size_2) = first, second
    reach = stride * (size - 1) + head_dim - 1
    low = max(1 - size_2 if offset else 1, -((reach + offset) // stride_2))
    high = min(size_2 - 1, (reach - offset) // stride_2)
    if high < low:
        return False
    # Places of the second's steps, of which one must be within head_dim of a multiple of the first's stride: as many
    # are as these sums of quotients differ by, unless multiples are so dense that each one is.
    count, start = high - low + 1, low * stride_2 + offset
    quotients, less = (_sum_of_quotients(count, stride_2, start + n, stride) for n in (head_dim - 1, -head_dim))
    return stride < 2 * head_dim or quotients > less


def _sum_of_quotients(count: int, step: int, start: int, divisor: int) -> int:
    """The sum of (start + i * step) // divisor for i in range(count), by Euclid's algorithm."""
    total = 0
    while count:
        total += count * (count - 1) // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        count, start = divmod(step * count + start, divisor)
        divisor, step = step, divisor
    return total
