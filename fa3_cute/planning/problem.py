"""ProblemShape: a valid call in plain values, without the addresses that change with every call.

Masks, lengths, strides and types mean here what kernels take: whoever chooses a kernel, plans splits or fills an
argument buffer reads this and no field of FlashAttentionParams. Pure Python.
"""

import math
from operator import attrgetter
from typing import NamedTuple

from ..contract.formats import ELEMENT_BYTES, FP8, UNBOUNDED_WINDOW
from ..contract.params import (
    ARGUMENTS,
    DTYPE_NAMES,
    NUMBERS,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    is_packed,
    names,
)
from ..contract.strides import DESCALE_STRIDES, STRIDES

LENGTHS = tuple(name for name in names(kind="pointer", element="int32") if ARGUMENTS[name].takers)
_CONTIGUOUS = (None,) * len(STRIDES)
# Of these reaches; every other pair of them is a window.
_MASKS = {(UNBOUNDED_WINDOW, UNBOUNDED_WINDOW): "full", (UNBOUNDED_WINDOW, 0): "causal"}
_NO_STRIDES = (0,) * len(DESCALE_STRIDES)
_ABSENT, _NO_LENGTHS = (None,) * len(LENGTHS), (0,) * len(LENGTHS)
_read_lengths, _read_strides, _read_descale_strides = (
    attrgetter(*fields) for fields in (LENGTHS, STRIDES, DESCALE_STRIDES)
)


# The first fields of a ProblemShape.
Chosen = tuple[str, str | None, int, str, bool, int, int, int, int, int, bool | None, tuple[float, ...]]


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
    is_decode_mode: bool
    num_heads: int
    num_heads_k: int
    window_left: int
    window_right: int
    num_splits: int
    pack_gqa: bool | None
    numbers: tuple[float, ...]
    is_packed: bool
    has_lse: bool
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    softmax_scale: float
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
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
    def of(p: FlashAttentionParams, chosen: Chosen | None = None) -> "ProblemShape":
        """Of plain params (contract/plain.py) that the rules accept; chosen is `chosen_by` them, if that is known."""
        chosen = chosen or chosen_by(p)
        packed, lengths, scale = is_packed(p), _read_lengths(p), p.softmax_scale
        batch, rows_q, rows_k = p.batch_size, p.seqlen_q, p.seqlen_k
        if packed:
            rows_q, rows_k = p.total_q, p.total_k
        strides = _strides_of(p, 0 if packed else batch, rows_q, rows_k)
        return ProblemShape._make(
            chosen
            + (
                packed,
                bool(p.softmax_lse),
                batch,
                rows_q,
                rows_k,
                1.0 / math.sqrt(p.head_dim) if scale is None else scale,
                _NO_LENGTHS if lengths == _ABSENT else tuple([address or 0 for address in lengths]),
                strides if p.dtype is not DataType.FP8_E4M3 else strides + _descale_strides_of(p),
                p.workspace or 0,
                p.tile_counter or 0,
            )
        )


def chosen_by(p: FlashAttentionParams) -> Chosen:
    """The fields of a ProblemShape, its first ones, that follow from choices (params.CHOICES) alone."""
    dtype = DTYPE_NAMES[p.dtype]
    out_dtype = None if dtype != FP8 else DTYPE_NAMES[DataType.BF16 if p.out_dtype is None else p.out_dtype]
    left, right = p.window_size_left, p.window_size_right
    left = left if 0 <= left < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
    right = 0 if p.is_causal else right if 0 <= right < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
    return (
        dtype,
        out_dtype,
        p.head_dim,
        _MASKS.get((left, right), "local"),
        p.mode is AttentionMode.DECODE,
        p.num_heads,
        p.num_heads_k,
        left,
        right,
        p.num_splits,
        p.pack_gqa,
        tuple([getattr(p, name) or 0.0 for name in NUMBERS]),
    )


def _strides_of(p, batch: int, rows_q: int, rows_k: int) -> tuple[int, ...]:
    """The strides with defaults where they are None; batch is 0 for packed tensors, which have one.

    The stride of a dimension of size 1 never addresses memory and array libraries put anything there, but TMA wants a
    multiple of 16 bytes: the kernel gets the contiguous one.
    """
    head_dim, heads, heads_k, given = p.head_dim, p.num_heads, p.num_heads_k, _read_strides(p)
    row_q, row_k = heads * head_dim, heads_k * head_dim
    q = (rows_q * row_q if batch else 0, row_q, head_dim)
    k = (rows_k * row_k if batch else 0, row_k, head_dim)
    contiguous = q + k + k + q
    if given == _CONTIGUOUS:
        return contiguous
    sizes_q, sizes_k = (batch or 1, rows_q, heads), (batch or 1, rows_k, heads_k)
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
