"""Where K and V come from, and in which order a load warp brings tiles of them to shared memory.

A tile starts at any row of its sequence and fills one slot of a ring: consumers see tile_n rows in a
slot, whatever the source. How many rows a sequence may have here (`capacity`) is not how many it uses (Tile.seqlen_k):
what lies behind those is anybody's.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64

from ...planning.config import KernelConfig
from .block_range import BlockRange, first_key
from .tiles import Tile, rows_from
from .tma import TmaOperand, tma_views


@dataclass(frozen=True)
class KeyValueSource:
    """K or V of one KV head and sequence, by TMA.

    rows     (row, column) of the sequence, in TMA's coordinates
    ring     (tile_n, column, slot) in shared memory
    policy   of L2; None is the default
    """
    op: TmaOperand
    rows: cute.Tensor
    ring: cute.Tensor
    policy: Optional[Int64]


def capacity(op: TmaOperand) -> Int32:
    """Rows that every sequence of a dense K or V has."""
    return op.tensor.shape[0]


def source_of(cfg: KernelConfig, op: TmaOperand, ring: cute.Tensor, tile: Tile,
              policy: Optional[Int64] = None) -> KeyValueSource:
    """The rows that `tile` reads."""
    rows = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    return KeyValueSource(op, rows, ring, policy)


def copy_tile(source: KeyValueSource, slot: pipeline.PipelineProducer.ImmutableResourceHandle, key: Int32):
    """Start to fill a slot that was acquired with the rows from `key` on; zeros behind the tensor's last row."""
    box = tuple(cute.size(source.ring, mode=[mode]) for mode in (0, 1))
    tile = cute.local_tile(cute.domain_offset((key, 0), source.rows), box, (0, 0))
    smem, gmem = tma_views(source.op, tile, source.ring)
    cute.copy(source.op.atom, gmem, smem[None, slot.index], tma_bar_ptr=slot.barrier, cache_policy=source.policy)


@cute.jit
def load_after_first(cfg: KernelConfig, k: KeyValueSource, v: KeyValueSource, blocks: BlockRange,
                     k_producer: pipeline.PipelineProducer, v_producer: pipeline.PipelineProducer):
    """After K[last] the pairs (K[n], V[n+1]) downwards, then V[first]: K one tile ahead of V, as consumers need them.

    Returns the producers that it advanced.
    """
    n_block = blocks.n_block_max - 1
    for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
        copy_tile(k, k_producer.acquire_and_advance(), first_key(cfg, n_block - 1 - i))
        copy_tile(v, v_producer.acquire_and_advance(), first_key(cfg, n_block - i))
    copy_tile(v, v_producer.acquire_and_advance(), first_key(cfg, blocks.n_block_min))
    return k_producer, v_producer
