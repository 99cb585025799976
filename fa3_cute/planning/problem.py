"""ProblemShape: a valid call in plain values, without the addresses that change with every call.

Masks, lengths, strides and types mean here what kernels take: whoever chooses a kernel, plans splits or fills an
argument buffer reads this and no field of FlashAttentionParams. Pure Python.
"""

import math
from operator import attrgetter
from typing import NamedTuple

from ..contract.formats import ELEMENT_BYTES, FP8, UNBOUNDED_WINDOW
from ..contract.limits import DIMS
from ..contract.params import (
    ARGUMENTS,
    DTYPE_NAMES,
    NUMBERS,
    TENSORS,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    names,
    tensor_sizes,
)

LENGTHS = tuple(name for name in names(kind="pointer", element="int32") if ARGUMENTS[name].takers)
STRIDES = tuple(f"{tensor}_{dim}_stride" for tensor in TENSORS for dim in DIMS)
DESCALE_STRIDES = names(kind="stride", is_fp8=True)
_CONTIGUOUS = (None,) * len(STRIDES)
# Of these reaches; every other pair of them is a window.
_MASKS = {(UNBOUNDED_WINDOW, UNBOUNDED_WINDOW): "full", (UNBOUNDED_WINDOW, 0): "causal"}
_NO_STRIDES = (0,) * len(DESCALE_STRIDES)
_read_lengths, _read_strides, _read_descale_strides = (
    attrgetter(*fields) for fields in (LENGTHS, STRIDES, DESCALE_STRIDES)
)


class ProblemShape(NamedTuple):
    """What is the same for all calls of one shape.

    dtype, out_dtype    of Q, K and V; of O where they are FP8, else None: as configs call them
    mask                "full", "causal" or "local"
    is_packed           the sequences are packed: seqlen_q and seqlen_k are the rows of all, strides along batches 0
    window_left, window_right   how far a query sees from its diagonal, in tokens, at most UNBOUNDED_WINDOW; a causal
                        mask is (UNBOUNDED_WINDOW, 0)
    numbers             features, in the order of NUMBERS; 0 where they are off
    lengths             addresses on the device, 0 if absent, in the order of LENGTHS
    strides             in elements, in the order of STRIDES and then, of FP8, of DESCALE_STRIDES
    workspace, tile_counter   addresses of the caller's, 0 if there is none
    """

    dtype: str
    out_dtype: str | None
    head_dim: int
    mask: str
    is_packed: bool
    has_lse: bool
    is_decode_mode: bool
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    window_left: int
    window_right: int
    softmax_scale: float
    numbers: tuple[float, ...]
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    num_splits: int
    pack_gqa: bool | None
    workspace: int
    tile_counter: int

    @property
    def element_bytes(self) -> int:
        """Of an element of Q, K or V."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def has_lengths(self) -> bool:
        """Offsets or lengths of the sequences are on the device."""
        return any(self.lengths)

    def number(self, name: str) -> float:
        """One of `numbers`."""
        return self.numbers[NUMBERS.index(name)]

    @staticmethod
    def of(p: FlashAttentionParams) -> "ProblemShape":
        """Of plain params (contract/plain.py) that the rules accept."""
        dtype = DTYPE_NAMES[p.dtype]
        out_dtype = None if dtype != FP8 else DTYPE_NAMES[DataType.BF16 if p.out_dtype is None else p.out_dtype]
        is_packed = bool(p.cu_seqlens_q)
        left, right = p.window_size_left, p.window_size_right
        left = left if 0 <= left < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
        right = 0 if p.is_causal else right if 0 <= right < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
        mask = _MASKS.get((left, right), "local")
        strides = _strides_of(p)
        scale = p.softmax_scale
        return ProblemShape(
            dtype,
            out_dtype,
            p.head_dim,
            mask,
            is_packed,
            bool(p.softmax_lse),
            p.mode is AttentionMode.DECODE,
            p.batch_size,
            p.total_q if is_packed else p.seqlen_q,
            p.total_k if is_packed else p.seqlen_k,
            p.num_heads,
            p.num_heads_k,
            left,
            right,
            1.0 / math.sqrt(p.head_dim) if scale is None else scale,
            _numbers_of(p),
            tuple([address or 0 for address in _read_lengths(p)]),
            strides if out_dtype is None else strides + _descale_strides_of(p),
            p.num_splits,
            p.pack_gqa,
            p.workspace or 0,
            p.tile_counter or 0,
        )


def _numbers_of(p) -> tuple[float, ...]:
    return tuple([getattr(p, name) or 0.0 for name in NUMBERS])


def _strides_of(p) -> tuple[int, ...]:
    """The strides with defaults where they are None.

    The stride of a dimension of size 1 never addresses memory and array libraries put anything there, but TMA wants a
    multiple of 16 bytes: the kernel gets the contiguous one.
    """
    head_dim, (batches, rows_q, heads), (_, rows_k, heads_k) = p.head_dim, tensor_sizes(p, "q"), tensor_sizes(p, "k")
    row_q, row_k, is_packed = heads * head_dim, heads_k * head_dim, p.cu_seqlens_q
    q = (0 if is_packed else rows_q * row_q, row_q, head_dim)
    k = (0 if is_packed else rows_k * row_k, row_k, head_dim)
    contiguous, given = q + k + k + q, _read_strides(p)
    if given == _CONTIGUOUS:
        return contiguous
    sizes_q, sizes_k = (batches, rows_q, heads), (batches, rows_k, heads_k)
    return tuple(
        [
            default if stride is None or size == 1 else stride
            for stride, default, size in zip(given, contiguous, sizes_q + sizes_k + sizes_k + sizes_q, strict=True)
        ]
    )


def _descale_strides_of(p) -> tuple[int, ...]:
    """The strides with 0 along dimensions of size 1, where they mean nothing."""
    given = _read_descale_strides(p)
    if given == _NO_STRIDES:
        return given
    batch, heads, heads_k = p.batch_size, p.num_heads, p.num_heads_k
    return tuple(
        [
            0 if size == 1 else stride
            for stride, size in zip(given, (batch, heads, batch, heads_k, batch, heads_k), strict=True)
        ]
    )
