"""What FP8 E4M3 adds to the maths: factors, none of them per element.

Stored values are real / descale. q's and k's descale go into the factor of the scores, v's into the last normalisation.
P = exp(S - max) lies in (0, 1] and E4M3 ends at 2^-9: the exponent gets P_SCALE_LOG2 more, which the row sum shares and
the normalisation takes back; only LSE has to subtract it.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from .sequences import is_present

P_SCALE_LOG2 = 8                 # the largest P becomes 256 of E4M3's 448; small ones keep bits down to 2^-17
SMALLEST_SCALE = 2.0 ** -126


@dataclass(frozen=True)
class Descales:
    """f32 [head, sequence]: of q by query head, of k and v by KV head. A null pointer stands for ones."""
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor

    @staticmethod
    def create(num_heads: Int32, num_heads_k: Int32, batch_size: Int32, pointers, strides) -> "Descales":
        """pointers: of q, k, v; strides: (batch, head) of each, in elements."""
        heads = (num_heads, num_heads_k, num_heads_k)
        return Descales(*(
            cute.make_tensor(pointer, cute.make_layout((count, batch_size), stride=(head_stride, batch_stride)))
            for pointer, count, (batch_stride, head_stride) in zip(pointers, heads, strides, strict=True)))

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
