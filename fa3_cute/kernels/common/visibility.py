"""Set masked scores to -inf, in registers, before softmax."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.config import KernelConfig
from .arithmetic import minimum
from .block_range import Window
from .layout import ROW_STEP, as_rows_cols, col_offset, fragment_col, fragment_row
from .tiles import Tile


@dataclass(frozen=True)
class Mask:
    """Which keys the rows of one Q tile see, from one thread's point of view.

    Causal needs no test against seqlen_k: no row below seqlen_q sees a key past it, and the rows past seqlen_q are
    never stored.
    """
    cfg: Constexpr
    window: Window
    first_col: Int32       # this thread's first column
    diagonal: Int32        # key on the diagonal of this thread's first row
    next_diagonal: Int32   # and of its second row; used if cfg.packs_heads
    seqlen_k: Int32

    @staticmethod
    def create(cfg: KernelConfig, window: Window, tidx: Int32, tile: Tile, packed_heads: Int32 = 1) -> "Mask":
        """For consumer thread `tidx`; if cfg.packs_heads, packed_heads consecutive rows are heads of one query."""
        row = tile.m_block * cfg.tile_m + fragment_row(tidx)
        next_row = row + ROW_STEP
        if const_expr(cfg.packs_heads):
            row, next_row = row // packed_heads, next_row // packed_heads
        to_diagonal = tile.seqlen_k - tile.seqlen_q
        return Mask(cfg, window, fragment_col(tidx), row + to_diagonal, next_row + to_diagonal, tile.seqlen_k)

    @cute.jit
    def apply(self, acc_S: cute.Tensor, n_block: Int32):
        """acc_S[i, j] = -inf where row i does not see key n_block * tile_n + j."""
        S = as_rows_cols(acc_S)
        origin = n_block * self.cfg.tile_n + self.first_col   # key of this thread's first column
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            diagonal = self.diagonal + r * ROW_STEP
            if const_expr(self.cfg.packs_heads and r == 1):
                diagonal = self.next_diagonal
            end = self.seqlen_k - origin            # a row sees the columns [start, end), counted from origin
            if const_expr(self.cfg.mask == "causal"):
                end = diagonal + 1 - origin
            if const_expr(self.cfg.is_local):
                end = minimum(end, diagonal + self.window.right + 1 - origin)
                start = diagonal - self.window.left - origin
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                is_visible = end > col_offset(c)
                if const_expr(self.cfg.is_local):
                    is_visible = is_visible & (start <= col_offset(c))
                S[r, c] = S[r, c] if is_visible else -Float32.inf
