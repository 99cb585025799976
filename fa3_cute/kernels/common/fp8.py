"""What FP8 E4M3 adds to the maths: factors, none of them per element.

Stored values are real / descale. q's and k's descale go into the factor of the scores, v's into the last normalisation.
P = exp(S - max) lies in (0, 1] and E4M3 ends at 2^-9: the exponent gets P_SCALE_LOG2 more, which the row sum shares and
the normalisation takes back; only LSE has to subtract it. The same where P is FP16, which ends at 2^-24, though queries
are BF16: a row's many small P are not to be lost.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from ...planning.config import KernelConfig
from .sequences import is_present

P_SCALE_LOG2 = 8                 # the largest P becomes 256 of E4M3's 448; small ones keep bits down to 2^-17
SMALLEST_SCALE = 2.0 ** -126


def p_scale_log2(cfg: KernelConfig) -> int:
    """How much is added to the exponent of P."""
    return P_SCALE_LOG2 if cfg.is_fp8 or cfg.gemm_dtype != cfg.dtype else 0


@dataclass(frozen=True)
class Descales:
    """f32 [head, sequence]: of q by query head, of k and v by KV head. A null pointer stands for ones."""
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor

    @staticmethod
    def create(a) -> "Descales":
        """From a kernel's arguments; strides are in elements."""
        view = lambda array, heads, head_stride, batch_stride: cute.make_tensor(
            array, cute.make_layout((heads, a.batch_size), stride=(head_stride, batch_stride)))
        return Descales(
            q=view(a.q_descale, a.num_heads, a.q_descale_head_stride, a.q_descale_batch_stride),
            k=view(a.k_descale, a.num_heads_k, a.k_descale_head_stride, a.k_descale_batch_stride),
            v=view(a.v_descale, a.num_heads_k, a.v_descale_head_stride, a.v_descale_batch_stride))

    @cute.jit
    def score_factor(self, scale: Float32, head: Int32, kv_head: Int32, sequence: Int32) -> Float32:
        """What a score of stored values is to be multiplied with, if one of real values is with `scale`.

        Not 0: a masked score is -inf, and 0 * -inf is NaN.
        """
        factor = scale * descale_at(self.q, head, sequence) * descale_at(self.k, kv_head, sequence)
        return Float32(SMALLEST_SCALE) if factor == 0.0 else factor

    def value_factor(self, kv_head: Int32, sequence: Int32) -> Float32:
        """What a stored value is to be multiplied with."""
        return descale_at(self.v, kv_head, sequence)


@cute.jit
def descale_at(array: cute.Tensor, head: Int32, sequence: Int32) -> Float32:
    """One descale: 1 unless the array is there."""
    descale = Float32(1.0)
    if is_present(array):
        descale = array[head, Int64(sequence)]
    return descale
