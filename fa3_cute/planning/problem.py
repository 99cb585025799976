"""ProblemShape: a valid call in plain values, without the addresses that change with every call.

Masks, lengths, strides and types mean here what kernels take: whoever chooses a kernel, plans splits or fills an
argument buffer reads this and no field of FlashAttentionParams. Pure Python.
"""

import math
from collections import namedtuple
from operator import attrgetter
from typing import NamedTuple

from ..contract.arguments import BLOCK_ARGUMENTS, MOD_ARGUMENTS
from ..contract.block_mask import LISTS, block_sizes
from ..contract.formats import ELEMENT_BYTES, FP8, UNBOUNDED_WINDOW, tile_dims
from ..contract.fp8_cache import has_fp8_keys, keys_dtype
from ..contract.head_dims import is_wide, value_dim
from ..contract.params import (
    ARGUMENTS,
    DTYPE_NAMES,
    NUMBERS,
    OPTIONALS,
    AttentionMode,
    DataType,
    FlashAttentionParams,
    all_sizes,
    has_packed_keys,
    is_packed,
    is_paged,
    names,
)
from ..contract.mod_rules import arrays_of
from ..contract.mods import MAX_POINTERS, MAX_SCALARS, STRIDES_PER_POINTER, SIZES
from ..contract.scores import MASK_STRIDES
from ..contract.strides import DESCALE_STRIDES, STRIDES, qv_strides
from .append import AppendShape, append_shape

LENGTHS = tuple(name for name in names(kind="pointer", element="int32") if ARGUMENTS[name].takers)
_CONTIGUOUS = (None,) * len(STRIDES)
# Of these reaches; every other pair of them is a window.
_MASKS = {(UNBOUNDED_WINDOW, UNBOUNDED_WINDOW): "full", (UNBOUNDED_WINDOW, 0): "causal"}
_NO_STRIDES = (0,) * len(DESCALE_STRIDES)
_ABSENT, _NO_LENGTHS = (None,) * len(LENGTHS), (0,) * len(LENGTHS)
_NO_SCORE_STRIDES = (0,) * 4  # of slopes and masks
_read_lengths, _read_strides, _read_descale_strides, _read_mask_strides, _read_optionals = (
    attrgetter(*fields) for fields in (LENGTHS, STRIDES, DESCALE_STRIDES, MASK_STRIDES, OPTIONALS)
)


ModSizes = namedtuple("ModSizes", SIZES)  # of a call, by which mods declare extents
# The first fields of a ProblemShape.
Chosen = tuple[
    str,
    str | None,
    str | None,
    int,
    int,
    str,
    bool,
    int,
    int,
    int,
    int,
    int,
    int,
    int,
    int,
    bool,
    int,
    bool | None,
    tuple[float, ...],
    str,
    int,
    str,
    str,
]


