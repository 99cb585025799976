"""Load role: one warp streams Q, K and V tiles from global to shared memory with TMA."""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64

from ...planning.config import DecodeConfig, FwdConfig
from .block_range import BlockRange, block_range
from ..forward.bundles import DecodeParams, DecodePipelines, DecodeSmem, FwdParams, FwdPipelines, FwdSmem
from ..decode.split import SplitWork
from .tiles import Tile, TileReader, rows_from
from .tma import TmaOperand, tma_views


@dataclass(frozen=True)
class Stream:
    """K or V of one KV head as TMA sees it: gmem (box, tile), smem (box, slot); policy: of L2, None is the default."""
    atom: cute.CopyAtom
    gmem: cute.Tensor
    smem: cute.Tensor
    policy: Optional[Int64]


def stream_of(cfg: FwdConfig, op: TmaOperand, ring: cute.Tensor, tile: Tile, policy: Optional[Int64] = None) -> Stream:
    """The tiles of the KV head that `tile` reads."""
    mX = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    smem, gmem = tma_views(op, cute.local_tile(mX, (cfg.tile_n, cfg.head_dim), (None, 0)), ring)
    return Stream(op.atom, gmem, smem, policy)


def copy_tile(stream: Stream, n_block: Int32, slot: pipeline.PipelineProducer.ImmutableResourceHandle):
    """Start to fill a slot that was acquired."""
    cute.copy(stream.atom, stream.gmem[None, n_block], stream.smem[None, slot.index], tma_bar_ptr=slot.barrier,
              cache_policy=stream.policy)


@cute.jit
def load_after_first(k: Stream, v: Stream, blocks: BlockRange, k_producer: pipeline.PipelineProducer,
                     v_producer: pipeline.PipelineProducer):
    """After K[last] the pairs (K[n], V[n+1]) downwards, then V[first]: K one tile ahead of V, as consumers need them.

    Returns the producers that it advanced.
    """
    n_block = blocks.n_block_max - 1
    for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
        copy_tile(k, n_block - 1 - i, k_producer.acquire_and_advance())
        copy_tile(v, n_block - i, v_producer.acquire_and_advance())
    copy_tile(v, blocks.n_block_min, v_producer.acquire_and_advance())
    return k_producer, v_producer


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
        mQ = rows_from(cfg, tile.offset_q, params.q.tensor[None, None, tile.head, tile.batch])
        tQsQ, tQgQ = tma_views(params.q, cute.local_tile(mQ, (cfg.tile_m, cfg.head_dim), (tile.m_block, 0)), smem.sQ)
        k, v = stream_of(cfg, params.k, smem.sK, tile), stream_of(cfg, params.v, smem.sV, tile)
        blocks = block_range(cfg, params.window, tile.m_block, tile.seqlen_q, tile.seqlen_k)
        if blocks.n_block_max > blocks.n_block_min:
            copy_tile(k, blocks.n_block_max - 1, k_producer.acquire_and_advance())
        slot = q_producer.acquire_and_advance()
        cute.copy(params.q.atom, tQgQ, tQsQ[None, slot.index], tma_bar_ptr=slot.barrier)
        if blocks.n_block_max > blocks.n_block_min:
            k_producer, v_producer = load_after_first(k, v, blocks, k_producer, v_producer)
        reader.advance()


@cute.jit
def load_split(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork):
    """K[last], then the other K and V tiles of one split (`load_after_first`).

    Runs on: the load warp. Synchronises: waits for the empty halves of the K and V rings; TMA signals the full ones.
    """
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    k = stream_of(cfg, params.k, smem.sK, work.tile, params.kv_policy)
    v = stream_of(cfg, params.v, smem.sV, work.tile, params.kv_policy)
    if work.blocks.n_block_max > work.blocks.n_block_min:
        copy_tile(k, work.blocks.n_block_max - 1, k_producer.acquire_and_advance())
        k_producer, v_producer = load_after_first(k, v, work.blocks, k_producer, v_producer)
