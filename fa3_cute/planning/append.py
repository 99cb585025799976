"""What is done ahead of attention: new keys and values go to the cache, rotary positions turn q and them. Pure Python.

A launch of its own makes what attention's launches then have instead of the caller's: the rotated q, and the lengths
with the new rows. Both lie in the workspace, behind the partial results of split-KV.
"""

from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from operator import itemgetter
from typing import NamedTuple

from ..contract.append import (
    APPEND_ENTRY,
    KV_DESCALE_STRIDES,
    DECODE_POINTERS,
    DECODE_SIZES,
    DECODE_STRIDES,
    LISTS,
    NEW_POINTERS,
    NEW_STRIDES,
    QUANTISE_ENTRY,
    SIZES,
    STRIDES as OWN_STRIDES,
    has_new_keys,
    has_rotary,
    new_dtype,
    table_dtype,
)
from ..contract.arguments import Entry
from ..contract.formats import ELEMENT_BYTES, FP8, PARTIAL
from ..contract.fp8_cache import keys_dtype
from ..contract.head_dims import value_dim
from ..contract.params import DTYPE_NAMES
from ..contract.sequences import is_masked
from ..contract.strides import DESCALE_STRIDES, STRIDES

ALIGNMENT = 256  # bytes, of each part of the workspace
ROTARY = ("halves", "neighbours")  # how pairs lie
_KV_DESCALE_PLACES = [len(STRIDES) + 1 + DESCALE_STRIDES.index(name) for name in KV_DESCALE_STRIDES]  # in shape.strides

_NAMES = (
    *LISTS,
    *NEW_POINTERS,
    *OWN_STRIDES,
    *SIZES,
)  # of AppendShape's strides, where nothing is quantised, and sizes
_of_decode = itemgetter(*map(_NAMES.index, (*DECODE_POINTERS, *DECODE_STRIDES, *DECODE_SIZES)))


@dataclass(frozen=True)
class AppendConfig:
    """Compile-time choices of one kernel. It has neither shared memory nor WGMMA.

    dtype         of what is read: new rows, and q
    kv_dtype      of k and v where new rows are quantised; "" where they have dtype
    rotary        of ROTARY; "" turns nothing
    table_dtype   of the rotary tables; "" without
    """

    dtype: str
    rotary: str = ""
    table_dtype: str = ""
    kv_dtype: str = ""

    is_fp8 = has_descales = False  # nothing here depends on it
    uses_setmaxnreg = False
    smem_bytes = 0
    num_threads = 256

    @property
    def entry(self) -> Entry:
        """What the kernel takes."""
        return QUANTISE_ENTRY if self.kv_dtype else APPEND_ENTRY

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """(name, kind) of each."""
        return self.entry.arguments

    @property
    def kernel(self) -> str:
        """The class of the kernel, by its whole name."""
        return "fa3_cute.kernels.append." + ("quantise.QuantiseKeys" if self.kv_dtype else "kernel.AppendKeys")

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        into = f"_into_{self.kv_dtype}" if self.kv_dtype else ""
        return f"append_{self.dtype}{into}" + f"_{self.rotary}_{self.table_dtype}" * bool(self.rotary)

    @property
    def element_out(self) -> str:
        """The element type of what it writes to the cache."""
        return self.kv_dtype or self.dtype

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)


@cache
def append_config(dtype: str, rotary: str = "", table_dtype: str = "", kv_dtype: str = "") -> AppendConfig:
    """The one config of these choices."""
    return AppendConfig(dtype, rotary, table_dtype, kv_dtype)


def all_append_configs() -> list[AppendConfig]:
    """Every config, but of rotary tables in the other 16-bit type. FP8 rows are neither rotated nor quantised."""
    halves = ("fp16", "bf16")
    return [
        *(append_config(dtype) for dtype in ELEMENT_BYTES),
        *(append_config(dtype, kv_dtype=FP8) for dtype in halves),
        *(
            append_config(dtype, rotary, table, into)
            for dtype, rotary, into in product(halves, ROTARY, ("", FP8))
            for table in (dtype, PARTIAL)
        ),
    ]


class AppendShape(NamedTuple):
    """What is the same for all calls of one shape.

    lengths      addresses, in the order of the problem's
    strides      addresses and strides, in the order of the entry, from the lists on
    q_elements   of the rotated q, contiguous; 0 where q stays
    """

    config: AppendConfig
    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    has_new: bool
    batch_size: int
    q_elements: int
    workspace: int

    @property
    def packed_new(self) -> bool:
        """Whether new rows are those of all sequences, one after the other."""
        return self.strides[LISTS.index("cu_seqlens_k_new")] != 0

    @property
    def num_new(self) -> int:
        """New rows of all sequences together."""
        return self.sizes[SIZES.index("num_new")]

    @property
    def of_decode(self) -> tuple[int, ...]:
        """What the entry of a decode kernel that appends has at its end, in its order."""
        return _of_decode(self.strides + self.sizes)

    @property
    def scales(self) -> tuple[()]:
        """None."""
        return ()

    @property
    def mod_values(self) -> tuple[()]:
        """None."""
        return ()

    @property
    def optionals(self) -> tuple[()]:
        """None."""
        return ()


