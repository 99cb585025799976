"""Which passes of a problem the benchmark times, the matrix products in them, and how much of these a mask
leaves.

Nominal FLOPs of a backward pass are those of five products beside the two of the forward pass: S and dP anew, dV, dK
and dQ (FlashAttention-2, arXiv:2307.08691, section 4.1).
"""

import numpy as np

FORWARD = ""
BACKWARD = "backward"
DETERMINISTIC = "deterministic"  # the backward pass, with the same bits every time
BOTH = "forward + backward"
PRODUCTS = {FORWARD: 2, BACKWARD: 5, DETERMINISTIC: 5, BOTH: 7}


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """How many (query, key) pairs of one sequence a window leaves; a negative bound is no bound."""
    diagonal = np.arange(seqlen_q) + seqlen_k - seqlen_q
    first = 0 if left < 0 else np.clip(diagonal - left, 0, seqlen_k)
    stop = seqlen_k if right < 0 else np.clip(diagonal + right + 1, 0, seqlen_k)
    return int(np.maximum(np.broadcast_to(stop - first, diagonal.shape), 0).sum())
