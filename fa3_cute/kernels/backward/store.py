"""From accumulators to rows of a gradient, through shared memory: 16 bytes of a row at a time."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.config import ROWS_PER_WARPGROUP
from ..common.barriers import sync_warpgroup
from ..common.copies import is_in_row, row_copy
from ..common.layout import convert, element_type
from ..common.sequences import is_present
from ..common.tiles import rows_from
from .blocks import KeyTile
from .bundles import BwdMmas


@cute.jit
def store_gradient(cfg: BackwardConfig, mmas: BwdMmas, acc: cute.Tensor, slot: cute.Tensor, mX: cute.Tensor,
                   tile: KeyTile, tidx: Int32):
    """acc (f32) -> `slot`, (tile_n, head_dim) of shared memory -> rows of dK or dV below seqlen_k. Not of a null
    pointer: a gradient that is not wanted.

    Runs on: a consumer warpgroup, each its 64 keys.
    """
    wg_idx = tidx // 128
    if is_present(mX):
        rX = cute.make_rmem_tensor_like(acc, element_type(cfg))
        convert(acc, rX)
        stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), element_type(cfg))
        thread_copy = cute.make_tiled_copy_C(stmatrix, mmas.dkv).get_slice(tidx)
        cute.copy(thread_copy, thread_copy.retile(rX), thread_copy.partition_D(slot))
        sync_warpgroup(wg_idx)
        shape, block = (ROWS_PER_WARPGROUP, cfg.head_dim), tile.n_block * cfg.num_consumer_wgs + wg_idx
        gX = cute.local_tile(rows_from(cfg, tile.offset_k, mX[None, None, tile.kv_head, tile.batch]), shape, (block, 0))
        sX = cute.local_tile(slot, shape, (wg_idx, 0))
        used = tile.seqlen_k - block * ROWS_PER_WARPGROUP, mX.shape[1]
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