class ProblemShape(NamedTuple):
    """What is the same for all calls of one shape.

    dtype, out_dtype, kv_dtype   of Q, K and V; of O, and of K and V, None where they are the same: as configs call them
    head_dim, head_dim_v   columns of q and k, and of v and out
    mask                "full", "causal" or "local"
    is_packed           the queries are packed: seqlen_q is the rows of all, strides along batches 0
    has_packed_keys     the same of the keys and seqlen_k, which is else the rows or the capacity of each sequence
    page_size, num_pages   0 without pages
    batch_size_k        entries of k and v, or rows of the page table
    max_seqlen_q        queries of a packed sequence, at most; 0 is unknown
    window_left, window_right   how far a query sees from its diagonal, in tokens, at most UNBOUNDED_WINDOW; a causal
                        mask is (UNBOUNDED_WINDOW, 0)
    attention_chunk     keys of a chunk; 0 without chunks
    mask_dtype, sink_dtype   of attn_mask: "bool" or as configs call them; of s_aux a number of DataType. They mean
                        nothing without: see attn_mask
    score_mod, mask_mod   ids of mods, "" without
    mod_values          of mods and block lists, in the order of MOD_ARGUMENTS, BLOCK_ARGUMENTS; () without mods
    optionals           pointers of OPTIONALS that are given
    numbers             features, in the order of NUMBERS; 0 where they are off
    lengths             addresses on the device, 0 if absent, in the order of LENGTHS
    strides             in elements, in the order of STRIDES, then of the page table, of FP8 those of DESCALE_STRIDES,
                        of the slopes, of MASK_STRIDES; 0 without. Of q_v those of QV_STRIDES, only with it
    workspace, tile_counter   addresses of the caller's, 0 if there is none
    append              what is done ahead of attention; None: nothing
    """

    dtype: str
    out_dtype: str | None
    kv_dtype: str | None
    head_dim: int
    head_dim_v: int
    mask: str
    is_decode_mode: bool
    num_heads: int
    num_heads_k: int
    window_left: int
    window_right: int
    attention_chunk: int
    num_splits: int
    max_num_splits: int
    fixed_split_size: int
    zero_padding: bool
    sm_margin: int
    pack_gqa: bool | None
    numbers: tuple[float, ...]
    mask_dtype: str
    sink_dtype: int
    score_mod: str
    mask_mod: str
    is_packed: bool
    has_packed_keys: bool
    has_lse: bool
    optionals: tuple[str, ...]
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    page_size: int
    num_pages: int
    batch_size_k: int
    max_seqlen_q: int
    softmax_scale: float
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    workspace: int
    tile_counter: int
    mod_values: tuple[float, ...]
    append: AppendShape | None = None

    @property
    def element_bytes(self) -> int:
        """Of an element of Q, K or V in the GEMMs."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def has_fp8_keys(self) -> bool:
        """K and V are FP8, and have descales."""
        return FP8 in (self.dtype, self.kv_dtype)

    @property
    def tile_dims(self) -> tuple[int, int]:
        """Columns of the kernels' tiles of Q and K, and of V and O."""
        return tile_dims(self.element_bytes, self.head_dim, self.head_dim_v)

    @property
    def has_wide_values(self) -> bool:
        """O takes two warpgroups: a kernel of its own."""
        return is_wide(self)

    @property
    def is_padded(self) -> bool:
        """Tiles have columns that the tensors have not."""
        return self.tile_dims != (self.head_dim, self.head_dim_v)

    def length(self, name: str) -> int:
        """One of `lengths`."""
        return self.lengths[LENGTHS.index(name)]

    @property
    def is_paged(self) -> bool:
        """K and V lie in pages."""
        return self.page_size > 0

    @property
    def has_lengths(self) -> bool:
        """Offsets or lengths of the sequences are on the device."""
        return any(self.lengths)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes and the window, as entries take them."""
        return (
            self.batch_size,
            self.seqlen_q,
            self.seqlen_k,
            self.num_heads,
            self.num_heads_k,
            self.head_dim,
            self.head_dim_v,
            self.page_size,
            self.num_pages,
            self.batch_size_k,
            self.sink_dtype if "s_aux" in self.optionals else 0,
            self.window_left,
            self.window_right,
            self.attention_chunk,
        )

    @property
    def has_block_lists(self) -> bool:
        """Lists say which K/V tiles are visited."""
        return bool(self.mod_values) and self.mod_values[len(MOD_ARGUMENTS)] != 0

    @property
    def has_alibi(self) -> bool:
        """There are ALiBi slopes."""
        return "alibi_slopes" in self.optionals

    @property
    def attn_mask(self) -> str:
        """What attn_mask holds: "bool", "fp16", "bf16" or "fp32"; "" without."""
        return self.mask_dtype if "attn_mask" in self.optionals else ""

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale and the numbers of features, as entries take them."""
        return self.softmax_scale, *self.numbers

    def number(self, name: str) -> float:
        """One of `numbers`."""
        return self.numbers[NUMBERS.index(name)]

    @staticmethod
    def of(p: FlashAttentionParams, chosen: Chosen | None = None) -> "ProblemShape":
        """Of plain params (contract/plain.py) that the rules accept; chosen is `chosen_by` them, if that is known."""
        chosen = chosen or chosen_by(p)
        lengths, scale = _read_lengths(p), p.softmax_scale
        packed, packed_keys, paged = is_packed(p), has_packed_keys(p), is_paged(p)
        strides = _strides_of(p, packed, packed_keys)
        if has_fp8_keys(p):
            strides += _descale_strides_of(p)
        given = _read_optionals(p)
        optionals = tuple([name for name, value in zip(OPTIONALS, given, strict=True) if value]) if any(given) else ()
        more_strides = (_score_strides_of(p, optionals) if optionals else _NO_SCORE_STRIDES) + qv_strides(p)
        shape = ProblemShape._make(
            chosen
            + (
                packed,
                packed_keys,
                bool(p.softmax_lse),
                optionals,
                p.batch_size,
                p.total_q if packed else p.seqlen_q,
                p.total_k if packed_keys else p.seqlen_k,
                p.page_size if paged else 0,
                p.num_pages if paged else 0,
                p.batch_size_k or p.batch_size,
                p.max_seqlen_q if packed else 0,
                1.0 / math.sqrt(p.head_dim + (value_dim(p) if p.q_v else 0)) if scale is None else scale,
                _NO_LENGTHS if lengths == _ABSENT else tuple([address or 0 for address in lengths]),
                strides + more_strides,
                p.workspace or 0,
                p.tile_counter or 0,
                _mod_values_of(p) if p.score_mod or p.mask_mod else (),
                None,
            )
        )
        if not (p.k_new or p.rotary_cos):
            return shape
        return shape._replace(append=append_shape(p, shape))


