"""Which passes of a problem the benchmark times, and the matrix products in them. Pure Python.

Nominal FLOPs of a backward pass are those of five products beside the two of the forward pass: S and dP anew, dV, dK
and dQ (FlashAttention-2, arXiv:2307.08691, section 4.1).
"""

FORWARD = ""
BACKWARD = "backward"
DETERMINISTIC = "deterministic"  # the backward pass, with the same bits every time
BOTH = "forward + backward"
PRODUCTS = {FORWARD: 2, BACKWARD: 5, DETERMINISTIC: 5, BOTH: 7}
