"""params -> the values of a kernel's arguments, and where they lie in its argument buffer. Pure Python.

A buffer holds first what changes with every call, then what changes with the shape. The addresses of lengths count
among the latter, for all layers of a model share them; those of descales among the former, for each layer has its own.
What a 16-bit kernel takes of descales, which it never reads, is one zero behind all that.
"""
import math
import struct
from functools import cache
from operator import attrgetter

from ..contract.formats import UNBOUNDED_WINDOW
from ..planning.config import DESCALES, DecodeConfig
from ..contract.params import address
from ..planning.splits import SplitPlan, plan

STRUCT_CODES = {"pointer": "Q", "int64": "q", "int32": "i", "float32": "f", "stream": "Q"}

TENSORS = ("q", "k", "v", "out", "softmax_lse")
STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in ("q", "k", "v", "out") for dim in ("batch", "row", "head"))
# What is read from params after TENSORS, in this order, which `resolve_forward` and `resolve_decode` know.
SHAPE = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", *STRIDES,
         "batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "window_size_left", "window_size_right",
         "softmax_scale", "head_dim", "total_q", "total_k", "is_causal", "pack_gqa", "num_splits")
NUM_SHAPE = len(SHAPE)
# FP8: what is read from params besides; the pointers belong to the tensors, the strides to the shape, behind the rest.
DESCALE_POINTERS = tuple(f"{name}_ptr" for name in DESCALES)
DESCALE_STRIDES = tuple(f"{name}_{dim}_stride" for name in DESCALES for dim in ("batch", "head"))
read_params = attrgetter(*TENSORS, *SHAPE)
read_descales = attrgetter(*DESCALE_POINTERS)
read_descale_strides = attrgetter(*DESCALE_STRIDES)
NO_STRIDES = (None,) * len(STRIDES)


class Layout:
    """The buffer of one kernel entry.

    per_call, per_shape   names of the arguments, in the order of their values in the buffer
    absent                names of the arguments that are always 0; they share one place
    offsets               bytes from its start of each argument of the entry, in the entry's order, and last of the
                          cudaError_t that a launch writes
    """

    def __init__(self, arguments: tuple[tuple[str, str], ...], scratch: tuple[str, ...], has_descales: bool):
        codes = {name: STRUCT_CODES[kind] for name, kind in arguments}
        self.per_call = (*TENSORS, *(DESCALES if has_descales else ()), *scratch, "stream")
        self.absent = () if has_descales else (*DESCALES, *DESCALE_STRIDES)
        self.per_shape = tuple(name for name in codes if name not in self.per_call + self.absent)
        self.per_call_struct, self.per_shape_struct = (
            struct.Struct("".join(codes[name] for name in names)) for names in (self.per_call, self.per_shape))
        self.per_shape_offset = self.per_call_struct.size
        self.zero_offset = self.per_shape_offset + -(-self.per_shape_struct.size // 8) * 8
        self.error_offset = self.zero_offset + 8
        places = dict.fromkeys(self.absent, self.zero_offset)
        for names, start in ((self.per_call, 0), (self.per_shape, self.per_shape_offset)):
            before = ""
            for name in names:
                before += codes[name]
                places[name] = start + struct.calcsize(before) - struct.calcsize(codes[name])
        self.offsets = [*(places[name] for name in codes), self.error_offset]


@cache
def layout_of(kind: type, has_descales: bool) -> Layout:
    """The buffer of a config's kernel, by the config's type and whether it is FP8."""
    scratch = ("partials", "arrivals") if kind is DecodeConfig else ("tile_counter",)
    return Layout(kind.arguments, scratch, has_descales)


def resolve_forward(num_sms: int, *shape) -> tuple:
    """The values of per_shape of the forward kernel, in order: those of params (SHAPE; FP8: and DESCALE_STRIDES), with
    defaults for None.

    Packed tensors have one batch, and 0 for its stride.
    """
    lengths = tuple(map(address, shape[:4]))
    left, right, scale = shape[21:24]
    rows = shape[25:27] if lengths[0] else shape[17:19]
    # NumPy's integers would overflow in their own width.
    batch, rows_q, rows_k, heads, heads_k, head_dim = map(int, (shape[16], *rows, *shape[19:21], shape[24]))
    batches = 1 if lengths[0] else batch
    strides = resolve_strides(shape[4:16], (batches, rows_q, rows_k), (heads, heads_k, head_dim), bool(lengths[0]))
    descale_strides = shape[NUM_SHAPE:] and resolve_descale_strides(shape[NUM_SHAPE:], batch, heads, heads_k)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return (*lengths, *strides, *descale_strides, batch, rows_q, rows_k, heads, heads_k, _reach(left), _reach(right),
            num_sms, scale)


def resolve_decode(cfg: DecodeConfig, *shape) -> tuple[tuple, SplitPlan]:
    """The values of per_shape of the decode kernel, in order, and the plan that they follow."""
    batch, rows_q, rows_k, heads, heads_k = map(int, shape[16:21])
    left, right, scale = shape[21:24]
    head_dim, is_causal, pack_gqa, num_splits = int(shape[24]), *shape[27:29], int(shape[29])
    left, right = (UNBOUNDED_WINDOW, 0) if is_causal else (_reach(left), _reach(right))
    strides = resolve_strides(shape[4:16], (batch, rows_q, rows_k), (heads, heads_k, head_dim))
    descale_strides = shape[NUM_SHAPE:] and resolve_descale_strides(shape[NUM_SHAPE:], batch, heads, heads_k)
    chosen = plan(cfg, batch, rows_q, rows_k, heads, heads_k, left + right + 1, (pack_gqa, num_splits))
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return (*map(address, shape[2:4]), *strides, *descale_strides, batch, rows_q, rows_k, heads, heads_k, left, right,
            chosen.packed_heads, chosen.num_splits, chosen.cluster_size, chosen.smem_bytes, scale), chosen


def resolve_strides(strides, rows: tuple[int, int, int], heads: tuple[int, int, int], is_packed=False):
    """The strides with defaults where they are None.

    rows    (batches, rows of q, rows of k)
    heads   (num_heads, num_heads_k, head_dim)

    The stride of a dimension of size 1 never addresses memory and array libraries put anything there, but TMA wants a
    multiple of 16 bytes: the kernel gets the contiguous one.
    """
    (batches, rows_q, rows_k), (heads, heads_k, head_dim) = rows, heads
    row_q, row_k = heads * head_dim, heads_k * head_dim
    q = (0 if is_packed else rows_q * row_q, row_q, head_dim)
    k = (0 if is_packed else rows_k * row_k, row_k, head_dim)
    contiguous = q + k + k + q
    if strides == NO_STRIDES:
        return contiguous
    sizes_q, sizes_k = (batches, rows_q, heads), (batches, rows_k, heads_k)
    sizes = sizes_q + sizes_k + sizes_k + sizes_q
    return [default if stride is None or size == 1 else stride
            for stride, default, size in zip(strides, contiguous, sizes, strict=True)]


def resolve_descale_strides(strides, batch: int, heads: int, heads_k: int) -> list[int]:
    """The strides with 0 along dimensions of size 1, where they mean nothing."""
    sizes = (batch, heads, batch, heads_k, batch, heads_k)
    return [0 if size == 1 else int(stride or 0) for stride, size in zip(strides, sizes, strict=True)]


def _reach(window_size: int) -> int:
    return int(window_size) if 0 <= window_size < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
