"""K and V in pages of any size: rows one by one with cp.async, where no TMA box of 8 rows divides a page (pages.py).

A tile is brought in rounds of 32 rows. Lane j of the load warp finds where row j of the round lies, one division and
one read of the table, a round ahead; then some lanes share each row, 16 bytes each, and learn its address by a shuffle.
Rows behind the used ones, and those of ids that name no page, are not read: cp.async fills them with zeros. Table
entries behind the used pages are not read either.

Slots have smem_ring's layout, so that consumers see what TMA would have brought. A lane arrives at a slot's full half
by an instruction that waits for the lane's copies in its stead: the load warp never waits for data, and as many tiles
are on their way as the rings have slots.
"""
import math
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Int32, Int64, Uint8, const_expr
from cutlass.experimental import primitives

from ...planning.config import KernelConfig
from ...planning.rings import WARP
from .copies import PIECE_BYTES
from .layout import ROWS_OF_ATOM, SwizzledRow, tensor_view
from .pages import Pages
from .tiles import Tile


class RowRing(pipeline.PipelineCpAsync):
    """Ring whose slots all lanes of the load warp fill with cp.async, for consumers that know PipelineTmaAsync's.

    One lane of a warp gives a slot back, as there. cp.async writes through the generic proxy, and what is behind the
    full half may be WGMMA: every consumer fences what it has waited for.
    """

    @staticmethod
    def create(**facts) -> "RowRing":
        """Of PipelineCpAsync.create's arguments."""
        ring = pipeline.PipelineCpAsync.create(**facts)
        return RowRing(ring.sync_object_full, ring.sync_object_empty, ring.num_stages, ring.producer_mask,
                       ring.consumer_mask)

    def consumer_wait(self, state, try_wait_token=None, *, loc=None, ip=None) -> None:
        """Until a slot is full; then WGMMA may read it."""
        super().consumer_wait(state, try_wait_token, loc=loc, ip=ip)
        cute.arch.fence_view_async_shared(loc=loc, ip=ip)

    def consumer_release(self, state, *, loc=None, ip=None) -> None:
        """One arrival per warp."""
        with cute.arch.elect_one(loc=loc, ip=ip):
            super().consumer_release(state, loc=loc, ip=ip)


@dataclass(frozen=True)
class RowOperand:
    """A pool: (row of a page, column, head, page)."""
    tensor: cute.Tensor


def row_operand(cfg: KernelConfig, a, name: str, columns: int) -> RowOperand:
    """Of a kernel's argument `name`, on the host."""
    return RowOperand(tensor_view(a, name, (a.page_size, columns, a.num_heads_k, a.num_pages)))


