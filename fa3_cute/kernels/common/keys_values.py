"""Where K and V come from, and in which order a load warp brings tiles of them to shared memory.

A tile fills one slot of a ring: consumers see tile_n rows in a slot, whatever the source. How many rows a sequence may
have here (`capacity`) is not how many it uses (Tile.seqlen_k): what lies behind those is anybody's. A source says where
a tile lies (`find`), which for K is asked a tile ahead of V, and starts to fill a slot from there (`copy`); pages.py
has that of pages, rows.py that of pages which TMA has no boxes for.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64, const_expr

from ...planning.config import KernelConfig
from .block_range import BlockRange, first_key
from .layout import stored_type, tensor_view
from .pages import PagedOperand, PagedSource, Pages, paged_operand, paged_source_of
from .ragged import RaggedBatch
from .rows import RowOperand, RowRing, RowSource, row_operand, row_source_of
from .tiles import Tile, rows_from
from .tma import TmaOperand, tma_load, tma_views

Operand = TmaOperand | PagedOperand | RowOperand


@dataclass(frozen=True)
class KeyValueSource:
    """K or V of one KV head and sequence, by TMA. A tile may start at any row.

    rows     (row, column) of the sequence, in TMA's coordinates
    ring     (tile_n, column, slot) in shared memory
    policy   of L2; None is the default
    """
    op: TmaOperand
    rows: cute.Tensor
    ring: cute.Tensor
    policy: Optional[Int64]

    def find(self, key: Int32) -> tuple:
        """What is to be known of the tile from `key` on before `copy`: nothing."""
        return ()

    def copy(self, slot: pipeline.PipelineProducer.ImmutableResourceHandle, key: Int32, found: tuple):
        """Start to fill a slot that was acquired with the rows from `key` on; zeros behind the tensor's last row."""
        box = tuple(cute.size(self.ring, mode=[mode]) for mode in (0, 1))
        tile = cute.local_tile(cute.domain_offset((key, 0), self.rows), box, (0, 0))
        smem, gmem = tma_views(self.op, tile, self.ring)
        cute.copy(self.op.atom, gmem, smem[None, slot.index], tma_bar_ptr=slot.barrier, cache_policy=self.policy)


@dataclass(frozen=True)
class KeyPlaces:
    """Of ragged batches: which rows of K and V are a sequence's. pages is None unless cfg.page_box."""
    batch: RaggedBatch
    pages: Optional[Pages]

    @staticmethod
    def create(cfg: KernelConfig, a, batch: RaggedBatch) -> "KeyPlaces":
        """From a kernel's arguments, on the host."""
        return KeyPlaces(batch, Pages.create(cfg, a) if cfg.page_box else None)


def with_descriptors(*operands) -> list:
    """The operands that TMA copies."""
    return [op for op in operands if not isinstance(op, RowOperand)]


def key_value_ring(cfg: KernelConfig, layout: cute.ComposedLayout, **facts) -> pipeline.PipelineAsync:
    """The barriers of a ring of K or V with that layout of slots; facts: PipelineAsync.create's arguments."""
    if cfg.reads_rows:
        return RowRing.create(**facts)
    slot_bytes = cute.size_in_bytes(stored_type(cfg), cute.select(layout, mode=[0, 1]))
    return pipeline.PipelineTmaAsync.create(**facts, tx_count=slot_bytes)


def capacity(op: TmaOperand) -> Int32:
    """Rows that every sequence of a dense K or V has."""
    return op.tensor.shape[0]


def key_value_operand(cfg: KernelConfig, a, name: str, shape: tuple, ring: cute.ComposedLayout) -> Operand:
    """K or V ("k", "v") of a kernel's arguments: (row, column, head, batch) of `shape`, or pages."""
    if cfg.reads_rows:
        return row_operand(cfg, a, name, shape[1])
    if cfg.page_box:
        return paged_operand(cfg, a, name, shape[1], cute.size(ring, mode=[1]))
    return tma_load(tensor_view(a, name, shape), ring, cfg.tile_n)


def source_of(cfg: KernelConfig, op: Operand, ring: cute.Tensor, tile: Tile, policy: Optional[Int64] = None,
              places: Optional[KeyPlaces] = None):
    """The rows that `tile` reads."""
    if const_expr(not cfg.is_ragged):
        rows = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
        return KeyValueSource(op, rows, ring, policy)
    batch = places.batch.key_batch(tile.sequence)
    if const_expr(cfg.reads_rows):
        return row_source_of(cfg, op, ring, tile, places.pages, batch)
    if const_expr(cfg.page_box):
        return paged_source_of(cfg, op, ring, tile, policy, places.pages, batch)
    return KeyValueSource(op, rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, batch]), ring, policy)


Source = KeyValueSource | PagedSource | RowSource


@cute.jit
def load_after_first(cfg: KernelConfig, k: Source, v: Source, blocks: BlockRange, found: tuple,
                     k_producer: pipeline.PipelineProducer, v_producer: pipeline.PipelineProducer):
    """After K[last] the pairs (K[n], V[n+1]) downwards, then V[first]: K one tile ahead of V, as consumers need them.

    found is K[last]'s. Returns the producers that it advanced.
    """
    n_block = blocks.n_block_max - 1
    for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
        found_k = k.find(first_key(cfg, n_block - 1 - i))
        k.copy(k_producer.acquire_and_advance(), first_key(cfg, n_block - 1 - i), found_k)
        v.copy(v_producer.acquire_and_advance(), first_key(cfg, n_block - i), found)
        found = found_k
    v.copy(v_producer.acquire_and_advance(), first_key(cfg, blocks.n_block_min), found)
    return k_producer, v_producer