class AppendPlan(NamedTuple):
    """Where its results lie in a workspace, in bytes; 0 is behind partial results that are none.

    partial_bytes   of the workspace, all of it
    """

    q_offset: int
    lengths_offset: int
    partial_bytes: int
    num_arrivals: int = 0
    counts: tuple[()] = ()


def append_plan(append: AppendShape, partial_bytes: int) -> AppendPlan:
    """Of a problem whose attention needs so much of the workspace."""
    start = _aligned(partial_bytes)
    lengths = start + _aligned(append.q_elements * 2)  # rotation has 16-bit elements
    return AppendPlan(start, lengths, lengths + 4 * append.batch_size * append.has_new)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def append_shape(p, shape) -> AppendShape | None:
    """Of plain params that the rules accept, and their ProblemShape; None if there is nothing to do."""
    has_new, turns = has_new_keys(p), has_rotary(p)
    if not (has_new or turns):
        return None
    dtype = DTYPE_NAMES[new_dtype(p)] if has_new else shape.dtype
    quantises = has_new and new_dtype(p) is not keys_dtype(p)
    rotary = ("neighbours" if p.rotary_interleaved else "halves") if turns else ""
    table, stored = DTYPE_NAMES[table_dtype(p)] if turns else "", DTYPE_NAMES[keys_dtype(p)] if quantises else ""
    config = append_config(dtype, rotary, table, stored)
    packed_new = bool(p.cu_seqlens_k_new)
    num_new = (p.seqlen_knew if packed_new else p.batch_size * p.seqlen_knew) if has_new else 0
    num_queries = (shape.seqlen_q if shape.is_packed else shape.batch_size * shape.seqlen_q) if turns else 0
    pointers = [getattr(p, name) or 0 for name in LISTS + NEW_POINTERS]
    row_stride = p.rotary_dim // 2 if p.rotary_row_stride is None else p.rotary_row_stride
    strides = *shape.strides[:9], *_new_strides(p, packed_new), shape.strides[12], row_stride
    if quantises:
        strides += tuple([shape.strides[place] for place in _KV_DESCALE_PLACES])
    sizes = (
        *(shape.batch_size, shape.seqlen_q, shape.seqlen_k, shape.num_heads, shape.num_heads_k),
        *(shape.head_dim, shape.head_dim_v, shape.page_size, shape.num_pages),
        *(shape.batch_size_k, p.seqlen_knew if has_new else 0, num_new, num_queries),
        *(p.rotary_dim if turns else 0, p.rotary_positions or shape.seqlen_k),
        int(is_masked(p) or not has_new),
    )
    return AppendShape(
        config,
        shape.lengths,
        (*pointers, *strides),
        sizes,
        has_new,
        shape.batch_size,
        num_queries * shape.num_heads * shape.head_dim,
        shape.workspace,
    )


def _new_strides(p, packed: bool) -> tuple[int, ...]:
    """NEW_STRIDES with the contiguous ones where they are None, or along dimensions of size 1; of packed rows 0 along
    batches."""
    rows, heads = p.seqlen_knew, p.num_heads_k
    contiguous = [
        stride
        for columns in (p.head_dim, value_dim(p))
        for stride in (0 if packed else rows * heads * columns, heads * columns, columns)
    ]
    sizes = (1 if packed else p.batch_size, rows, heads) * 2
    return tuple(
        [
            default if size == 1 or (stride := getattr(p, name)) is None else stride
            for name, default, size in zip(NEW_STRIDES, contiguous, sizes, strict=True)
        ]
    )


def attended(shape, q_is_rotated: bool, lengths_at: tuple[int, int] | None):
    """The ProblemShape of attention's launches: what is ahead of them is done.

    q_is_rotated   q is contiguous, in the workspace
    lengths_at     (place of seqused_k among lengths, address of those with the new rows); None: they are the caller's
    """
    strides, lengths = shape.strides, shape.lengths
    if q_is_rotated:
        head_dim, row = shape.head_dim, shape.num_heads * shape.head_dim
        strides = (0 if shape.is_packed else shape.seqlen_q * row, row, head_dim, *strides[3:])
    if lengths_at is not None:
        place, address = lengths_at
        lengths = (*lengths[:place], address, *lengths[place + 1 :])
    return shape._replace(append=None, strides=strides, lengths=lengths)
