"""From acc_O to global memory: the consumers write O into their tile's Q slot, the store warp sends it out with TMA."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ..config import FwdConfig
from .barriers import sync_warpgroup
from .layout import convert, element_type, fragment_col, fragment_row
from .params import FwdMmas, FwdParams, FwdPipelines, FwdSmem
from .scheduler import Tile, TileScheduler
from .tma import tma_views


@cute.jit
def write_O(cfg: FwdConfig, mmas: FwdMmas, sO: cute.Tensor, acc_O: cute.Tensor, tidx: Int32):
    """acc_O (f32, normalised) -> sO (tile_m, head_dim) in the element type, visible to TMA.

    Runs on: a consumer warpgroup, each its 64 rows.
    Synchronises: its four warps, since sO lies over the Q that they read.
    """
    rO = cute.make_rmem_tensor_like(acc_O, element_type(cfg))
    convert(acc_O, rO)
    sync_warpgroup(tidx // 128)
    stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), element_type(cfg))
    thread_copy = cute.make_tiled_copy_C(stmatrix, mmas.pv).get_slice(tidx)
    cute.copy(thread_copy, thread_copy.retile(rO), thread_copy.partition_D(sO))
    cute.arch.fence_view_async_shared()   # generic-proxy writes before the async proxy's read


@cute.jit
def write_lse(cfg: FwdConfig, params: FwdParams, tile: Tile, lse: cute.Tensor, tidx: Int32):
    """lse (f32, one per row that the thread holds) -> mLSE.

    Runs on: consumer warpgroups; of a row's four threads the first writes.
    """
    if const_expr(cfg.has_lse):
        if fragment_col(tidx) == 0:
            for r in cutlass.range_constexpr(cute.size(lse)):
                row = tile.m_block * cfg.tile_m + fragment_row(tidx) + 8 * r
                if row < params.mLSE.shape[0]:
                    params.mLSE[row, tile.head, tile.batch] = lse[r]


@cute.jit
def store(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Per tile: O from its slot to global memory; TMA drops the rows past seqlen_q. Then the slot may take the next Q.

    Runs on: warp 1. Synchronises: waits for the full half of the O ring; empties the Q ring.
    """
    q_consumer, o_consumer = pipes.q.make_consumer(), pipes.o.make_consumer()
    scheduler = TileScheduler.create(cfg.is_causal, params.grid)
    while scheduler.has_tile():
        tile = scheduler.tile()
        mO = params.o.tensor[None, None, tile.head, tile.batch]
        gO = cute.local_tile(mO, (cfg.tile_m, cfg.head_dim), (tile.m_block, 0))
        tOsO, tOgO = tma_views(params.o, gO, smem.sQ)
        slot = q_consumer.wait_and_advance()   # full long ago; this walks the ring whose slot we release
        o_consumer.wait_and_advance()
        cute.copy(params.o.atom, tOsO[None, slot.index], tOgO)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()   # the lane that issued the store has waited: only now may lane 0 release
        slot.release()
        scheduler.advance()
