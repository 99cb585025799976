"""What becomes of scores between Q K^T and the mask, in registers.

    softcap   softcap * tanh(score / softcap)
    ALiBi     score - slope * |distance from the diagonal|

in this order, on scores that are multiplied with softmax_scale (FP8: and with the descales of q and k).

Every score passes `ScoreTransform.apply` before the mask, which writes -inf where a row does not see a key: a transform
sees finite scores and what lies in unused memory, even NaN, and need not care. The softmax then raises 2 to
scale_log2 * score. Without a transform scores stay q.k, and scale_log2 is softmax_scale * log2(e).
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from ...planning.config import KernelConfig
from .arithmetic import LOG2_E
from .layout import as_rows_cols, col_offset
from .mods import ModArguments
from .score_mask import ScoreMask
from .tiles import Place


@dataclass(frozen=True)
class RowFactors:
    """What the scores of a thread's rows take part in, which a tile of O has one of or each row its own.

    scale    what a raw score is multiplied with first, to be in units of softcap or in natural ones
    slopes   of ALiBi, per key in the scores' units; None without
    """
    scale: Float32 | cute.Tensor
    slopes: Optional[cute.Tensor]

    def scale_of(self, r: int) -> Float32:
        """Of one row."""
        return self.scale[r % cute.size(self.scale)] if isinstance(self.scale, cute.Tensor) else self.scale

    def slope_of(self, r: int) -> Float32:
        """Of one row."""
        return self.slopes[r % cute.size(self.slopes)]


@dataclass(frozen=True)
class ScoreTransform:
    """Run-time values of the transform that a config chooses.

    scale_log2   what a transformed score is multiplied with in the exponent, base 2
    scale        RowFactors.scale but for descales; used if cfg.transforms_scores
    softcap      used if cfg.has_softcap
    slopes       (head, sequence) f32; used if cfg.has_alibi
    mask         used if cfg.attn_mask
    mods         used if cfg.has_mods
    """
    scale_log2: Float32
    scale: Optional[Float32] = None
    softcap: Optional[Float32] = None
    slopes: Optional[cute.Tensor] = None
    mask: Optional[ScoreMask] = None
    mods: Optional[ModArguments] = None

    @staticmethod
    def create(cfg: KernelConfig, a) -> "ScoreTransform":
        """From a kernel's arguments, on the host: what is constant over a launch is computed here, not per score."""
        mask = ScoreMask.create(cfg, a) if cfg.attn_mask else None
        mods = ModArguments.create(cfg, a) if cfg.has_mods else None
        if not cfg.transforms_scores:
            return ScoreTransform(a.softmax_scale * LOG2_E, mask=mask, mods=mods)
        unit = a.softcap if cfg.has_softcap else a.softmax_scale
        if cfg.has_natural_scores:
            unit = Float32(1.0)
        slopes = None
        if cfg.has_alibi:
            slopes = cute.make_tensor(a.alibi_slopes, cute.make_layout(
                (a.num_heads, a.batch_size), stride=(1, a.alibi_batch_stride)))
        scale = a.softmax_scale / a.softcap if cfg.has_softcap else a.softmax_scale
        return ScoreTransform(unit * LOG2_E, scale, a.softcap if cfg.has_softcap else None, slopes, mask, mods)

    @cute.jit
    def apply(self, cfg: KernelConfig, acc_S: cute.Tensor, place: Place, factors: Optional[RowFactors],
              bias: Optional[cute.Tensor]):
        """Transform the scores of one K/V tile in place; bias (rows, columns): what is added to them, if there is."""
        if const_expr(cfg.transforms_scores):
            S = as_rows_cols(acc_S)
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                scale = factors.scale_of(r)
                if const_expr(cfg.has_alibi):
                    slope, to_diagonal = factors.slope_of(r), Float32(place.diagonals[r] - place.first_key)
                for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                    score = S[r, c]
                    if const_expr(cfg.has_softcap):
                        score = tanh(score * scale)
                        if const_expr(cfg.has_natural_scores):
                            score = score * self.softcap
                    elif const_expr(cfg.has_natural_scores):
                        score = score * scale
                    if const_expr(bias is not None):
                        score = score + Float32(bias[r, c])
                    if const_expr(cfg.has_alibi):
                        score = score - slope * cute.math.absf(to_diagonal - float(col_offset(c)))
                    S[r, c] = score


def tanh(x: Float32) -> Float32:
    """One instruction, tanh.approx.f32. The PTX ISA allows it a relative error of 2^-11; on H200 it is 1.1e-5 at most,
    8e-6 of the softcap (2^20 arguments each of ten ranges from 1e-4 to 8, 2026-11-29). Other ways take longer: softcap
    makes attention at head_dim 128 (causal, 4 x 4k) take 1.32 times as long, with two special functions 1.83 times,
    with a rational function on the FMA units 1.90 times."""
    return cute.math.tanh(x, approx=True)
