"""The end of a row: the last factor of O and the last terms of its denominator, each applied exactly once.

Without splits a row ends here. With splits each ends here for itself, and the row in decode's `Merge.finish`
(decode/merge.py): a term that belongs to the whole row, as a sink does, enters there and not in every split.
"""
import math
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from .layout import as_rows_cols
from .softmax import THREADS_PER_ROW, OnlineSoftmax


@cute.jit
def end_rows(softmax: OnlineSoftmax, acc_O: cute.Tensor, value_factor: Optional[Float32] = None):
    """O *= value_factor / row_sum, and row_sum becomes LSE = ln(sum exp(softmax_scale * score)).

    A row that saw no key has the sum 0: its O is 0 and its LSE -inf. A NaN sum stays NaN in both.
    """
    O = as_rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(softmax.row_sum)):
        total = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=THREADS_PER_ROW)
        is_empty = total == 0.0
        inverse = Float32(0.0) if is_empty else cute.arch.rcp_approx(total)
        if const_expr(value_factor is not None):
            inverse = inverse * value_factor
        O[r, None].store(O[r, None].load() * inverse)
        log2_sum = cute.math.log2(total, fastmath=True)
        if const_expr(softmax.p_scale_log2 != 0):
            log2_sum = log2_sum - softmax.p_scale_log2
        lse = (softmax.row_max[r] * softmax.scale_of(r) + log2_sum) * math.log(2.0)
        softmax.row_sum[r] = -Float32.inf if is_empty else lse


@cute.jit
def end_rows_without_keys(softmax: OnlineSoftmax, acc_O: cute.Tensor):
    """The state of `end_rows` for a tile that no key reaches: O = 0 and LSE = -inf."""
    acc_O.fill(0.0)
    softmax.row_sum.fill(-Float32.inf)
