"""From accumulators to rows of a gradient, through shared memory: 16 bytes of a row at a time. Who waits for whom in
between is the kernels' own."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, const_expr

from ...planning.backward import BackwardConfig, GradientFields
from ...planning.config import ROWS_PER_WARPGROUP
from ..common.copies import PIECE_BYTES, is_in_row, row_copy, threads_per_row
from ..common.layout import element_type
from ..common.tiles import rows_from

ELEMENT_BYTES = 2      # of a gradient


@cute.jit
def write_slot(mma: cute.TiledMma, rX: cute.Tensor, slot: cute.Tensor, thread: Int32,
               is_transposed: Constexpr[bool] = False):
    """An accumulator, rounded to 16 bits, -> a slot of shared memory, (rows, columns) as the GEMM has them.

    Runs on: the GEMM's threads.
    """
    stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(is_transposed, 4), rX.element_type)
    thread_copy = cute.make_tiled_copy_C(stmatrix, mma).get_slice(thread)
    cute.copy(thread_copy, thread_copy.retile(rX), thread_copy.partition_D(slot))


@cute.jit
def store_part(cfg: GradientFields, slot: cute.Tensor, part: Int32 | int, mX: cute.Tensor, where: tuple, tidx: Int32):
    """64 rows of a slot, a warpgroup's, -> those rows of a gradient that the sequence has.

    part    of the slot
    where   (tile of as many rows as the slot has, first row of the sequence, its length, head, batch)
    Runs on: a warpgroup.
    """
    index, offset, seqlen, head, batch = where
    rows, columns = (cute.size(slot, mode=[mode]) for mode in (0, 1))
    shape, block = (ROWS_PER_WARPGROUP, columns), index * (rows // ROWS_PER_WARPGROUP) + part
    gX = cute.local_tile(rows_from(cfg, offset, mX[None, None, head, batch]), shape, (block, 0))
    sX = cute.local_tile(slot, shape, (part, 0))
    used = seqlen - block * ROWS_PER_WARPGROUP, mX.shape[1]
    store_used_rows(cfg, sX, gX, used, tidx % 128, 128)


@cute.jit
def store_used_rows(cfg: BackwardConfig, sX: cute.Tensor, gX: cute.Tensor, used: tuple, thread: Int32,
                    num_threads: Constexpr[int]):
    """The first rows of sX -> gX, in 16-byte pieces. used: (rows, columns) that gX has.

    Where the thread's first piece goes is found once, in front of the branches, in each of which it takes 50
    instructions. What ends a tile runs once a tile, and 10000 sequences of 1 to 40 take 1.07 to 1.13 times as long by
    those (head_dim 192, BF16, H200, 2026-12-01).
    """
    rows, columns = (cute.size(sX, mode=[mode]) for mode in (0, 1))
    copy, first_row, rows_per_step = row_copy(columns, element_type(cfg), thread, num_threads)
    tXsX, address = copy.partition_S(sX), found_once(copy.partition_D(gX)[None, 0, 0].iterator.toint())
    step_bytes = gX.stride[0] * (rows_per_step * ELEMENT_BYTES)
    for step in cutlass.range_constexpr(-(-rows // rows_per_step)):
        row = step * rows_per_step + first_row
        if row < used[0] and row < rows:
            store_row(cfg, tXsX[None, step, None], address + step * step_bytes, (used[1], columns), thread)


def found_once(address: Int64) -> Int64:
    """The same, which the compiler does not compute anew in every branch that needs it."""
    return cute.arch.shuffle_sync_bfly(address, 0)


@cute.jit
def store_row(cfg: BackwardConfig, pieces: cute.Tensor, address: Int64, columns: tuple, thread: Int32):
    """The thread's pieces of a row in shared memory, (piece, column) of `row_copy`, to where the first one belongs in
    global memory and those behind it. columns: that rows of the latter have, and of the former."""
    element = element_type(cfg)
    column_bytes = PIECE_BYTES * threads_per_row(columns[1], element)
    for c in cutlass.range_constexpr(cute.size(pieces, mode=[1])):
        if const_expr(cfg.is_padded):
            if is_in_row(columns[0], columns[1], element, thread, c):
                move_piece(pieces[None, c], address + c * column_bytes)
        else:
            move_piece(pieces[None, c], address + c * column_bytes)


def move_piece(piece: cute.Tensor, address: Int64):
    """From shared to global memory, through registers."""
    rX = cute.make_rmem_tensor_like(piece)
    target = cute.make_ptr(piece.element_type, address, cute.AddressSpace.gmem, assumed_align=PIECE_BYTES)
    cute.autovec_copy(piece, rX)
    cute.autovec_copy(rX, cute.make_tensor(target, piece.shape))