def chosen_by(p: FlashAttentionParams) -> Chosen:
    """The fields of a ProblemShape, its first ones, that follow from choices (params.CHOICES) alone."""
    dtype = DTYPE_NAMES[p.dtype]
    out_dtype = None if p.out_dtype in (None, p.dtype) else DTYPE_NAMES[p.out_dtype]
    if dtype == FP8 and out_dtype is None:
        out_dtype = DTYPE_NAMES[DataType.BF16]
    left, right = p.window_size_left, p.window_size_right
    left = left if 0 <= left < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
    right = 0 if p.is_causal else right if 0 <= right < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW
    chunk = min(p.attention_chunk, UNBOUNDED_WINDOW)
    if chunk:  # a window too, which no row sees beyond
        left, right = min(left, chunk - 1), min(right, chunk - 1)
    return (
        dtype,
        out_dtype,
        None if keys_dtype(p) is p.dtype else DTYPE_NAMES[keys_dtype(p)],
        p.head_dim,
        value_dim(p),
        "local" if chunk else _MASKS.get((left, right), "local"),
        p.mode is AttentionMode.DECODE,
        p.num_heads,
        p.num_heads_k,
        left,
        right,
        chunk,
        p.num_splits,
        p.max_num_splits,
        p.fixed_split_size,
        p.zero_padding,
        p.sm_margin,
        p.pack_gqa,
        tuple([getattr(p, name) or 0.0 for name in NUMBERS]),
        "bool" if p.attn_mask_dtype is None else DTYPE_NAMES[p.attn_mask_dtype],
        int(DataType.FP32 if p.s_aux_dtype is None else p.s_aux_dtype),
        p.score_mod.id if p.score_mod else "",
        p.mask_mod.id if p.mask_mod else "",
    )


def _strides_of(p, packed: bool, packed_keys: bool) -> tuple[int, ...]:
    """The strides with defaults where they are None, of packed tensors 0 along batches; last that of the page table.

    The stride of a dimension of size 1 never addresses memory and array libraries put anything there, but TMA wants a
    multiple of 16 bytes: the kernel gets the contiguous one.
    """
    given = _read_strides(p)
    heads, heads_k = p.num_heads, p.num_heads_k
    batch_q, rows_q, batch_k, rows_k = all_sizes(p)
    q, out = (
        (0 if packed else rows_q * heads * columns, heads * columns, columns) for columns in (p.head_dim, value_dim(p))
    )
    k, v = (
        (0 if packed_keys else rows_k * heads_k * columns, heads_k * columns, columns)
        for columns in (p.head_dim, value_dim(p))
    )
    strides = q + k + v + out
    if given != _CONTIGUOUS:
        sizes_q, sizes_k = (batch_q, rows_q, heads), (batch_k, rows_k, heads_k)
        strides = tuple(
            [
                default if stride is None or size == 1 else stride
                for stride, default, size in zip(given, strides, sizes_q + sizes_k + sizes_k + sizes_q, strict=True)
            ]
        )
    return (*strides, _table_stride_of(p) if is_paged(p) else 0)


def _table_stride_of(p) -> int:
    """Entries between the rows of the page table."""
    stride, rows = p.page_table_batch_stride, p.batch_size_k or p.batch_size
    return p.seqlen_k // p.page_size if stride is None or rows == 1 else stride


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


def _score_strides_of(p, optionals: tuple[str, ...]) -> tuple[int, int, int, int]:
    """The strides of slopes and of the mask: batch; batch, head, row. 0 along dimensions of size 1, and without."""
    alibi = p.alibi_batch_stride or 0 if "alibi_slopes" in optionals and p.batch_size > 1 else 0
    if "attn_mask" not in optionals:
        return alibi, 0, 0, 0
    sizes = p.batch_size, p.num_heads, p.seqlen_q
    contiguous = p.num_heads * p.seqlen_q * p.seqlen_k, p.seqlen_q * p.seqlen_k, p.seqlen_k
    batch, head, row = [
        0 if size == 1 else default if stride is None else stride
        for stride, default, size in zip(_read_mask_strides(p), contiguous, sizes, strict=True)
    ]
    return alibi, batch, head, row


def _mod_values_of(p) -> tuple[float, ...]:
    """ProblemShape.mod_values of params with mods; 0 where there is no array and no scalar."""
    strides = p.mod_strides
    if strides is None:
        _, rows_q, _, rows_k = all_sizes(p)
        sizes = ModSizes(p.batch_size, p.num_heads, p.num_heads_k, rows_q, p.seqlen_k if is_paged(p) else rows_k)
        strides = tuple([stride for array in arrays_of(p) for stride in array.strides(array.extents(sizes))])
    values = (
        (p.mod_pointers or (), MAX_POINTERS),
        (strides, MAX_POINTERS * STRIDES_PER_POINTER),
        (p.mod_scalars or (), MAX_SCALARS),
    )
    read = tuple([value for given, number in values for value in (*given, *[0] * (number - len(given)))])
    return (*read, *(_block_values_of(p) if p.block_mask else [0] * len(BLOCK_ARGUMENTS)))


def _block_values_of(p) -> tuple[int, ...]:
    """BLOCK_ARGUMENTS of params with a block mask."""
    lists = p.block_mask
    rows, row_length = -(-p.seqlen_q // lists.q_block), -(-p.seqlen_k // lists.kv_block)
    head_stride = rows if lists.heads > 1 else 0
    batch_stride = rows * lists.heads if lists.batches > 1 else 0
    tiles = lists.q_block // block_sizes(DTYPE_NAMES[p.dtype], p.head_dim, p.head_dim_v)[0]
    return (*[getattr(lists, name) for name in LISTS], batch_stride, head_stride, row_length, tiles)
