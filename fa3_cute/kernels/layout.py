"""Element types, shared-memory layouts and views of register fragments.

A WGMMA accumulator of shape (64, N) is spread over 128 threads. Thread t of the warpgroup (warp w = t / 32, lane
l = t % 32) holds, for r in {0, 1} and c in [0, N/4), the element

    row  16 w + l / 4 + 8 r            column  2 (l % 4) + 8 (c / 2) + c % 2

(PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"). CuTe stores it as ((2, 2, N/8), MMA_M, MMA_N).
"""
import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float16, Int32
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum

from ..config import ELEMENT_BYTES, FwdConfig

ELEMENT_TYPES = {"fp16": Float16, "bf16": BFloat16}
STRIDE_DIVISIBILITY = 16   # bytes, of every stride but the last dimension's: TMA's rule
PIECE = 8                  # elements: 16 bytes
CONVERT_CHUNK = 8   # elements converted by one vector operation; see `convert`


def element_type(cfg: FwdConfig):
    """The CUTLASS type of Q, K, V and O."""
    return ELEMENT_TYPES[cfg.dtype]


def row_major_smem(cfg: FwdConfig, rows: int, num_stages: int) -> cute.ComposedLayout:
    """(rows, head_dim, num_stages), rows contiguous, in the widest swizzle that head_dim allows (128 B; 64 B at 96)."""
    kind = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, element_type(cfg), cfg.head_dim)
    atom = warpgroup.make_smem_layout_atom(kind, element_type(cfg))
    return cute.tile_to_shape(atom, (rows, cfg.head_dim, num_stages), order=(0, 1, 2))


def tensor_view(cfg: FwdConfig, ptr: cute.Pointer, shape, stride) -> cute.Tensor:
    """(seqlen, head_dim, heads, batch) over a pointer; shape and stride are (row, head, batch)."""
    elements = STRIDE_DIVISIBILITY // ELEMENT_BYTES[cfg.dtype]
    row, head, batch = (cute.assume(s, divby=elements) for s in stride)
    return cute.make_tensor(ptr, cute.make_layout((shape[0], cfg.head_dim, *shape[1:]), stride=(row, 1, head, batch)))


def fragment_row(tidx: Int32) -> Int32:
    """Row of the tile held by consumer thread `tidx` at r = 0 (tidx counts through all consumer warpgroups)."""
    return (tidx // 32) * 16 + (tidx % 32) // 4


def fragment_col(tidx: Int32) -> Int32:
    """Column of the tile held by consumer thread `tidx` at c = 0."""
    return (tidx % 4) * 2


def col_offset(c: int) -> int:
    """Distance of the thread's c-th column from its first one: known at compile time."""
    return 8 * (c // 2) + c % 2


def as_rows_cols(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator as (rows, cols): ((2, MMA_M), (2, N/8, MMA_N))."""
    packed = cute.make_layout(acc.layout.shape)
    ((pair, row_half, col_block), mma_m, mma_n), stride = packed.shape, packed.stride
    rows_cols = cute.make_layout(
        ((row_half, mma_m), (pair, col_block, mma_n)),
        stride=((stride[0][1], stride[1]), (stride[0][0], stride[0][2], stride[2])))
    return cute.make_tensor(acc.iterator, cute.composition(acc.layout, rows_cols))


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """View S's accumulator as the A operand of the PV WGMMA: ((2, 2, 2), MMA_M, (N/16, MMA_N)). No data moves."""
    split = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    ((pair, row_half, (k_half, k_block)), mma_m, mma_n), stride = split.shape, split.stride
    return cute.make_tensor(acc.iterator, cute.make_layout(
        ((pair, row_half, k_half), mma_m, (k_block, mma_n)),
        stride=((stride[0][0], stride[0][1], stride[0][2][0]), stride[1], (stride[0][2][1], stride[2]))))


def transposed(t: cute.Tensor) -> cute.Tensor:
    """Swap the first two modes of a view. No data moves."""
    order = (1, 0, *range(2, cute.rank(t)))
    return cute.composition(t, cute.make_ordered_layout((t.shape[1], t.shape[0], *t.shape[2:]), order=order))


def threads_per_row(cfg: FwdConfig) -> int:
    """Threads that share a row in `row_copy`: a divisor of its 16-byte pieces."""
    return 4 if cfg.head_dim % 64 else 8


def row_copy(cfg: FwdConfig, thread: Int32, num_threads: int):
    """How `num_threads` threads walk a (rows, head_dim) tensor in 16-byte pieces, some rows per step.

    Returns one thread's copy, whose partitions are (piece, step, column), its row of a step, and the rows of a step.
    """
    rows_per_step = num_threads // threads_per_row(cfg)
    threads = cute.make_ordered_layout((rows_per_step, threads_per_row(cfg)), order=(1, 0))
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element_type(cfg), num_bits_per_copy=128)
    copy = cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, PIECE)))
    return copy.get_slice(thread), thread // threads_per_row(cfg), rows_per_step


def row_piece(cfg: FwdConfig, row: cute.Tensor, thread: Int32, column: int) -> cute.Tensor:
    """The thread's piece in one column of `row_copy`, of a row (head_dim,) that lies anywhere."""
    return cute.local_tile(row, (PIECE,), (column * threads_per_row(cfg) + thread % threads_per_row(cfg),))


@cute.jit
def convert(src: cute.Tensor, dst: cute.Tensor):
    """dst[i] = src[i] rounded to dst's type, in chunks of 8.

    In one operation of more than 64 elements LLVM no longer keeps the vector in registers: P then moves between the PV
    WGMMAs (ptxas C7519) and tile_n > 128 spills (160 bytes at head_dim 128, tile_n 176; 0 in chunks).
    """
    flat_src, flat_dst = cute.coalesce(src), cute.coalesce(dst)
    for i in cutlass.range_constexpr(cute.size(dst) // CONVERT_CHUNK):
        chunk = cute.make_layout(CONVERT_CHUNK)
        part = lambda t: cute.make_tensor(t.iterator + i * CONVERT_CHUNK, chunk)
        part(flat_dst).store(part(flat_src).load().to(dst.element_type))
