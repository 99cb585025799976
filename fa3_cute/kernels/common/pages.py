"""K and V in pages: TMA boxes of page_box rows, each from the page that the sequence's row of the table names.

A tile is tile_n / page_box boxes. Lane i of the load warp finds the page of box i, one division and one read of the
table; then one lane starts the copies, box by box. Boxes behind the used rows, and ids that name no page, go to a page
past the pool: TMA fills with zeros what it cannot read and counts all bytes, so that rings and consumers see full
tiles. Table entries behind the used pages are not read.

A narrow box is one copy per stretch of columns (layout.smem_ring). A wide box is one copy for all of them: shared
memory then has the stretches of 8 rows together, and the descriptor's dimensions are (8 rows, groups of 8 rows,
columns of a stretch, stretches, heads and pages in one), for TMA has five.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from ...planning.config import KernelConfig
from .arithmetic import ceil_div
from .layout import ROWS_OF_ATOM, smem_ring, stored_type, stretch_of, tensor_view
from .tiles import Tile
from .tma import tma_views

Divisor = cute.FastDivmodDivisorV2
INTS_PER_LINE = 32              # 128 bytes
MAX_PAGES_OF_ROW = 1 << 30      # of the table; a sequence's used pages are fewer


@dataclass(frozen=True)
class PagedOperand:
    """TmaOperand of a pool; heads: steps of the last coordinate from a page to the next, of wide boxes."""
    atom: cute.CopyAtom
    tensor: cute.Tensor
    heads: Optional[Int32]


@dataclass(frozen=True)
class Pages:
    """A pool of pages and the table that names each sequence's.

    table            (sequences, pages) int32
    boxes_per_page   page_size / page_box, of rows where TMA has no boxes for pages
    """
    table: cute.Tensor
    num_pages: Int32
    boxes_per_page: Divisor

    @staticmethod
    def create(cfg: KernelConfig, a) -> "Pages":
        """From a kernel's arguments, on the host."""
        layout = cute.make_layout((a.batch_size_k, MAX_PAGES_OF_ROW), stride=(a.page_table_batch_stride, 1))
        return Pages(cute.make_tensor(a.page_table, layout), a.num_pages, Divisor(a.page_size // cfg.page_box))

    @cute.jit
    def prefetch(self, cta: Int32):
        """A CTA's part of the table to L2, before anything is known: the CTAs together bring all of a table of usual
        size while each reads the lengths."""
        line = (Int64(cta) * 32 + cute.arch.lane_idx()) * INTS_PER_LINE
        if line < Int64(self.table.shape[0]) * self.table.stride[0] and cute.arch.warp_idx() == 0:
            cute.arch.prefetch((self.table.iterator + line).llvm_ptr, cache_level="L2")


def paged_operand(cfg: KernelConfig, a, name: str, extent: Int32, columns: int) -> PagedOperand:
    """Boxes of a pool, a kernel's argument `name`: (row of a page, column, head, page), or as wide boxes have it, in
    which the pool has as many columns as the tile.

    extent, columns   of the pool; of the tile
    """
    heads = None
    if cfg.box_is_wide:
        stretch = stretch_of(stored_type(cfg), columns)
        row, head = (cute.assume(getattr(a, f"{name}_{of}_stride"), divby=8) for of in ("row", "head"))
        heads = Int32(getattr(a, f"{name}_batch_stride") // getattr(a, f"{name}_head_stride"))
        pool = cute.make_tensor(getattr(a, name), cute.make_layout(
            ((ROWS_OF_ATOM, a.page_size // ROWS_OF_ATOM), (stretch, columns // stretch), a.num_pages * heads),
            stride=((row, row * ROWS_OF_ATOM), (1, stretch), head)))
    else:
        pool = tensor_view(a, name, (a.page_size, extent, a.num_heads_k, a.num_pages))
    box = cute.select(ring_of_boxes(cfg, cfg.page_box, columns, 1), mode=[0, 1])
    op = cpasync.CopyBulkTensorTileG2SOp()
    return PagedOperand(*cpasync.make_tiled_tma_atom(op, pool, box, (cfg.page_box, columns)), heads)


def ring_of_boxes(cfg: KernelConfig, rows: int, columns: int, num_slots: int) -> cute.ComposedLayout:
    """smem_ring, in the order that the config's boxes need."""
    return smem_ring(stored_type(cfg), rows, columns, num_slots, has_columns_first=cfg.box_is_wide)


@dataclass(frozen=True)
class PagedSource:
    """K or V of one KV head and sequence, in pages. A tile starts at a multiple of page_box.

    gmem        (box, box of a page, page) in TMA's coordinates
    smem        (box, box of a tile, slot)
    row         of the table
    num_boxes   that hold used rows
    """
    cfg: Constexpr
    op: PagedOperand
    gmem: cute.Tensor
    smem: cute.Tensor
    row: cute.Tensor
    pages: Pages
    num_boxes: Int32
    policy: Optional[Int64]

    @cute.jit
    def find(self, key: Int32) -> tuple[Int32, Int32]:
        """(page, box in it) of the lane's box of the tile from `key` on."""
        lane = cute.arch.lane_idx()
        box = key // self.cfg.page_box + lane
        index, within = divmod(box, self.pages.boxes_per_page)
        page = self.pages.num_pages
        if lane < self.cfg.tile_n // self.cfg.page_box and box >= 0 and box < self.num_boxes:
            page = self.row[index]
        if page < 0 or page > self.pages.num_pages:
            page = self.pages.num_pages
        return page, within

    @cute.jit
    def copy(self, slot: pipeline.PipelineProducer.ImmutableResourceHandle, key: Int32, found: tuple[Int32, Int32]):
        """Start to fill a slot that was acquired with the tile that was found; zeros where there is no page."""
        for i in cutlass.range_constexpr(self.cfg.tile_n // self.cfg.page_box):
            page, within = (cute.arch.shuffle_sync(value, i) for value in found)
            if const_expr(self.cfg.box_is_wide):
                page = page * self.op.heads
            cute.copy(self.op.atom, self.gmem[None, within, page], self.smem[None, i, slot.index],
                      tma_bar_ptr=slot.barrier, cache_policy=self.policy)


def paged_source_of(cfg: KernelConfig, op: PagedOperand, ring: cute.Tensor, tile: Tile, policy: Optional[Int64],
                    pages: Pages, table_row: Int32) -> PagedSource:
    """The pages that `tile` reads."""
    if cfg.box_is_wide:
        pool = cute.domain_offset((0, 0, tile.kv_head), op.tensor)
    else:
        pool = op.tensor[None, None, tile.kv_head, None]
    box = (cfg.page_box, cute.size(ring, mode=[1]))
    smem, gmem = tma_views(op, cute.local_tile(pool, box, (None, 0, None)), cute.local_tile(ring, box, (None, 0, None)))
    num_boxes = ceil_div(tile.seqlen_k, cfg.page_box)
    return PagedSource(cfg, op, gmem, smem, pages.table[table_row, None], pages, num_boxes, policy)
