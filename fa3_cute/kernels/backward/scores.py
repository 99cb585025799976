"""What becomes of S on the way to P, and what dP - D is multiplied with: the one place of softcap, ALiBi, attn_mask.

    x  = S, with softcap tanh(softmax_scale S / softcap)
    P  = exp(softmax_scale x + attn_mask - slope |distance from the diagonal| - LSE), with softcap softcap x
    dR = W (dP - D), the gradient of softmax_scale S      W = P, with softcap P (1 - x^2)

Without softcap S starts at -LSE / softmax_scale, as it does without any of this; with it S starts at 0, and the shift
is added behind the tanh. Masks come between x and P: they write -inf, of which the tanh would be a score like others.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, const_expr

from ...planning.backward import GradientFields
from ...planning.one_side import OneSideConfig
from ..common.arithmetic import LOG2_E, minimum
from ..common.layout import CONVERT_CHUNK, ROW_STEP, as_rows_cols, col_offset
from ..common.score_mask import MASK_TYPES, RowMask, ScoreMask
from ..common.scores import tanh
from ..common.visibility import Mask
from .visible import KeyMask


@dataclass(frozen=True)
class Scores:
    """Run-time values of a launch; exponents are to the base 2.

    factor    what x is multiplied with in the exponent
    to_tanh   softmax_scale / softcap
    slopes    (head, sequence) f32, of ALiBi
    mask      attn_mask
    """
    factor: Float32
    to_tanh: Optional[Float32]
    slopes: Optional[cute.Tensor]
    mask: Optional[ScoreMask]

    @staticmethod
    def create(cfg: GradientFields, a) -> Optional["Scores"]:
        """From a kernel's arguments, on the host; None of kernels that leave scores as they are."""
        if not (cfg.transforms_scores or cfg.attn_mask):
            return None
        slopes = None
        if cfg.has_alibi:
            slopes = cute.make_tensor(a.alibi_slopes, cute.make_layout(
                (a.num_heads, a.batch_size), stride=(1, a.alibi_batch_stride)))
        unit = a.softcap if cfg.has_softcap else a.softmax_scale
        return Scores(unit * LOG2_E, a.softmax_scale / a.softcap if cfg.has_softcap else None, slopes,
                      ScoreMask.create(cfg, a) if cfg.attn_mask else None)

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
    bias            (rows, columns) what attn_mask adds; None without
    """
    cfg: Constexpr
    factor: Float32
    row_shift: Optional[cute.Tensor] = None
    column_shift: Optional[cute.Tensor] = None
    shift_factor: Optional[Float32] = None
    slope: Optional[Float32] = None
    to_diagonal: Optional[tuple[Float32, Float32]] = None
    bias: Optional[cute.Tensor] = None

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
        if self.bias is not None:
            found = found + Float32(self.bias[r, c]) * LOG2_E
        if self.slope is not None:
            found = found - self.slope * cute.math.absf(self.to_diagonal[r] - float(col_offset(c)))
        return found

    @cute.jit
    def make_P(self, acc_S: cute.Tensor, has_slope: Constexpr[bool], rP: Optional[cute.Tensor] = None):
        """x -> W in place, in FP32, or P unless has_slope; P, rounded, to rP."""
        flat = None if rP is None else cute.coalesce(rP)
        for first in cutlass.range_constexpr(0, cute.size(acc_S), CONVERT_CHUNK):
            part, shifts = cute.make_rmem_tensor(CONVERT_CHUNK, Float32), self.shifts_of(first)
            for j in cutlass.range_constexpr(CONVERT_CHUNK):
                i = first + j
                x = acc_S[i]
                part[j] = cute.math.exp2(self.of(x, i // 2 % 2, 2 * (i // 4) + i % 2, shifts), fastmath=True)
                acc_S[i] = part[j]
                if const_expr(self.cfg.has_softcap and has_slope):
                    # 0 and not -inf of what the mask hides, whose P is 0.
                    acc_S[i] = part[j] * cute.arch.fmax(1.0 - x * x, Float32(0.0))
            if const_expr(rP is not None):
                rounded = cute.make_tensor(flat.iterator + first, cute.make_layout(CONVERT_CHUNK))
                rounded.store(part.load().to(rP.element_type))


def find_rows(cfg: OneSideConfig, rows: cute.Tensor, attn_mask: ScoreMask, visible: Mask | KeyMask, place: tuple):
    """Where what attn_mask has for a thread's two rows begins, in a query head of a sequence: with the first key of a
    query, or the first query of a key. Keys behind the last have the last one's, which is there to be read.

    place: (head, sequence)
    """
    head, sequence = place
    element_bytes = MASK_TYPES[cfg.attn_mask].width // 8
    for r in range(2):
        if cfg.is_of_queries:
            rows[r] = attn_mask.row(cfg, sequence, head, visible.query(r))
        else:
            key = minimum(visible.first_key + r * ROW_STEP, visible.tile.seqlen_k - 1)
            rows[r] = attn_mask.row(cfg, sequence, head, Int32(0)) + Int64(key) * element_bytes


@dataclass(frozen=True)
class MaskOfKeys(RowMask):
    """attn_mask where a thread's rows are keys."""
    row_stride: Int64

    def fetch_tile(self, acc_S: cute.Tensor, keys: KeyMask, m_block: Int32) -> cute.Tensor:
        """What belongs to the scores of one Q tile, (rows, columns); behind the last query what that one has. A warp
        reads 8 neighbouring keys of 4 queries at once: 16 bytes of a row in 16 bit, where the next 8 find the others.
        """
        element, S = MASK_TYPES[self.cfg.attn_mask], as_rows_cols(acc_S)
        num_rows, num_cols = cute.size(S, mode=[0]), cute.size(S, mode=[1])
        values = cute.make_rmem_tensor(cute.make_layout((num_rows, num_cols), stride=(num_cols, 1)), element)
        first_query = m_block * self.cfg.tile_m + keys.first_col
        for c in range(num_cols):
            query = minimum(first_query + col_offset(c), keys.tile.seqlen_q - 1)
            offset = self.row_stride * query * (element.width // 8)
            for r in range(num_rows):
                source = cute.make_ptr(element, self.rows[r] + offset, cute.AddressSpace.gmem,
                                       assumed_align=element.width // 8)
                values[r, c] = cute.make_tensor(source, cute.make_layout(1))[0]
        return values


@dataclass(frozen=True)
class BiasGradient:
    """d_bias of a launch, (batch, head, query, key) f32 that is 0; strides in elements.

    is_sum   a stride is 0: what rows have is added, in any order
    """
    address: Int64
    batch_stride: Int64
    head_stride: Int64
    row_stride: Int64
    is_sum: Boolean

    @staticmethod
    def create(a) -> "BiasGradient":
        """From a kernel's arguments, on the host."""
        strides = a.attn_mask_batch_stride, a.attn_mask_head_stride, a.attn_mask_row_stride
        sizes = a.batch_size, a.num_heads, a.seqlen_q
        along = [(stride == 0) & (size > 1) for stride, size in zip(strides, sizes, strict=True)]
        return BiasGradient(Int64(a.d_bias.toint()), *strides, along[0] | along[1] | along[2])

    @cute.jit
    def add(self, dS: cute.Tensor, mask: Mask, sequence: Int32, n_block: Int32):
        """dS of one K/V tile, queries and keys that the sequence has. What is hidden is 0 already."""
        S, tile, first_key = as_rows_cols(dS), mask.tile, mask.origin(n_block)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            query = tile.m_block * mask.cfg.tile_m + mask.first_row + r * ROW_STEP
            offset = self.batch_stride * sequence + self.head_stride * tile.head + self.row_stride * query
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                key = first_key + col_offset(c)
                if query < tile.seqlen_q and key < tile.seqlen_k and S[r, c] != 0.0:
                    target = cute.make_ptr(Float32, self.address + (offset + key) * 4, cute.AddressSpace.gmem,
                                           assumed_align=4)
                    self.put(target, S[r, c])

    @cute.jit
    def put(self, target: cute.Pointer, value: Float32):
        """Added to a sum, or written."""
        if self.is_sum:
            cute.arch.atomic_add(target, value)
        else:
            cute.make_tensor(target, cute.make_layout(1))[0] = value
