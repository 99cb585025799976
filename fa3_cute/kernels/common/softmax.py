"""Online softmax over the K/V tiles of one Q tile (Milakov & Gimelshein 2018; FA3 paper, algorithm 1, lines 9-13).

row_max    running maximum of the raw scores
row_sum    running sum of exp2(scale_log2 * (score - row_max)), per thread until the row's end (row_end.py)
row_scale  what O must still be multiplied with since row_max last moved

P and row_sum are 2^p_scale_log2 times as large (fp8.py).
"""
import enum
import math
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr

from ...planning.config import KernelConfig
from .arithmetic import maximum
from .fp8 import p_scale_log2
from .layout import as_rows_cols

THREADS_PER_ROW = 4   # of a WGMMA accumulator
LOWEST = -(2.0 ** 126)   # that is subtracted from scores


class Scores(enum.Enum):
    """What is known of the scores of a K/V tile."""
    FIRST = enum.auto()         # no tile came before
    ANY = enum.auto()
    NONNEGATIVE = enum.auto()   # every row has a maximum of 0 or more already


def max_of_bits(row: cute.TensorSSA, nonnegative: Float32) -> Float32:
    """The largest of a row and a number that is not negative, by integer maxima of their bits.

    sm_90 takes the maximum of three integers in one instruction, but of two floats. Bits of floats order as the floats
    do, except that negative ones order the other way round: here none of them can be the largest.
    """
    bits, largest = row.bitcast(Int32), nonnegative.bitcast(Int32)
    for i in range(0, cute.size(row.shape), 2):
        largest = maximum(largest, maximum(bits[i], bits[i + 1]))
    return largest.bitcast(Float32)


def by_head(cfg: KernelConfig, num_rows: int, value: Float32) -> cute.Tensor:
    """What depends on the head: a register, or one per row if the rows of a tile belong to several heads."""
    values = cute.make_rmem_tensor(num_rows if cfg.packs_heads else 1, Float32)
    values.fill(value)
    return values


