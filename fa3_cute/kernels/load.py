"""Load role: one warp streams Q, K and V tiles from global to shared memory with TMA."""
import cutlass
import cutlass.cute as cute

from ..config import DecodeConfig, FwdConfig
from .block_range import block_range
from .params import DecodeParams, DecodePipelines, DecodeSmem, FwdParams, FwdPipelines, FwdSmem
from .split import SplitWork
from .tiles import TileReader, rows_from
from .tma import tma_views


@cute.jit
def load(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Per tile: K[last], Q, then the pairs (K[n], V[n+1]), then V[first]: K one tile ahead of V, as consume needs them.

    Every tile takes exactly one Q slot, also a tile that sees no key: its O still needs the slot.
    Runs on: warp 0. Synchronises: reads the tile ring; waits for the empty halves of the Q, K, V rings, and TMA signals
    their full halves.
    """
    q_producer, k_producer, v_producer = pipes.q.make_producer(), pipes.k.make_producer(), pipes.v.make_producer()
    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        tile = reader.tile
        mQ = rows_from(cfg, tile.offset_q, params.q.tensor[None, None, tile.head, tile.batch])
        mK, mV = (rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
                  for op in (params.k, params.v))
        gQ = cute.local_tile(mQ, (cfg.tile_m, cfg.head_dim), (tile.m_block, 0))
        gK, gV = (cute.local_tile(mX, (cfg.tile_n, cfg.head_dim), (None, 0)) for mX in (mK, mV))
        tQsQ, tQgQ = tma_views(params.q, gQ, smem.sQ)
        tKsK, tKgK = tma_views(params.k, gK, smem.sK)
        tVsV, tVgV = tma_views(params.v, gV, smem.sV)
        blocks = block_range(cfg, params.window, tile.m_block, tile.seqlen_q, tile.seqlen_k)
        n_block = blocks.n_block_max - 1
        if n_block >= blocks.n_block_min:
            slot = k_producer.acquire_and_advance()
            cute.copy(params.k.atom, tKgK[None, n_block], tKsK[None, slot.index], tma_bar_ptr=slot.barrier)
        slot = q_producer.acquire_and_advance()
        cute.copy(params.q.atom, tQgQ, tQsQ[None, slot.index], tma_bar_ptr=slot.barrier)
        if n_block >= blocks.n_block_min:
            for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
                slot = k_producer.acquire_and_advance()
                cute.copy(params.k.atom, tKgK[None, n_block - 1 - i], tKsK[None, slot.index], tma_bar_ptr=slot.barrier)
                slot = v_producer.acquire_and_advance()
                cute.copy(params.v.atom, tVgV[None, n_block - i], tVsV[None, slot.index], tma_bar_ptr=slot.barrier)
            slot = v_producer.acquire_and_advance()
            cute.copy(params.v.atom, tVgV[None, blocks.n_block_min], tVsV[None, slot.index], tma_bar_ptr=slot.barrier)
        reader.advance()


@cute.jit
def load_split(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork):
    """K[last], then the pairs (K[n], V[n+1]) downwards, then V[first] of one split.

    Runs on: the load warp. Synchronises: waits for the empty halves of the K and V rings; TMA signals the full ones.
    """
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    tile, blocks = work.tile, work.blocks
    gK, gV = (cute.local_tile(op.tensor[None, None, tile.kv_head, tile.batch], (cfg.tile_n, cfg.head_dim), (None, 0))
              for op in (params.k, params.v))
    tKsK, tKgK = tma_views(params.k, gK, smem.sK)
    tVsV, tVgV = tma_views(params.v, gV, smem.sV)
    n_block = blocks.n_block_max - 1
    if n_block >= blocks.n_block_min:
        slot = k_producer.acquire_and_advance()
        cute.copy(params.k.atom, tKgK[None, n_block], tKsK[None, slot.index], tma_bar_ptr=slot.barrier,
                  cache_policy=params.kv_policy)
        for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
            slot = k_producer.acquire_and_advance()
            cute.copy(params.k.atom, tKgK[None, n_block - 1 - i], tKsK[None, slot.index], tma_bar_ptr=slot.barrier,
                      cache_policy=params.kv_policy)
            slot = v_producer.acquire_and_advance()
            cute.copy(params.v.atom, tVgV[None, n_block - i], tVsV[None, slot.index], tma_bar_ptr=slot.barrier,
                      cache_policy=params.kv_policy)
        slot = v_producer.acquire_and_advance()
        cute.copy(params.v.atom, tVgV[None, blocks.n_block_min], tVsV[None, slot.index], tma_bar_ptr=slot.barrier,
                  cache_policy=params.kv_policy)
