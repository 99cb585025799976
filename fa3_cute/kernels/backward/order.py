"""Which keys a CTA of the main kernel has: plain arithmetic that also runs on Python ints in the tests.

Blocks of keys of one head run next to one another, since they read the same Q and dO and add to the same dQ. Causal
ones differ in length: the first keys are seen by most queries and run first, within sections of heads whose Q, dO and
dQ fit L2 together. Deterministic: the last keys first, since the CTAs add to dQ in that order: what a CTA waits for is
then running or done. The queries of the diagonal, with which a causal CTA starts, are the last keys' first ones too.
"""
from cutlass import Int32

from ..common.arithmetic import maximum, minimum

L2_BYTES = 32 << 20      # of 50 MB
BYTES_PER_VALUE = 8      # Q, dO, and dQ in FP32


def heads_per_section(num_heads: Int32, group: Int32, seqlen_q: Int32, head_dim: int) -> Int32:
    """KV heads, of any batch entry, whose Q, dO and dQ share L2."""
    most = L2_BYTES // (BYTES_PER_VALUE * head_dim) // maximum(seqlen_q * group, 1)
    return minimum(maximum(most, 1), num_heads)
