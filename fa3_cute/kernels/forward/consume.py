"""Consumer role: O and LSE of every tile, and O handed to the warp that stores it."""
import cutlass.cute as cute
from cutlass import const_expr

from ...planning.config import FwdConfig
from ...planning.rings import WARP, by_name
from ...planning.strategies import Output
from ..common.attend import attend_to, attend_to_listed, make_attend, skip_tiles
from ..common.barriers import open_turnstile
from ..common.layout import unhoisted
from ..common.visibility import Visibility
from ..common.wgmma import Mmas
from .bundles import FwdParams, FwdPipelines, FwdSmem
from .store import write_lse, write_O, write_rows
from .tile_ring import TileReader


@cute.jit
def consume(cfg: FwdConfig, params: FwdParams, mmas: Mmas, smem: FwdSmem, pipes: FwdPipelines):
    """Attend to every tile that the scheduler hands out, and hand its O to the store warp.

    Runs on: consumer warpgroups.
    Synchronises: reads the tile ring; waits for the full halves of the Q, K, V rings; empties K and V; fills O.
    """
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    wg_idx = cute.arch.make_warp_uniform(tidx // 128)
    attend = make_attend(cfg, params, mmas, smem, pipes, wg_idx)
    q_consumer, o_producer = pipes.q.make_consumer(), pipes.o.make_producer()
    open_turnstile(cfg, wg_idx)

    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        tile = reader.tile
        if const_expr(cfg.is_fp8):
            tidx = unhoisted(tidx)
        visible = Visibility(cfg, params.window, tile, cfg.packed_heads)
        mask, blocks = visible.of_thread(tidx), visible.tiles()
        q = q_consumer.wait_and_advance()
        attend.q_slot = q.index
        attend.start_tile(params.descales, mask, cfg.packed_heads)
        own = blocks
        if const_expr(cfg.has_block_lists):
            attend = attend_to_listed(cfg, attend, mask, params.block_lists.of(cfg, tile), params.sinks)
        else:
            if const_expr(cfg.skips_per_warpgroup):
                own = visible.tiles_of_warpgroup(blocks, wg_idx)
                attend = skip_tiles(attend, blocks.n_block_max - own.n_block_max)
            attend = attend_to(cfg, attend, mask, own, smem.sV, tidx, params.sinks)
            if const_expr(cfg.skips_per_warpgroup and cfg.is_local):
                attend = skip_tiles(attend, own.n_block_min - blocks.n_block_min)
        if const_expr(cfg.is_fp8):
            tidx = unhoisted(tidx)
        if const_expr(cfg.output is Output.NOWHERE):
            write_rows(cfg, params, tile, attend.acc_O, tidx)
        else:
            o_slot = attend.q_slot
            if const_expr(cfg.output is Output.OWN_SLOT):
                o_slot = o_producer.acquire().index
            write_O(cfg, mmas, smem.sO[None, None, o_slot], attend.acc_O, tidx)
        o_producer.commit()      # of O's own slot, or of Q's, which the Q ring has emptied
        o_producer.advance()
        write_lse(cfg, params, tile, attend.softmax.row_sum, tidx)
        reader.advance()
    if const_expr(cfg.stages_mask):
        attend.row_mask.drain()
