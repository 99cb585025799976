"""Element types, shared-memory layouts and views of register fragments.

A WGMMA accumulator of shape (64, N) is spread over 128 threads. Thread t of the warpgroup (warp w = t / 32, lane
l = t % 32) holds, for r in {0, 1} and c in [0, N/4), the element

    row  16 w + l / 4 + 8 r            column  2 (l % 4) + 8 (c / 2) + c % 2

(PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"). CuTe stores it as ((2, 2, N/8), MMA_M, MMA_N).
"""
import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Constexpr, Float8E4M3FN, Float16, Float32, Int32, Int64
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum

from ...contract.formats import FP8, PARTIAL
from ...planning.config import KernelConfig

ELEMENT_TYPES = {"fp16": Float16, "bf16": BFloat16, FP8: Float8E4M3FN, PARTIAL: Float32}
ROWS_OF_ATOM = 8           # that a swizzle permutes among themselves
ROW_STEP = 8               # from a thread's first row to its second
STRIDE_DIVISIBILITY = 16   # bytes, of every stride but the last dimension's: TMA's rule
CONVERT_CHUNK = 8          # elements converted by one vector operation; see `convert`


def element_type(cfg: KernelConfig):
    """The CUTLASS type of Q in memory, and but for FP8 keys beside it of K and V."""
    return ELEMENT_TYPES[cfg.dtype]


def operand_type(cfg: KernelConfig):
    """The CUTLASS type of Q, K, P and V in the GEMMs."""
    return ELEMENT_TYPES[cfg.gemm_dtype]


def stored_type(cfg: KernelConfig):
    """The CUTLASS type of K and V in memory."""
    return ELEMENT_TYPES[cfg.stored_dtype]


def out_type(cfg: KernelConfig):
    """The CUTLASS type of O."""
    return ELEMENT_TYPES[cfg.element_out]


def smem_ring(element, rows: int, columns: int, num_stages: int, has_columns_first: bool = False
              ) -> cute.ComposedLayout:
    """(rows, columns, num_stages), rows contiguous, in the widest swizzle that a row's bytes are a multiple of: 128, 64
    or 32.

    Row r's 16-byte chunks of such a stretch are permuted by an exclusive or with bits of r, so that 8 rows of one chunk
    lie in 8 different groups of banks. Stretches follow one another; has_columns_first: those of 8 rows do, then those
    of the next 8.
    """
    kind = sm90.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, element, columns)
    atom = warpgroup.make_smem_layout_atom(kind, element)
    return cute.tile_to_shape(atom, (rows, columns, num_stages), order=(1, 0, 2) if has_columns_first else (0, 1, 2))


