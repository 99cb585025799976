"""Transpose role of FP8: V tiles as TMA brings them -> V^T tiles as the PV GEMM reads them.

These warps go from ring to ring. In the decode kernel, which mostly waits for memory, the consumers do it within the
V ring (common/transpose.py).
"""
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.config import NUM_TRANSPOSE_WARPS, FwdConfig
from ...planning.rings import WARP, by_name
from ..common.block_range import first_key
from ..common.layout import unhoisted
from ..common.transpose import Share, clear_share, read_block, rows_of_lane, write_block
from ..common.visibility import Visibility
from .bundles import FwdParams, FwdPipelines, FwdSmem
from .tile_ring import TileReader


@cute.jit
def transpose(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Every V tile of every tile of O, in the order of the V ring.

    Runs on: the transpose warps. Synchronises: reads the tile ring; waits for the full half of the V ring and the empty
    half of the V^T ring; empties the first, fills the second.
    """
    thread = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["transpose"].warps[0]
    v_consumer, vt_producer = pipes.v.make_consumer(), pipes.vt.make_producer()
    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        tile = reader.tile
        visible = Visibility(cfg, params.window, tile)
        blocks, first_visible = visible.tiles(), visible.first_visible()
        num_used = tile.seqlen_k - first_key(cfg, blocks.n_block_max - 1)
        num_blocks = blocks.n_block_max - blocks.n_block_min
        if const_expr(cfg.has_block_lists):
            num_blocks = params.block_lists.of(cfg, tile).num_blocks
        for i in cutlass.range(num_blocks, unroll=1):
            v = v_consumer.wait_and_advance()
            slot_V = smem.sV[None, None, v.index]
            if const_expr(cfg.is_varlen):
                if i == 0 and num_used < cfg.tile_n:
                    clear_share(cfg, slot_V, num_used, unhoisted(thread), NUM_TRANSPOSE_WARPS)
            if const_expr(first_visible is not None):
                num_gone = first_visible - first_key(cfg, blocks.n_block_max - 1 - i)
                if num_gone > 0:
                    clear_share(cfg, slot_V, num_gone, unhoisted(thread), NUM_TRANSPOSE_WARPS, is_before=True)
            vt = vt_producer.acquire_and_advance()
            transpose_tile(cfg, slot_V, smem.sVt[None, None, vt.index], unhoisted(thread))
            cute.arch.fence_view_async_shared()      # ordinary stores before the async proxy's reads
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                vt.commit()
            v.release()
        reader.advance()


@cute.jit
def transpose_tile(cfg: FwdConfig, slot_V: cute.Tensor, slot_Vt: cute.Tensor, thread: Int32):
    """One warp's share of a tile."""
    share = Share.of(cfg, thread, NUM_TRANSPOSE_WARPS)
    V, Vt = rows_of_lane(slot_V, slot_Vt, thread % 32, share.first_key, share.first_column)
    for key, column in share.places:
        write_block(Vt, key, column, read_block(V, key, column))
