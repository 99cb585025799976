"""Where tiles of K and V come from, and in which order a load warp brings them to shared memory with TMA."""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64

from ...planning.config import KernelConfig
from .block_range import BlockRange
from .tiles import Tile, rows_from
from .tma import TmaOperand, tma_views


@dataclass(frozen=True)
class KeyValueSource:
    """K or V of one KV head as TMA sees it: gmem (box, tile), smem (box, slot); policy: of L2, None is the default."""
    atom: cute.CopyAtom
    gmem: cute.Tensor
    smem: cute.Tensor
    policy: Optional[Int64]


def source_of(cfg: KernelConfig, op: TmaOperand, ring: cute.Tensor, tile: Tile,
              policy: Optional[Int64] = None) -> KeyValueSource:
    """The tiles of the KV head that `tile` reads."""
    mX = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    smem, gmem = tma_views(op, cute.local_tile(mX, (cfg.tile_n, mX.shape[1]), (None, 0)), ring)
    return KeyValueSource(op.atom, gmem, smem, policy)


def copy_tile(source: KeyValueSource, n_block: Int32, slot: pipeline.PipelineProducer.ImmutableResourceHandle):
    """Start to fill a slot that was acquired."""
    cute.copy(source.atom, source.gmem[None, n_block], source.smem[None, slot.index], tma_bar_ptr=slot.barrier,
              cache_policy=source.policy)


@cute.jit
def load_after_first(k: KeyValueSource, v: KeyValueSource, blocks: BlockRange,
                     k_producer: pipeline.PipelineProducer, v_producer: pipeline.PipelineProducer):
    """After K[last] the pairs (K[n], V[n+1]) downwards, then V[first]: K one tile ahead of V, as consumers need them.

    Returns the producers that it advanced.
    """
    n_block = blocks.n_block_max - 1
    for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
        copy_tile(k, n_block - 1 - i, k_producer.acquire_and_advance())
        copy_tile(v, n_block - i, v_producer.acquire_and_advance())
    copy_tile(v, blocks.n_block_min, v_producer.acquire_and_advance())
    return k_producer, v_producer
