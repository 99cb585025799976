"""Load role: one warp brings Q, K and V tiles from global to shared memory with TMA."""
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.config import FwdConfig
from ..common.block_list import load_listed
from ..common.block_range import first_key
from ..common.keys_values import load_after_first, source_of
from ..common.tiles import group_of, rows_from
from ..common.tma import tma_views
from ..common.visibility import Visibility
from .bundles import FwdParams, FwdPipelines, FwdSmem
from .tile_ring import TileReader


@cute.jit
def load(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Per tile: K[last], Q, then the other K and V tiles (`load_after_first`).

    Every tile takes exactly one Q slot, also a tile that sees no key: its O still needs the slot.
    Runs on: warp 0. Synchronises: reads the tile ring; waits for the empty halves of the Q, K, V rings, and TMA signals
    their full halves.
    """
    q_producer, k_producer, v_producer = pipes.q.make_producer(), pipes.k.make_producer(), pipes.v.make_producer()
    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        tile = reader.tile
        mQ = rows_from(cfg, tile.offset_q, params.q.tensor[None, None, group_of(cfg, tile), tile.batch])
        tQsQ, tQgQ = tma_views(params.q, cute.local_tile(mQ, (cfg.tile_m, cfg.dim_qk), (tile.m_block, 0)), smem.sQ)
        k, v = (source_of(cfg, op, ring, tile, places=params.places)
                for op, ring in ((params.k, smem.sK), (params.v, smem.sV)))
        if const_expr(cfg.has_block_lists):
            listed = params.block_lists.of(cfg, tile)
            first = listed.block(Int32(0))
            if listed.num_blocks > 0:
                k.copy(k_producer.acquire_and_advance(), first_key(cfg, first), ())
        else:
            blocks = Visibility(cfg, params.window, tile, cfg.packed_heads).tiles()
            found = k.find(first_key(cfg, blocks.n_block_max - 1))
            if blocks.n_block_max > blocks.n_block_min:
                k.copy(k_producer.acquire_and_advance(), first_key(cfg, blocks.n_block_max - 1), found)
        slot = q_producer.acquire_and_advance()
        cute.copy(params.q.atom, tQgQ, tQsQ[None, slot.index], tma_bar_ptr=slot.barrier)
        if const_expr(cfg.has_block_lists):
            if listed.num_blocks > 0:
                k_producer, v_producer = load_listed(cfg, k, v, listed, first, k_producer, v_producer)
        else:
            if blocks.n_block_max > blocks.n_block_min:
                k_producer, v_producer = load_after_first(cfg, k, v, blocks, found, k_producer, v_producer)
        reader.advance()