@dataclass(frozen=True)
class RowSource:
    """K or V of one KV head and sequence, in pages; a source as keys_values.KeyValueSource is.

    pool       (row of a page, column, page)
    ring       (tile_n, column, slot) in shared memory
    row        of the table
    num_rows   that are used
    first_row  of the sequence's first key; None: 0
    """
    cfg: Constexpr
    pool: cute.Tensor
    ring: cute.Tensor
    row: cute.Tensor
    pages: Pages
    num_rows: Int32
    first_row: Optional[Int32] = None

    @property
    def rows_of_round(self) -> int:
        """At most one per lane, and a tile is whole rounds."""
        return math.gcd(WARP, self.cfg.tile_n)

    def row_of(self, key: Int32) -> Int32:
        """Of the sequence, as the table counts them."""
        return key if self.first_row is None else key + self.first_row

    @cute.jit
    def page_of(self, key: Int32, end: Int32) -> Int32:
        """The page of the lane's row of the round from `key` on; -1 if it is not below `end`, unused or nowhere."""
        key = key + cute.arch.lane_idx() % self.rows_of_round
        page = Int32(-1)
        if key >= 0 and key < end and key < self.num_rows:
            index, _ = divmod(self.row_of(key), self.pages.boxes_per_page)
            page = self.row[index]
        if page >= self.pages.num_pages:
            page = Int32(-1)
        return page

    def find(self, key: Int32) -> tuple[Int32]:
        """The page of the lane's row in the first round of the tile from `key` on."""
        return (self.page_of(key, key + self.cfg.tile_n),)

    @cute.jit
    def address(self, key: Int32, page: Int32) -> Int64:
        """Of the lane's row of the round from `key` on, which lies in `page`; 0 if it is not to be read."""
        row = self.row_of(key + cute.arch.lane_idx() % self.rows_of_round)
        _, within = divmod(row, self.pages.boxes_per_page)
        address = Int64(0)
        if page >= 0:
            address = Int64(self.pool[within, None, page].iterator.toint())
        return address

    @cute.jit
    def copy(self, slot: pipeline.PipelineProducer.ImmutableResourceHandle, key: Int32, found: tuple[Int32]):
        """Start to fill a slot that was acquired with the tile that was found; it is full once all rows are there."""
        page, rows, end = found[0], self.rows_of_round, key + self.cfg.tile_n
        lanes = LanesOfRow.create(self.ring[None, None, slot.index])
        row_bytes = self.pool.shape[1] * self.pool.element_type.width // 8 if self.cfg.is_padded else None
        for i in cutlass.range(self.cfg.tile_n // rows, unroll=1):
            first = key + i * rows
            address = self.address(first, page)
            page = self.page_of(first + rows, end)
            lanes.copy_round(address, i * rows, rows, row_bytes)
        slot.commit()


@dataclass(frozen=True)
class LanesOfRow:
    """Where the lane writes. Lanes that share a row write a stretch of it (smem_ring) at once.

    per_row    lanes that share a row
    starts     the rows that the lane writes, as far as the swizzle tells them apart
    """
    per_row: Constexpr
    num_stretches: Constexpr
    starts: tuple

    @staticmethod
    def create(slot: cute.Tensor) -> "LanesOfRow":
        """In a slot (tile_n, columns)."""
        row_bytes = cute.size(slot, mode=[1]) * slot.element_type.width // 8
        width = math.gcd(128, row_bytes)
        per_row = width // PIECE_BYTES
        row, first_byte = cute.arch.lane_idx() // per_row, cute.arch.lane_idx() % per_row * PIECE_BYTES
        starts = tuple(SwizzledRow.create(slot, row + first, first_byte)
                       for first in range(0, ROWS_OF_ATOM, WARP // per_row))
        return LanesOfRow(per_row, row_bytes // width, starts)

    @cute.jit
    def copy_round(self, address: Int64, first_row: Int32, num_rows: Constexpr[int], row_bytes: Optional[Int32]):
        """Start to bring num_rows rows to the slot's rows from first_row on, a multiple of 8; lane j knows the address
        of row j.

        row_bytes   that there are of a row, zeros behind them; None: as many as a slot's row has
        """
        lane, rows_at_once = cute.arch.lane_idx(), WARP // self.per_row
        for i in cutlass.range_constexpr(num_rows // rows_at_once):
            source = cute.arch.shuffle_sync(address, i * rows_at_once + lane // self.per_row)
            num_bytes = Int32(PIECE_BYTES) if source != 0 else Int32(0)
            start = self.starts[i % len(self.starts)]
            for stretch in cutlass.range_constexpr(self.num_stretches):
                offset = stretch * self.per_row * PIECE_BYTES
                whole_atoms = i * rows_at_once // ROWS_OF_ATOM * ROWS_OF_ATOM
                target = start.pointer(Uint8, offset, first_row + whole_atoms)
                piece_bytes = num_bytes
                if const_expr(row_bytes is not None):
                    piece_bytes = num_bytes if offset + lane % self.per_row * PIECE_BYTES < row_bytes else Int32(0)
                piece = cute.make_ptr(Uint8, source + offset + lane % self.per_row * PIECE_BYTES,
                                      cute.AddressSpace.gmem, assumed_align=PIECE_BYTES)
                primitives.cp_async_shared_global(target.llvm_ptr, piece.llvm_ptr, PIECE_BYTES,
                                                  "cg", cp_size=piece_bytes)


def row_source_of(cfg: KernelConfig, op: RowOperand, ring: cute.Tensor, tile: Tile, pages: Pages,
                  table_row: Int32) -> RowSource:
    """The rows that `tile` reads."""
    pool = op.tensor[None, None, tile.kv_head, None]
    first_row = tile.offset_k if cfg.has_leftpad else None
    return RowSource(cfg, pool, ring, pages.table[table_row, None], pages, tile.seqlen_k, first_row)
