"""Which queries see the keys that a thread holds, in a tile of S^T."""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.backward import GradientFields
from ..common.arithmetic import maximum, minimum
from ..common.block_range import Window
from ..common.layout import ROW_STEP, as_rows_cols, col_offset, fragment_col, fragment_row, unhoisted
from .blocks import KeyTile

NEVER = 1 << 30     # a query behind all


@dataclass(frozen=True)
class KeyMask:
    """Visibility from one thread's point of view: S^T has keys as rows and queries as columns.

    Queries behind the last need no test: their shift is -inf (prepare.py).
    """
    cfg: Constexpr
    window: Window
    tile: KeyTile
    first_key: Int32       # this thread's first key, of the sequence
    first_col: Int32       # and its first column of a Q tile
    chunks: Optional[tuple[Int32, Int32]]     # first keys of its keys' chunks; None unless cfg.has_chunks

    @staticmethod
    def create(cfg: GradientFields, window: Window, tile: KeyTile, tidx: Int32) -> "KeyMask":
        """Of consumer thread `tidx`."""
        row = fragment_row(unhoisted(tidx) if cfg.is_dq_behind else tidx)    # else held in a register beside the key
        key, chunks = tile.n_block * cfg.tile_n + row, None
        if cfg.has_chunks:
            chunks = window.chunk_start(key), window.chunk_start(key + ROW_STEP)
        return KeyMask(cfg, window, tile, key, fragment_col(tidx), chunks)

    def to_diagonal(self, r: int, m_block: Int32) -> Int32:
        """Columns from the thread's first in Q tile m_block to the one whose query has its diagonal at the r-th key."""
        origin = m_block * self.cfg.tile_m + self.first_col
        return self.first_key + r * ROW_STEP - self.tile.seqlen_k + self.tile.seqlen_q - origin

    @cute.jit
    def apply(self, acc_S: cute.Tensor, m_block: Int32):
        """acc_S[j, i] = -inf where query i of Q tile m_block does not see key j."""
        S = as_rows_cols(acc_S)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            key = self.first_key + r * ROW_STEP
            diagonal = self.to_diagonal(r, m_block)
            start = Int32(-NEVER)               # the columns [start, end) see the key
            if const_expr(self.cfg.mask != "full"):
                start = diagonal - (self.window.right if self.cfg.is_local else 0)
            if const_expr(self.cfg.is_local):
                end = diagonal + self.window.left + 1
            if const_expr(self.cfg.has_chunks):
                start = maximum(start, diagonal - key + self.chunks[r])
                end = minimum(end, diagonal - key + self.chunks[r] + self.window.chunk)
            if key >= self.tile.seqlen_k:
                start = Int32(NEVER)
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                is_visible = start <= col_offset(c)
                if const_expr(self.cfg.is_local):
                    is_visible = is_visible & (end > col_offset(c))
                S[r, c] = S[r, c] if is_visible else -Float32.inf


@dataclass(frozen=True)
class RowMask:
    """The same where S has queries as rows and keys as columns."""
    cfg: Constexpr
    window: Window
    tile: KeyTile
    first_row: Int32       # this thread's first row of a Q tile
    first_key: Int32       # and the key of its first column, of the sequence

    @staticmethod
    def create(cfg: GradientFields, window: Window, tile: KeyTile, tidx: Int32) -> "RowMask":
        """Of thread `tidx` of the warpgroup."""
        return RowMask(cfg, window, tile, fragment_row(unhoisted(tidx)), tile.n_block * cfg.tile_n + fragment_col(tidx))

    @cute.jit
    def apply(self, acc_S: cute.Tensor, m_block: Int32, first: Constexpr[int] = 0):
        """acc_S[i, j] = -inf where query i of Q tile m_block does not see key j."""
        first_key = self.first_key + first
        S, tile = as_rows_cols(acc_S), self.tile
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            query = m_block * self.cfg.tile_m + self.first_row + r * ROW_STEP
            diagonal = query + tile.seqlen_k - tile.seqlen_q - first_key
            end = tile.seqlen_k - first_key           # it sees the columns [start, end)
            if const_expr(self.cfg.mask != "full"):
                end = minimum(end, diagonal + 1 + (self.window.right if self.cfg.is_local else 0))
            if const_expr(self.cfg.is_local):
                start = diagonal - self.window.left
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                is_visible = end > col_offset(c)
                if const_expr(self.cfg.is_local):
                    is_visible = is_visible & (start <= col_offset(c))
                S[r, c] = S[r, c] if is_visible else -Float32.inf