@dataclass
class OnlineSoftmax:
    """State of the rows that one thread holds (two per WGMMA)."""
    scale_log2: Float32 | cute.Tensor
    row_max: cute.Tensor
    row_sum: cute.Tensor
    row_scale: cute.Tensor
    num_used: Optional[Int32]
    p_scale_log2: Constexpr
    is_natural: Constexpr

    @staticmethod
    def create(cfg: KernelConfig, scale_log2: Float32, num_rows: int,
               num_used: Optional[Int32] = None) -> "OnlineSoftmax":
        """Before the first tile; `update` initialises the rows with its scores.

        scale_log2 of the scores; of raw ones of FP8 keys they are set for each tile of O (`by_head`)
        num_used   how many of the thread's rows exist, the same in the whole warp; the others are left out, and what
                   becomes of them is undefined. None: all of them.
        """
        row_max, row_sum, row_scale = (cute.make_rmem_tensor(num_rows, Float32) for _ in range(3))
        if cfg.has_descales and not cfg.transforms_scores:
            scale_log2 = by_head(cfg, num_rows, scale_log2)
        return OnlineSoftmax(scale_log2, row_max, row_sum, row_scale, num_used, p_scale_log2(cfg),
                             cfg.has_natural_scores)

    def scale_of(self, r: int) -> Float32:
        """scale_log2 of one row."""
        if not isinstance(self.scale_log2, cute.Tensor):
            return self.scale_log2
        return self.scale_log2[r % cute.size(self.scale_log2)]

    @cute.jit
    def update(self, acc_S: cute.Tensor, scores: Constexpr[Scores]):
        """Scores -> unnormalised probabilities, in place; moves row_max and row_sum, sets row_scale."""
        S = as_rows_cols(acc_S)
        old_max = cute.make_rmem_tensor_like(self.row_max)
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            old_max[r] = self.row_max[r]
            if const_expr(self.num_used is None):
                self.update_max(S, r, scores)
            elif r < self.num_used:
                self.update_max(S, r, scores)
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            if const_expr(self.num_used is None):
                self.exponentiate(S, r, scores, old_max[r])
            elif r < self.num_used:
                self.exponentiate(S, r, scores, old_max[r])

    @cute.jit
    def update_max(self, S: cute.Tensor, r: Constexpr[int], scores: Constexpr[Scores]):
        """row_max of one row."""
        row, new_max = S[r, None].load(), self.row_max[r]
        if const_expr(scores is Scores.NONNEGATIVE):
            new_max = max_of_bits(row, new_max)
        else:
            start = -Float32.inf if const_expr(scores is Scores.FIRST) else new_max
            new_max = row.reduce(cute.ReductionOp.MAX, start, 0)
        for i in cutlass.range_constexpr(int(math.log2(THREADS_PER_ROW))):
            new_max = cute.arch.fmax(new_max, cute.arch.shuffle_sync_bfly(new_max, offset=1 << i))
        self.row_max[r] = new_max

    @cute.jit
    def exponentiate(self, S: cute.Tensor, r: Constexpr[int], scores: Constexpr[Scores], old_max: Float32):
        """`update` for one row whose row_max has been moved from old_max."""
        scale, subtracted = self.scale_of(r), self.row_max[r]
        if const_expr(self.is_natural):
            # The lowest number of a format, which is added to hide a key, would overflow with the factor: NaN below.
            subtracted = cute.arch.fmax(subtracted, Float32(LOWEST))
        elif const_expr(scores is not Scores.NONNEGATIVE):
            # A row with no visible key so far: subtract 0 instead of -inf, since -inf - -inf is NaN.
            subtracted = Float32(0.0) if subtracted == -Float32.inf else subtracted
        top = subtracted * scale
        offset = top - self.p_scale_log2 if const_expr(self.p_scale_log2 != 0) else top
        probabilities = cute.math.exp2(S[r, None].load() * scale - offset, fastmath=True)
        tile_sum = probabilities.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
        if const_expr(scores is Scores.FIRST):
            self.row_scale[r] = Float32(1.0)
            self.row_sum[r] = tile_sum
        else:
            # Exactly 1 while the maximum stands, if the difference comes before the product. `top` is rounded: with
            # the product first the factor is off by up to 2^-21 in every tile, which moves LSE by 1e-4 over 2048 tiles
            # (O hardly: its weights share the factor). The exact form costs the forward kernel, whose rows see fewer
            # tiles, 4.5 % at head_dim 64 and 1.5 % at 128 (full, 16k tokens, H200, 2026-11-22).
            if const_expr(self.num_used is not None):
                exponent = (old_max - subtracted) * scale
            else:
                exponent = old_max * scale - top
            self.row_scale[r] = cute.math.exp2(exponent, fastmath=True)
            self.row_sum[r] = self.row_sum[r] * self.row_scale[r] + tile_sum
        S[r, None].store(probabilities)

    @cute.jit
    def is_nonnegative(self) -> Boolean:
        """Whether every row_max of the thread is +0 or more."""
        bits = Int32(0)
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            bits = bits | self.row_max[r].bitcast(Int32)
        return bits >= 0

    @cute.jit
    def rescale(self, acc_O: cute.Tensor):
        """Pay O the factor it is owed since the last update."""
        O = as_rows_cols(acc_O)
        for r in cutlass.range_constexpr(cute.size(self.row_scale)):
            if const_expr(self.num_used is None):
                O[r, None].store(O[r, None].load() * self.row_scale[r])
            elif r < self.num_used:
                O[r, None].store(O[r, None].load() * self.row_scale[r])

    @cute.jit
    def fold(self, acc_O: cute.Tensor, acc_T: cute.Tensor):
        """O = row_scale * O + T."""
        O, T = as_rows_cols(acc_O), as_rows_cols(acc_T)
        for r in cutlass.range_constexpr(cute.size(self.row_scale)):
            if const_expr(self.num_used is None):
                O[r, None].store(O[r, None].load() * self.row_scale[r] + T[r, None].load())
            elif r < self.num_used:
                O[r, None].store(O[r, None].load() * self.row_scale[r] + T[r, None].load())
