"""What the scores of a backward case are changed with, on the host, and how gradients of it are judged. NumPy only."""

import numpy as np
from cases import Case
from tolerance import Rule, assert_errors, errors

from fa3_cute.contract.backward_reference import Gradients
from fa3_cute.contract.reference import as_float, to_bits

HIDDEN = 0.3  # of the keys of a row


def score_arrays(case: Case, rng) -> dict[str, np.ndarray]:
    """s_aux, alibi_slopes, attn_mask and rng_state of a case, those that it has, as buffers hold them. attn_mask is
    [batch, num_heads, seqlen_q, seqlen_k], of one entry along the dimensions that case.mask_dims does not name; where
    rows differ, one of them loses every key."""
    found = {}
    if case.sinks:
        found["s_aux"] = to_bits(np.resize(np.float32(case.sinks), case.num_heads), case.sink_dtype)
    if case.alibi:
        slopes = 2.0 ** (-8 * np.arange(1, case.num_heads + 1) / case.num_heads)
        if case.alibi == "sequences":
            slopes = slopes * rng.uniform(0.5, 1.5, (case.batch, 1))
        found["alibi_slopes"] = slopes.astype(np.float32)
    if case.attn_mask:
        found["attn_mask"] = _mask(case, rng)
    if case.p_dropout:
        found["rng_state"] = rng.integers(0, 2**64, 2, np.uint64)
    return found


def _mask(case: Case, rng) -> np.ndarray:
    full = case.batch, case.num_heads, case.seqlen_q, case.seqlen_k
    shape = [size if dim in case.mask_dims else 1 for dim, size in zip("bhqk", full, strict=True)]
    is_hidden = rng.random(shape) < HIDDEN
    if shape[2] > 1:
        is_hidden[:, :, shape[2] // 2] = True
    if case.attn_mask == "bool":
        return np.where(is_hidden, 0, rng.integers(1, 256, shape)).astype(np.uint8)
    return to_bits(np.where(is_hidden, -np.inf, rng.standard_normal(shape)), case.attn_mask)


def check_score_gradients(scores: dict, d_s_aux, d_bias, exact: Gradients, rounded: Gradients, rule: Rule) -> None:
    """Judge d_s_aux and d_bias, float32; None: not wanted. The rule is that of dq; where the mask hides a key from all
    that it is broadcast along, d_bias is exactly 0."""
    if d_s_aux is not None:
        assert_errors(rule, *errors(d_s_aux, exact.d_s_aux, rounded.d_s_aux), " (d_s_aux)")
    if d_bias is not None:
        assert_errors(rule, *errors(d_bias, exact.d_bias, rounded.d_bias), " (d_bias)")
        wrong = np.argwhere((as_float(scores["attn_mask"]) == -np.inf) & (d_bias != 0))
        assert not len(wrong), f"d_bias: {len(wrong)} hidden scores are not 0, first {wrong[:4].tolist()}"
