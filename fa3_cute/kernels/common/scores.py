"""What becomes of scores between Q K^T and the mask, in registers.

Every score passes `ScoreTransform.apply` before the mask, which writes -inf where a row does not see a key: a transform
sees finite scores and what lies in unused memory, even NaN, and need not care. The softmax then raises 2 to
scale_log2 * score. Scores are q.k and scale_log2 is softmax_scale * log2(e): the transform is the identity.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32

from ...planning.config import KernelConfig
from .arithmetic import LOG2_E
from .tiles import Tile


@dataclass(frozen=True)
class Place:
    """Where one thread's scores of one K/V tile belong; layout.py has the distances of the others from the first.

    first_row, first_key   of its first score: row of the Q tile, key of the sequence
    """
    tile: Tile
    first_row: Int32
    first_key: Int32


@dataclass(frozen=True)
class ScoreTransform:
    """Run-time values of the transform that a config chooses.

    scale_log2   what a transformed score is multiplied with in the exponent, base 2
    """
    scale_log2: Float32

    @staticmethod
    def create(cfg: KernelConfig, a) -> "ScoreTransform":
        """From a kernel's arguments, on the host: what is constant over a launch is computed here, not per score."""
        return ScoreTransform(a.softmax_scale * LOG2_E)

    def apply(self, cfg: KernelConfig, acc_S: cute.Tensor, place: Place):
        """Transform the scores of one K/V tile in place."""
