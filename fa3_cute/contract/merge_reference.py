"""NumPy's merge of two partial attention results, which defines what merge_attention computes. No GPU; NumPy only."""

import math
from typing import Any

import numpy as np

from .number_formats import as_float


def merge_reference(out_a, lse_a, out_b, lse_b, *, lse_base: float = math.e) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of attention over the keys of both, in float64.

    out_a, out_b   [..., seqlen_q, num_heads, head_dim], results over disjoint keys; any float dtype, uint16 = BF16 bits
    lse_a, lse_b   [..., num_heads, seqlen_q], logarithms to lse_base; -inf: the row saw no key, and its out, NaN or
                   not, counts for nothing

    A row that saw no key at all gets out = 0, lse = -inf. NaN and +inf in an LSE give NaN.
    """
    exact: Any = np.float64
    outs, lses = ([as_float(array, exact) for array in pair] for pair in ((out_a, out_b), (lse_a, lse_b)))
    top = np.maximum(*lses)
    with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf must give NaN and log(0) -inf, quietly
        weights = [lse_base ** (lse - np.where(top == -np.inf, 0, top)) for lse in lses]
        total = weights[0] + weights[1]
        lse = top + np.log(total) / np.log(lse_base)
        total = np.where(total == 0, 1, total)
        parts = [
            np.where(_rows(own == -np.inf), 0, _rows(weight / total) * out)
            for own, weight, out in zip(lses, weights, outs, strict=True)
        ]
    return parts[0] + parts[1], lse


def _rows(of_heads: np.ndarray) -> np.ndarray:
    """[..., num_heads, seqlen_q] -> [..., seqlen_q, num_heads, 1], as out has them."""
    return of_heads.swapaxes(-1, -2)[..., None]
