"""What becomes of S on the way to P, and what dP - D is multiplied with: the one place where softcap and ALiBi are.

    x  = S, with softcap tanh(softmax_scale S / softcap)
    P  = exp(softmax_scale x - slope |distance from the diagonal| - LSE), with softcap softcap x
    dR = W (dP - D), the gradient of softmax_scale S      W = P, with softcap P (1 - x^2)

Without softcap S starts at -LSE / softmax_scale, as it does without any of this; with it S starts at 0, and the shift
is added behind the tanh. The mask comes between x and P: it writes -inf, of which the tanh would be a score like others.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.backward import BackwardConfig
from ..common.arithmetic import LOG2_E
from ..common.layout import CONVERT_CHUNK, col_offset
from ..common.scores import tanh


@dataclass(frozen=True)
class Scores:
    """Run-time values of a launch; exponents are to the base 2.

    factor    what x is multiplied with in the exponent
    to_tanh   softmax_scale / softcap
    slopes    (head, sequence) f32, of ALiBi
    """
    factor: Float32
    to_tanh: Optional[Float32]
    slopes: Optional[cute.Tensor]

    @staticmethod
    def create(cfg: BackwardConfig, a) -> Optional["Scores"]:
        """From a kernel's arguments, on the host; None of kernels that leave scores as they are."""
        if not cfg.transforms_scores:
            return None
        slopes = None
        if cfg.has_alibi:
            slopes = cute.make_tensor(a.alibi_slopes, cute.make_layout(
                (a.num_heads, a.batch_size), stride=(1, a.alibi_batch_stride)))
        unit = a.softcap if cfg.has_softcap else a.softmax_scale
        return Scores(unit * LOG2_E, a.softmax_scale / a.softcap if cfg.has_softcap else None, slopes)

    def slope_of(self, head: Int32, sequence: Int32) -> Float32:
        """Of the exponent."""
        return self.slopes[head, sequence] * LOG2_E

    @cute.jit
    def cap(self, acc_S: cute.Tensor):
        """S -> x in place."""
        if const_expr(self.to_tanh is not None):
            for i in cutlass.range_constexpr(cute.size(acc_S)):
                acc_S[i] = tanh(acc_S[i] * self.to_tanh)


@dataclass(frozen=True)
class Exponents:
    """Of one thread's scores in one tile: what makes P of x.

    row_shift       of each row that is a query, for the base 2; None where columns are queries
    column_shift    of columns that are queries, (2, pairs of columns) in shared memory, to be multiplied with
                    shift_factor; None where S has started at it
    slope           of ALiBi, and of each row the column on its diagonal, counted from the thread's first; None without
    """
    cfg: Constexpr
    factor: Float32
    row_shift: Optional[cute.Tensor] = None
    column_shift: Optional[cute.Tensor] = None
    shift_factor: Optional[Float32] = None
    slope: Optional[Float32] = None
    to_diagonal: Optional[tuple[Float32, Float32]] = None

    def shifts_of(self, first: int) -> Optional[list[Float32]]:
        """Of the CONVERT_CHUNK elements from the first on: where columns are queries those of the two pairs of columns.
        They are read here, chunk by chunk: all of them are registers that some kernels do not have."""
        if self.column_shift is None:
            return None
        values = cute.make_rmem_tensor((2, CONVERT_CHUNK // 4), Float32)
        for pair in range(CONVERT_CHUNK // 4):
            cute.autovec_copy(self.column_shift[None, first // 4 + pair], values[None, pair])
        return [values[i % 2, i // 2] * self.shift_factor for i in range(CONVERT_CHUNK // 2)]

    def of(self, x: Float32, r: int, c: int, shifts: Optional[list[Float32]]) -> Float32:
        """Of one score."""
        found = x * self.factor
        if self.row_shift is not None:
            found = found + self.row_shift[r]
        if shifts is not None:
            found = found + shifts[c % (CONVERT_CHUNK // 2)]
        if self.slope is not None:
            found = found - self.slope * cute.math.absf(self.to_diagonal[r] - float(col_offset(c)))
        return found

    @cute.jit
    def make_P(self, acc_S: cute.Tensor, rP: Optional[cute.Tensor]):
        """x -> W in place, in FP32; P, rounded, to rP. Without rP there is P alone, in place."""
        has_slope = self.cfg.has_softcap and rP is not None
        flat = None if rP is None else cute.coalesce(rP)
        for first in cutlass.range_constexpr(0, cute.size(acc_S), CONVERT_CHUNK):
            part, shifts = cute.make_rmem_tensor(CONVERT_CHUNK, Float32), self.shifts_of(first)
            for j in cutlass.range_constexpr(CONVERT_CHUNK):
                i = first + j
                x = acc_S[i]
                part[j] = cute.math.exp2(self.of(x, i // 2 % 2, 2 * (i // 4) + i % 2, shifts), fastmath=True)
                acc_S[i] = part[j]
                if const_expr(has_slope):
                    # 0 and not -inf of what the mask hides, whose P is 0.
                    acc_S[i] = part[j] * cute.arch.fmax(1.0 - x * x, Float32(0.0))
            if const_expr(rP is not None):
                rounded = cute.make_tensor(flat.iterator + first, cute.make_layout(CONVERT_CHUNK))
                rounded.store(part.load().to(rP.element_type))
