"""Set masked scores to -inf, in registers, before softmax."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from .layout import as_rows_cols, col_offset, fragment_col, fragment_row


@dataclass(frozen=True)
class Mask:
    """Which keys the rows of one Q tile see, from one thread's point of view.

    Causal needs no separate test against seqlen_k: no row below seqlen_q sees a key past it, and the rows past seqlen_q
    are never stored.
    """
    cfg: Constexpr
    first_col: Int32        # this thread's first column
    keys_of_first_row: Int32   # keys visible to this thread's first row: it sees key j iff j < keys_of_first_row

    @staticmethod
    def create(cfg, tidx: Int32, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> "Mask":
        """For consumer thread `tidx` and Q tile `m_block`."""
        keys = seqlen_k
        if cfg.is_causal:
            keys = m_block * cfg.tile_m + fragment_row(tidx) + 1 + seqlen_k - seqlen_q
        return Mask(cfg, fragment_col(tidx), keys)

    @cute.jit
    def apply(self, acc_S: cute.Tensor, n_block: Int32):
        """acc_S[i, j] = -inf where row i does not see key n_block * tile_n + j."""
        S = as_rows_cols(acc_S)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            limit = self.keys_of_first_row - n_block * self.cfg.tile_n - self.first_col
            if const_expr(self.cfg.is_causal):
                limit = limit + 8 * r
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if limit > col_offset(c) else -Float32.inf
