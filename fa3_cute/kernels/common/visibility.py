"""Which keys the rows of a Q tile see: the K/V tiles to visit, and the scores to set to -inf in those that need it.

Each is wrong without the other, so both come from one object. `tiles` walk downwards: those cut by the right end of
what the rows see, those that every row sees, which carry no mask code, those cut by the left end (BlockRange).
"""
from dataclasses import dataclass, replace
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.config import FwdConfig
from .arithmetic import maximum, minimum
from .block_range import BlockRange, Window, block_range, first_key, key_origin, warpgroup_range
from .layout import ROW_STEP, as_rows_cols, col_offset, fragment_col, fragment_row
from .tiles import Place, Tile


@dataclass(frozen=True)
class Visibility:
    """Of one Q tile; if cfg.packs_heads, packed_heads consecutive rows are heads of one query."""
    cfg: Constexpr
    window: Window
    tile: Tile
    packed_heads: Int32 | int = 1

    def tiles(self) -> BlockRange:
        """K/V tiles that hold a key visible to some row."""
        tile = self.tile
        return block_range(self.cfg, self.window, tile.m_block, tile.seqlen_q, tile.seqlen_k, self.packed_heads)

    def tiles_of_warpgroup(self, tiles: BlockRange, wg_idx: Int32) -> BlockRange:
        """Those among `tiles` that rows of one consumer warpgroup see."""
        tile = self.tile
        return warpgroup_range(self.cfg, self.window, tiles, tile.m_block, wg_idx, tile.seqlen_q, tile.seqlen_k)

    def of_thread(self, tidx: Int32) -> "Mask":
        """The keys that the rows of consumer thread `tidx` see."""
        first_row = fragment_row(tidx)
        row = self.tile.m_block * self.cfg.tile_m + first_row
        next_row = row + ROW_STEP
        if const_expr(self.cfg.packs_heads):
            row, next_row = row // self.packed_heads, next_row // self.packed_heads
        diagonals = tuple(i + self.tile.seqlen_k - self.tile.seqlen_q for i in (row, next_row))
        chunks = tuple(self.window.chunk_start(i) for i in diagonals) if const_expr(self.cfg.has_chunks) else None
        return Mask(self.cfg, self.window, self.tile, first_row, fragment_col(tidx), *diagonals,
                    self.first_visible(), chunks)

    def first_visible(self) -> Optional[Int32]:
        """The first key that some row sees, 0 or less if it is the sequence's first; None where all before it are keys
        like others: in pages they may be gone."""
        if not (self.cfg.is_local and self.cfg.page_box):
            return None
        first_row = self.tile.m_block * self.cfg.tile_m
        first_query = first_row // self.packed_heads if self.cfg.packs_heads else first_row
        return self.window.first_key(first_query - self.tile.seqlen_q + self.tile.seqlen_k)


def from_first_visible(cfg: FwdConfig, window: Window, tile: Tile) -> Tile:
    """The tile; of packed heads' windows, of the sequence without the keys before the first that some row sees.

    K/V tiles, which are counted from there, then hold as few keys that nobody sees as can be. Sequences end
    bottom-right aligned with their keys: without the first ones, the rows still see the same ones of the others.
    """
    if not (cfg.packs_heads and cfg.is_local):
        return tile
    origin = key_origin(cfg, window, tile.m_block, tile.seqlen_q, tile.seqlen_k)
    return replace(tile, offset_k=tile.offset_k + origin, seqlen_k=tile.seqlen_k - origin)


@dataclass(frozen=True)
class Mask:
    """Visibility from one thread's point of view.

    Causal needs no test against seqlen_k: no row below seqlen_q sees a key past it, and the rows past seqlen_q are
    never stored.
    """
    cfg: Constexpr
    window: Window
    tile: Tile
    first_row: Int32       # this thread's first row, of the tile
    first_col: Int32       # and its first column
    diagonal: Int32        # key on the diagonal of this thread's first row
    next_diagonal: Int32   # and of its second row; used if cfg.packs_heads
    first_visible: Optional[Int32]     # Visibility.first_visible
    chunks: Optional[tuple[Int32, Int32]]     # first keys of its rows' chunks; None unless cfg.has_chunks

    def query(self, r: int) -> Int32:
        """Index in its sequence of the thread's r-th row; the last one's of rows behind it."""
        diagonal = self.next_diagonal if self.cfg.packs_heads and r else self.diagonal + r * ROW_STEP
        return minimum(diagonal - self.tile.seqlen_k + self.tile.seqlen_q, self.tile.seqlen_q - 1)

    def origin(self, n_block: Int32) -> Int32:
        """The key of the thread's first column in a K/V tile."""
        return first_key(self.cfg, n_block) + self.first_col

    def to_diagonal(self, r: int, n_block: Int32) -> Int32:
        """Columns from the thread's first in a K/V tile to the one on the diagonal of its r-th row."""
        return self.diagonal + r * ROW_STEP - self.origin(n_block)

    def place(self, n_block: Int32) -> Place:
        """Of the thread's scores in a K/V tile."""
        next_diagonal = self.next_diagonal if self.cfg.packs_heads else self.diagonal + ROW_STEP
        return Place(self.tile, self.first_row, self.origin(n_block), (self.diagonal, next_diagonal))

    @cute.jit
    def apply(self, acc_S: cute.Tensor, n_block: Int32):
        """acc_S[i, j] = -inf where row i does not see the j-th key of K/V tile n_block."""
        S = as_rows_cols(acc_S)
        origin = self.origin(n_block)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            diagonal = self.diagonal + r * ROW_STEP
            if const_expr(self.cfg.packs_heads and r == 1):
                diagonal = self.next_diagonal
            end = self.tile.seqlen_k - origin         # a row sees the columns [start, end), counted from origin
            if const_expr(self.cfg.mask == "causal"):
                end = diagonal + 1 - origin
            if const_expr(self.cfg.is_local):
                end = minimum(end, diagonal + self.window.right + 1 - origin)
                start = diagonal - self.window.left - origin
            if const_expr(self.cfg.has_chunks):
                end = minimum(end, self.chunks[r] + self.window.chunk - origin)
                start = maximum(start, self.chunks[r] - origin)
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                is_visible = end > col_offset(c)
                if const_expr(self.cfg.is_local):
                    is_visible = is_visible & (start <= col_offset(c))
                S[r, c] = S[r, c] if is_visible else -Float32.inf
