"""From accumulators to rows of a gradient, through shared memory: 16 bytes of a row at a time. Who waits for whom in
between is the kernels' own."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import BackwardConfig, GradientFields
from ...planning.config import ROWS_PER_WARPGROUP
from ..common.copies import is_in_row, row_copy
from ..common.layout import element_type
from ..common.tiles import rows_from


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
    """The first rows of sX -> gX, in 16-byte pieces. used: (rows, columns) that gX has."""
    rows, columns = (cute.size(sX, mode=[mode]) for mode in (0, 1))
    copy, first_row, rows_per_step = row_copy(columns, element_type(cfg), thread, num_threads)
    tXsX, tXgX = copy.partition_S(sX), copy.partition_D(gX)
    for step in cutlass.range_constexpr(-(-rows // rows_per_step)):
        row = step * rows_per_step + first_row
        if row < used[0] and row < rows:
            store_row(cfg, tXsX, tXgX, step, (used[1], columns), thread)


@cute.jit
def store_row(cfg: BackwardConfig, tXsX: cute.Tensor, tXgX: cute.Tensor, step: Constexpr[int], columns: tuple,
              thread: Int32):
    """The thread's pieces of its row of a step of `row_copy`. columns: that rows of gX have, and of sX."""
    for c in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
        if const_expr(cfg.is_padded):
            if is_in_row(columns[0], columns[1], element_type(cfg), thread, c):
                move_piece(tXsX, tXgX, step, c)
        else:
            move_piece(tXsX, tXgX, step, c)


def move_piece(tXsX: cute.Tensor, tXgX: cute.Tensor, step: int, column: int):
    """One of `row_copy`'s pieces, through registers."""
    piece = cute.make_rmem_tensor_like(tXsX[None, 0, 0])
    cute.autovec_copy(tXsX[None, step, column], piece)
    cute.autovec_copy(piece, tXgX[None, step, column])
