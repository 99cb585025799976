"""Q in the registers of QK's A operand, where K is widened to FP16 (`cfg.has_q_in_registers`).

FP16 has no number above 65504 and few bits below 2^-14; BF16 goes from 2^-133 to 2^128. But a row of Q may be
multiplied with a power of two, which its scores' factor takes back: each becomes one whose largest element lies in
[2^13, 2^14).
What is then a normal FP16 number, down to 2^-27 of the largest, keeps all its bits, and what is smaller is off by 2^-38
of the largest at most. FP32 holds the scores, |S| < 2^14 * 448 * head_dim, and neither factor is subnormal or infinite.
"""
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ...planning.config import DecodeConfig
from ..common.arithmetic import maximum, minimum
from ..common.layout import ROW_STEP, convert, fragment_row
from ..common.softmax import THREADS_PER_ROW
from .bundles import DecodeParams
from .split import SplitWork

ROWS = 2              # of a thread
EXPONENT_BIAS = 127   # of FP32, and of BF16, which is its upper half
MANTISSA_BITS = 23
TOP_EXPONENT = 13     # of a row's largest element in FP16
MAX_STEPS = 126       # FP32 has 2^126 and its inverse, both normal: rows below 2^-113 end below TOP_EXPONENT


@cute.jit
def read_Q_as_operand(cfg: DecodeConfig, params: DecodeParams, tSrQ: cute.Tensor, work: SplitWork,
                      tidx: Int32) -> Optional[cute.Tensor]:
    """The rows of Q that exist, from global memory to registers, two columns at a time; zeros in the other rows.
    Returns what the scores of the thread's rows are to be multiplied with; None: nothing.

    tSrQ   ((2, 2, 2), 1, dim_qk / 16): of 16 columns, pairs, a row and ROW_STEP further down, and 8 columns further on
    Runs on: the consumers.
    """
    pairs = cute.recast_tensor(cute.coalesce(tSrQ), Int32)
    pairs.fill(0)
    packed_heads = params.grid.packed_heads
    for r in cutlass.range_constexpr(ROWS):
        row = fragment_row(tidx) + ROW_STEP * r
        if row < work.num_rows:
            query, head = divmod(work.tile.m_block * cfg.tile_m + row, packed_heads)
            mQ = params.mQ[work.tile.offset_q + query, None, work.tile.head + head, work.tile.batch]
            stored = cute.recast_tensor(mQ, Int32)
            for i in cutlass.range_constexpr(cute.size(pairs) // ROWS):
                pairs[ROWS * i + r] = stored[4 * i + tidx % 4]
    factors = None
    if const_expr(cfg.gemm_dtype != cfg.dtype):
        factors = scale_rows(pairs, tSrQ)
    return factors


@cute.jit
def scale_rows(pairs: cute.Tensor, tSrQ: cute.Tensor) -> cute.Tensor:
    """BF16 pairs -> FP16 in the same registers, each row times a power of two. Returns what takes that back, per row.

    Inf and NaN stay, and the other elements of such a row may become 0: its scores are Inf or NaN without them.
    Synchronises: the lanes that share a row.
    """
    factors, scaled = cute.make_rmem_tensor(ROWS, Float32), cute.make_rmem_tensor(2 * cute.size(pairs), Float32)
    for r in cutlass.range_constexpr(ROWS):
        steps = steps_of(pairs, r)
        factors[r] = power_of_two(-steps)
        for i in cutlass.range_constexpr(r, cute.size(pairs), ROWS):
            scaled[2 * i] = (pairs[i] << 16).bitcast(Float32) * power_of_two(steps)
            scaled[2 * i + 1] = (pairs[i] & -(1 << 16)).bitcast(Float32) * power_of_two(steps)
    convert(scaled, tSrQ)
    return factors


@cute.jit
def steps_of(pairs: cute.Tensor, r: int) -> Int32:
    """The power of two for the thread's r-th row. Without their signs, bits of floats order as the floats do, NaN last;
    below those of the upper number of a pair lie the lower one's, which decide no exponent."""
    largest = Int32(0)
    for i in cutlass.range_constexpr(r, cute.size(pairs), ROWS):
        both = pairs[i] & 0x7FFF7FFF
        largest = maximum(largest, maximum(both, both << 16))
    for i in cutlass.range_constexpr(THREADS_PER_ROW.bit_length() - 1):
        largest = maximum(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << i))
    return minimum(EXPONENT_BIAS + TOP_EXPONENT - (largest >> MANTISSA_BITS), MAX_STEPS)


def power_of_two(exponent: Int32) -> Float32:
    """2^exponent, exactly: -MAX_STEPS to MAX_STEPS."""
    return ((exponent + EXPONENT_BIAS) << MANTISSA_BITS).bitcast(Float32)
