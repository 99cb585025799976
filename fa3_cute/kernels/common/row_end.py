"""The end of a row: the last factor of O and the last terms of its denominator, each applied exactly once.

Without splits a row ends here. With splits each ends here for itself, and the row in decode's `Merge.finish`
(decode/merge.py): a sink belongs to the whole row, so it enters there and not in every split.
"""
import math
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr

from ...contract.params import DataType
from .arithmetic import LOG2_E
from .layout import as_rows_cols
from .softmax import THREADS_PER_ROW, OnlineSoftmax
from .tiles import Tile

SINK_TYPES = {DataType.FP16: Float16, DataType.BF16: BFloat16, DataType.FP32: Float32}


@dataclass(frozen=True)
class Sinks:
    """Attention sinks: [num_heads] logits in natural units, of one more key per head whose value is 0.

    address   0: there are none
    kind      a DataType: of an element
    """
    address: Int64
    kind: Int32

    @staticmethod
    def create(a) -> "Sinks":
        """From a kernel's arguments."""
        return Sinks(Int64(a.s_aux.toint()), a.s_aux_dtype)

    @cute.jit
    def of(self, tile: Tile, head: Int32) -> Float32:
        """Of a head, -inf without sinks, and of rows that only are to be filled (RaggedBatch.place)."""
        sink = -Float32.inf
        if self.address != 0 and tile.seqlen_k >= 0:
            sink = self.read(head)
        return sink

    @cute.jit
    def read(self, head: Int32) -> Float32:
        """Of a head, where there are sinks."""
        sink = -Float32.inf
        for kind, element in SINK_TYPES.items():
            if self.kind == kind:
                sink = Float32(cute.make_tensor(self.pointer(element), cute.make_layout(1 << 16))[head])
        return sink

    def pointer(self, element) -> cute.Pointer:
        """To the first one."""
        return cute.make_ptr(element, self.address, cute.AddressSpace.gmem, assumed_align=element.width // 8)


@cute.jit
def with_sink(top: Float32, total: Float32, sink: Float32) -> tuple[Float32, Float32, Float32]:
    """(top, total, factor): a row's maximum, in natural units, and sum of e^(score - maximum) once a sink above -inf
    has joined; what the sum of values is to be multiplied with then, before the division."""
    is_empty = total == 0.0
    old = -Float32.inf if is_empty else top
    new = cute.arch.fmax(old, sink)
    factor = cute.math.exp2((old - new) * LOG2_E, fastmath=True)
    below = Float32(0.0) if sink == new else sink - new     # of a sink of +inf the difference is NaN
    return new, total * factor + cute.math.exp2(below * LOG2_E, fastmath=True), factor


@cute.jit
def end_rows(softmax: OnlineSoftmax, acc_O: cute.Tensor, value_factor: Optional[Float32] = None,
             sinks: Optional[cute.Tensor] = None):
    """O *= value_factor / row_sum, and row_sum becomes LSE = ln sum exp(score), natural units.

    A row that saw no key has the sum 0: its O is 0 and its LSE -inf. A NaN sum stays NaN in both.
    sinks   of each row, natural units
    """
    O = as_rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(softmax.row_sum)):
        total = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=THREADS_PER_ROW)
        top, last_factor = softmax.row_max[r] * softmax.scale_of(r), Float32(1.0)
        if const_expr(softmax.p_scale_log2 != 0):
            top = top - softmax.p_scale_log2
        top = top * math.log(2.0)    # and not the sink in units of log2(e), where a finite one may be infinite
        if const_expr(sinks is not None):
            if sinks[r] != -Float32.inf:
                top, total, last_factor = with_sink(top, total, sinks[r])
        is_empty = total == 0.0
        inverse = Float32(0.0) if is_empty else cute.arch.rcp_approx(total)
        if const_expr(sinks is not None):
            inverse = inverse * last_factor
        if const_expr(value_factor is not None):
            inverse = inverse * value_factor
        O[r, None].store(O[r, None].load() * inverse)
        lse = top + cute.math.log2(total, fastmath=True) * math.log(2.0)
        softmax.row_sum[r] = -Float32.inf if is_empty else lse


@cute.jit
def end_rows_without_keys(softmax: OnlineSoftmax, acc_O: cute.Tensor, sinks: Optional[cute.Tensor] = None):
    """The state of `end_rows` for a tile that no key reaches: O = 0, and LSE = -inf but for sinks."""
    acc_O.fill(0.0)
    softmax.row_sum.fill(-Float32.inf)
    if const_expr(sinks is not None):
        softmax.row_sum.store(sinks.load())
