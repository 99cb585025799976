"""One new key and value of each sequence: the CTA that reads the last tile of its keys has the row of its head.

It brings the row to registers while the tile is on its way, from memory that does not have the row yet; puts it into
the tile, in shared memory; and writes it to the cache, for later launches (common/new_row.py). No CTA waits for
another. Where several CTAs read the last tile of one head, all of them write the same bits.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ..common.cache import Cache
from ..common.arithmetic import maximum, minimum
from ..common.block_range import first_key
from ..common.copies import piece_size
from ..common.layout import element_type, tensor_view
from ..common.new_row import NewRow
from ..common.ragged import RaggedBatch
from ..common.rotary import Rotary, read_turned
from ..common.sequences import is_present
from ..common.tiles import Tile
from .split import SplitWork

WARP, PIECES_WARP = 32, 3    # the last consumer warp, which has the fewest rows of Q to bring


@dataclass(frozen=True)
class NewRows:
    """Of a launch.

    mK, mV            (1, columns, num_heads_k, batch)
    cache             that they belong to
    seqlens_rotary    [batch_size] int32: positions of the new keys; null: behind the old ones
    rotary            None where nothing is turned
    """
    mK: cute.Tensor
    mV: cute.Tensor
    cache: Cache
    seqlens_rotary: cute.Tensor
    rotary: Optional[Rotary]

    @staticmethod
    def create(cfg, a) -> "NewRows":
        """From the kernel's arguments, on the host."""
        dims = cfg.dim_qk, cfg.dim_v
        mK, mV = (tensor_view(a, name, (1, columns, a.num_heads_k, a.batch_size))
                  for name, columns in zip(("k_new", "v_new"), dims, strict=True))
        return NewRows(mK, mV, Cache.create(a, dims, False),
                       cute.make_tensor(a.seqlens_rotary, cute.make_layout(a.batch_size)),
                       Rotary.create(a, cfg.table_dtype) if cfg.rotary else None)

    @cute.jit
    def places(self, batch: RaggedBatch, sequence: Int32) -> tuple[Int32, Int32]:
        """(keys that a sequence had before, position of the new one and of the first query)."""
        old = minimum(maximum(batch.arrays.seqused_k[sequence], 0), batch.arrays.rows_k)
        start = old
        if const_expr(self.rotary is not None):
            if is_present(self.seqlens_rotary):
                start = self.seqlens_rotary[sequence]
        return old, start

    def position(self, position: Int32) -> Int32:
        """As the tables have it."""
        if self.rotary is None:
            return position
        return minimum(maximum(position, 0), self.rotary.mCos.shape[0] - 1)

    @cute.jit
    def row_of(self, cfg, smem, batch: RaggedBatch, work: SplitWork, places: tuple[Int32, Int32], tidx: Int32
               ) -> NewRow:
        """The row that belongs to the first tile of a CTA's work, on its way. Runs on: the consumers."""
        first, end = work.blocks.n_block_min, work.blocks.n_block_max
        row, capacity = places[0] - first_key(cfg, end - 1), batch.arrays.rows_k
        is_here = end > first and row >= 0 and row < cfg.tile_n and places[0] < capacity
        return self.fetch(cfg, smem, work.tile, capacity, places, (row, is_here), tidx)

    @cute.jit
    def fetch(self, cfg, smem, tile: Tile, capacity: Int32, places: tuple[Int32, Int32], wanted: tuple[Int32, Boolean],
              tidx: Int32) -> NewRow:
        """The new row of a tile's sequence and KV head; wanted: its row in the K/V tile, and whether it is."""
        element = element_type(cfg)
        K, V = (cute.make_rmem_tensor(piece_size(element), element) for _ in range(2))
        (row, is_here), entry, within, exists = wanted, Int32(0), Int32(0), Boolean(False)
        if is_here and tidx // WARP == PIECES_WARP:
            # All that is read is on its way before the first of it is needed.
            entry, within, exists = self.cache.look_up(tile.sequence, places[0], capacity)
            columns, piece = piece_size(element), tidx % WARP
            if piece * columns < cfg.dim_v:
                mV = self.mV[0, None, tile.kv_head, tile.sequence]
                cute.autovec_copy(cute.local_tile(mV, (columns,), (piece,)), V)
            if piece * columns < cfg.dim_qk:
                mK = self.mK[0, None, tile.kv_head, tile.sequence]
                read = read_turned(cfg.rotary, mK, self.rotary, self.position(places[1]), piece)
                cute.autovec_copy(read, K)
            exists = self.cache.has(entry, exists)
        return NewRow(K, V, smem.sK, smem.sV, self.cache, tile.kv_head, entry, within, row, is_here, exists)

    @cute.jit
    def append_alone(self, cfg, smem, batch: RaggedBatch, tile: Tile, tidx: Int32):
        """The row to the cache where nobody attends to the sequence: it has no queries. Runs on: the consumers."""
        places, capacity = self.places(batch, tile.sequence), batch.arrays.rows_k
        new = self.fetch(cfg, smem, tile, capacity, places, (Int32(0), places[0] < capacity), tidx)
        new.store(tidx)
        publish()


def publish():
    """After stores to the cache: what later launches read by TMA was written by ordinary stores."""
    cute.arch.fence_proxy("async.global")