def stretch_of(element, columns: int) -> int:
    """Columns of a stretch of `smem_ring`."""
    return math.gcd(128, columns * element.width // 8) * 8 // element.width


def dims_of(cfg: KernelConfig, a) -> tuple[int | Int32, int | Int32]:
    """Columns of Q and K, and of V and O, among a kernel's arguments `a`: at most the tiles' cfg.dim_qk, cfg.dim_v."""
    return a.head_dim, a.head_dim_v


def columns_of(cfg: KernelConfig, a) -> tuple[int | Int32, int | Int32]:
    """The same where tensors and tiles have as many, which is known at compile time, unless cfg.is_padded."""
    return dims_of(cfg, a) if cfg.is_padded else (cfg.dim_qk, cfg.dim_v)


def tensor_view(a, name: str, shape: tuple) -> cute.Tensor:
    """(seqlen, columns, heads, batch), the shape, over a pointer among a kernel's arguments `a` with its strides."""
    ptr = getattr(a, name)
    elements = 8 * STRIDE_DIVISIBILITY // ptr.dtype.width
    row, head, batch = (cute.assume(getattr(a, f"{name}_{of}_stride"), divby=elements)
                        for of in ("row", "head", "batch"))
    return cute.make_tensor(ptr, cute.make_layout(shape, stride=(row, 1, head, batch)))


def lse_view(a, batches: Int32) -> cute.Tensor:
    """(seqlen_q, num_heads, batch): the log-sum-exp, contiguous as (batch, num_heads, seqlen_q)."""
    return cute.make_tensor(a.softmax_lse, cute.make_layout(
        (a.seqlen_q, a.num_heads, batches), stride=(1, Int64(a.seqlen_q), Int64(a.seqlen_q) * a.num_heads)))


def unhoisted(tidx: Int32) -> Int32:
    """tidx, by a shuffle: what is computed from it stays where it is, while the compiler would move it out of the loop
    over tiles, into registers that the main loop needs."""
    return cute.arch.shuffle_sync(tidx, cute.arch.lane_idx())


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


def as_operand_a(cfg: KernelConfig, acc: cute.Tensor) -> cute.Tensor:
    """View S's accumulator as the A operand of the PV WGMMA. No data moves.

    16 bit: ((2, 2, 2), MMA_M, (N/16, MMA_N)), keys in order. FP8: ((4, 2, 2), MMA_M, (N/32, MMA_N)); a thread has 4
    keys in a row there and holds 2 and 2 here, which are taken as they come: key 4 q + i of 16 is key
    2 q + 8 (i / 2) + i % 2, and V is transposed with its keys in the same order (transpose.py).
    """
    if cfg.is_fp8:
        ((pair, row_half, col_block), mma_m, mma_n), stride = acc.shape, acc.stride
        ((pair_by, row_by, block_by), m_by, n_by) = stride
        return cute.make_tensor(acc.iterator, cute.make_layout(
            (((pair, 2), row_half, 2), mma_m, (col_block // 4, mma_n)),
            stride=(((pair_by, block_by), row_by, 2 * block_by), m_by, (4 * block_by, n_by))))
    split = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
    ((pair, row_half, (k_half, k_block)), mma_m, mma_n), stride = split.shape, split.stride
    return cute.make_tensor(acc.iterator, cute.make_layout(
        ((pair, row_half, k_half), mma_m, (k_block, mma_n)),
        stride=((stride[0][0], stride[0][1], stride[0][2][0]), stride[1], (stride[0][2][1], stride[2]))))


def as_quads(acc: cute.Tensor) -> cute.Tensor:
    """View O's accumulator of an FP8 kernel as (4, rows, N/16): in quad g, columns 16 g + 4 (l % 4) .. + 3 in order.

    V is transposed with the even columns of each 16 before the odd ones (transpose.py): as WGMMA counts them, a thread
    has columns 0, 2 and 1, 3 of its four.
    """
    ((pair, row_half, col_block), mma_m, mma_n), stride = acc.shape, acc.stride
    ((pair_by, row_by, block_by), m_by, n_by) = stride
    return cute.make_tensor(acc.iterator, cute.make_layout(
        ((2, pair), (row_half, mma_m), (col_block // 2, mma_n)),
        stride=((block_by, pair_by), (row_by, m_by), (2 * block_by, n_by))))


def pieces_of_row(cfg: KernelConfig, acc_O: cute.Tensor, r: int) -> tuple[list[tuple], int]:
    """What a thread holds of its r-th row of O, in pieces of neighbouring columns, and their size.

    Of the row's pieces thread t has those of index t % 4, 4 + t % 4, ...
    """
    if cfg.values.is_transposed:
        quads = as_quads(acc_O)
        return [tuple(quads[i, r, g] for i in range(4)) for g in range(cfg.dim_v // 16)], 4
    O = as_rows_cols(acc_O)
    return [(O[r, 2 * c], O[r, 2 * c + 1]) for c in range(cute.size(O, mode=[1]) // 2)], 2


@dataclass(frozen=True)
class SwizzledRow:
    """A row of a slot (`smem_ring`) by its addresses, where CuTe's views would take a register per piece.

    start     shared-memory address of the row's first byte
    flip      what the swizzle does to the addresses of its 16-byte chunks: exclusive or
    """
    num_rows: Constexpr
    width: Constexpr        # bytes of a stretch, whose chunks are permuted among themselves
    start: Int32
    flip: Int32

    @staticmethod
    def create(slot: cute.Tensor, row: Int32, first_byte: Int32 = 0) -> "SwizzledRow":
        """A row of a slot (rows, columns). `pointer` counts from `first_byte`: the two have no bit in common."""
        num_rows, row_bytes = cute.size(slot, mode=[0]), cute.size(slot, mode=[1]) * slot.element_type.width // 8
        width = math.gcd(128, row_bytes)
        flip = (row * width >> 3) & (width - 16)        # bits 7.. of the address, onto bits 4..
        start = Int32(slot.iterator.toint()) + row * width + first_byte % 16
        return SwizzledRow(num_rows, width, start, flip ^ (first_byte // 16 * 16))

    def pointer(self, dtype, byte: int, rows: int = 0, alignment: int = 16) -> cute.Pointer:
        """To a byte, `rows` (a multiple of 8) further down."""
        stretch, within = divmod(byte, self.width)
        address = self.start + (within ^ self.flip) + (stretch * self.num_rows + rows) * self.width
        return cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=alignment)


def view_as(tensor: cute.Tensor, layout: cute.ComposedLayout, element) -> cute.Tensor:
    """The same shared memory as elements of another type in another layout."""
    ptr = cute.make_ptr(element, tensor.iterator.toint(), cute.AddressSpace.smem, assumed_align=1024)
    return cute.make_tensor(cute.recast_ptr(ptr, layout.inner, dtype=element), layout.outer)


def transposed(t: cute.Tensor) -> cute.Tensor:
    """Swap the first two modes of a view. No data moves."""
    order = (1, 0, *range(2, cute.rank(t)))
    return cute.composition(t, cute.make_ordered_layout((t.shape[1], t.shape[0], *t.shape[2:]), order=order))


@cute.jit
def convert(src: cute.Tensor, dst: cute.Tensor):
    """dst[i] = src[i] rounded to dst's type, in chunks of 8; dst is compact, src is any view of registers.

    In one operation of more than 64 elements LLVM no longer keeps the vector in registers: P then moves between the PV
    WGMMAs (ptxas C7519) and tile_n > 128 spills (160 bytes at head_dim 128, tile_n 176; 0 in chunks).
    """
    flat_dst = cute.coalesce(dst)
    for i in cutlass.range_constexpr(cute.size(dst) // CONVERT_CHUNK):
        part = cute.make_rmem_tensor(CONVERT_CHUNK, src.element_type)
        for j in cutlass.range_constexpr(CONVERT_CHUNK):
            part[j] = src[i * CONVERT_CHUNK + j]
        converted = cute.make_tensor(flat_dst.iterator + i * CONVERT_CHUNK, cute.make_layout(CONVERT_CHUNK))
        converted.store(part.load().to(dst.element_type))


def rounded(acc: cute.Tensor, element) -> cute.Tensor:
    """A copy of an accumulator in another type, such as that of a GEMM's operands."""
    out = cute.make_rmem_tensor_like(acc, element)
    convert(acc, out)
    return out
