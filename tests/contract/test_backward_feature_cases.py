"""The rule that judges gradients where scores are changed: an honest kernel, in NumPy, passes, a fault is found."""

import math
from itertools import product

import numpy as np
import pytest
from backward_cases import FEATURES, MASKED, BackwardCase, Inputs, check_case, feature_cases, inputs_of
from cases import Case

from fa3_cute.contract.dropout import effective_p
from fa3_cute.contract.philox import keep_mask
from fa3_cute.contract.reference import as_float, round_to, to_bits

TILE_M, TILE_N = 64, 80
CASES = feature_cases(64)
LOG2E = np.float32(math.log2(math.e))
OPTIONS = ("softcap", "sinks", "alibi", "attn_mask", "attention_chunk", "p_dropout", "mask_dims")


def kernel(case: BackwardCase, inputs: Inputs, fault: str = "") -> dict[str, np.ndarray | None]:
    """Gradients of a dense case as a kernel computes them: FP32, tile by tile with exp2, rounded where it must be."""
    forward, scores = case.forward, inputs.scores
    q, k, v, dout, out = (as_float(array) for array in inputs[:5])
    found = {name: np.zeros(array.shape, np.float32) for name, array in (("dq", q), ("dk", k), ("dv", v))}
    found["d_s_aux"] = np.zeros(forward.num_heads, np.float32)
    full = forward.batch, forward.num_heads, forward.seqlen_q, forward.seqlen_k
    ds = np.zeros(full, np.float32)
    mask = scores.get("attn_mask")
    if mask is not None:
        mask = np.broadcast_to(mask if forward.attn_mask == "bool" else as_float(mask), full)
    slopes = np.broadcast_to(scores.get("alibi_slopes", np.float32(0)), full[:2])
    for b, head in np.ndindex(*full[:2]):
        kv = b, slice(None), head * forward.num_heads_k // forward.num_heads
        of_q, lse = (b, slice(None), head), inputs.lse[b, head]
        shift = (dout[of_q] * out[of_q]).sum(axis=1) - (0 if inputs.dlse is None else inputs.dlse[b, head])
        change = None if mask is None else mask[b, head], slopes[b, head], (b, head)
        rows = q[of_q], dout[of_q], lse, shift
        dq, dk, dv, ds[b, head] = one_head(case, scores, rows, (k[kv], v[kv]), change, fault)
        found["dq"][of_q] = dq
        found["dk"][kv] += dk
        found["dv"][kv] += dv
        if "s_aux" in scores and not (fault == "a sequence's sinks" and b):
            sink = as_float(scores["s_aux"])[head]
            p = np.exp2((sink - lse) * LOG2E) if sink > -math.inf else np.float32(0)
            found["d_s_aux"][head] -= (p * shift).sum() if fault != "D of sinks" else p.sum()
    for name in ("dk", "dv"):
        if case.accumulates and fault != "overwritten":
            found[name] += as_float(getattr(inputs, name))
    found = {
        name: array if name == "d_s_aux" else to_bits(array, case.element_of_gradients) for name, array in found.items()
    }
    d_bias = None
    if forward.attn_mask not in ("", "bool"):
        axes = tuple(axis for axis, size in enumerate(scores["attn_mask"].shape) if size == 1)
        d_bias = ds.sum(axis=axes, keepdims=True) if fault != "sum" else ds.mean(axis=axes, keepdims=True)
    return found | {"d_bias": d_bias, "d_s_aux": found["d_s_aux"] if forward.sinks else None}


def one_head(case, scores, rows, keys, change, fault):
    """dQ, and what a head adds to dK and dV; dS."""
    (q, dout, lse, shift), (k, v), (bias, slope, (b, head)), forward = rows, keys, change, case.forward
    scale, cap, p_dropout = np.float32(q.shape[-1] ** -0.5), np.float32(forward.softcap), forward.p_dropout
    diagonals = np.arange(len(q))[:, None] + len(k) - len(q)
    distance = np.arange(len(k)) - diagonals
    sees = visible(forward, distance, diagonals) & (
        True if bias is None else (bias != 0 if forward.attn_mask == "bool" else bias > -np.inf)
    )
    dq, dk, dv, all_ds = (np.zeros(shape, np.float32) for shape in (q.shape, k.shape, v.shape, sees.shape))
    lse = np.where(np.isinf(lse), 0, lse)
    for first, start in product(range(0, len(k), TILE_N), range(0, len(q), TILE_M)):
        n, m = slice(first, first + TILE_N), slice(start, start + TILE_M)
        raw = q[m] @ k[n].T * scale
        slope_of_cap = 1 - np.tanh(raw / cap) ** 2 if cap and fault != "no slope" else np.float32(1)
        s = cap * np.tanh(raw / cap) if cap else raw
        s = s - slope * np.abs(distance[m, n]).astype(np.float32)
        if forward.attn_mask not in ("", "bool"):
            s = s + bias[m, n]
        p = np.where(sees[m, n], np.exp2(np.where(sees[m, n], (s - lse[m, None]) * LOG2E, 0)), 0)
        kept, factor = np.ones_like(p), np.float32(1)
        if p_dropout:
            keys_of_tile = range(n.start, min(n.stop, len(k)))
            bits_head = head + 1 if fault == "bits" else head
            kept = keep_mask(
                p_dropout,
                *map(int, scores["rng_state"]),
                b,
                bits_head,
                range(m.start, min(m.stop, len(q))),
                keys_of_tile,
            )
            factor = np.float32(1 / (1 - (p_dropout if fault == "p" else effective_p(p_dropout))))
        ds = p * (kept * factor * (dout[m] @ v[n].T) - shift[m, None])
        all_ds[m, n] = ds * slope_of_cap if fault == "d_bias behind the cap" else ds
        dr = round_to(ds * slope_of_cap, forward.dtype)
        dk[n] += dr.T @ q[m] * scale
        dv[n] += (round_to(p, forward.dtype) * kept).T @ dout[m] * factor
        dq[m] += dr @ k[n] * scale
    return dq, dk, dv, all_ds


def visible(forward: Case, distance, diagonals):
    left, right = (-1, 0) if forward.is_causal else forward.window
    seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
    if chunk := forward.attention_chunk:
        seen &= (distance + diagonals) // chunk == diagonals // chunk
    return seen


def features_of(case: BackwardCase) -> tuple:
    return (*(getattr(case.forward, name) for name in OPTIONS), case.grad_dtype, case.accumulates)


DENSE = sorted((case for case in CASES if not case.lengths), key=lambda case: case.forward.num_heads)
ONE_OF_EACH = list({features_of(case): case for case in reversed(DENSE)}.values())


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_an_honest_kernel_passes(case):
    inputs = inputs_of(case)
    check_case(case, inputs, **kernel(case, inputs))


FAULTS = {
    "no slope": "dq",
    "bits": "dq",
    "p": "d_bias",  # 0.2 itself is not what is dropped; FP32 shows it
    "d_bias behind the cap": "d_bias",
    "sum": "d_bias",
    "D of sinks": "d_s_aux",
    "a sequence's sinks": "d_s_aux",
    "overwritten": "dk",
}


@pytest.fixture(scope="module")
def with_everything():
    options = MASKED["all"] | {"softcap": 2.0, "p_dropout": 0.2}
    case = BackwardCase(Case("bf16", 64, True, 2, 1, 130, 170, 2, **options), grad_dtype="fp32", accumulates=True)
    return case, inputs_of(case)


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_fault_is_found(with_everything, fault):
    case, inputs = with_everything
    found = kernel(case, inputs, fault)
    if not fault:
        check_case(case, inputs, **found)
        return
    with pytest.raises(AssertionError, match=rf"out \({FAULTS[fault]}\)"):
        check_case(case, inputs, **found)


def test_a_hidden_score_has_no_gradient(with_everything):
    case, inputs = with_everything
    found = kernel(case, inputs)
    found["d_bias"][0, 0, 65, 3] = 1e-9  # of the row that loses every key
    with pytest.raises(AssertionError, match="d_bias: 1 hidden scores are not 0"):
        check_case(case, inputs, **found)


def test_cases_cover_what_they_should():
    assert len(set(map(str, CASES))) == len(CASES)
    for facts in (FEATURES | MASKED).values():
        met = [case for case in CASES if all(getattr(case.forward, name) == value for name, value in facts.items())]
        assert {case.forward.mask for case in met} >= {"full", "causal", "window(50,20)"}
        assert any(case.used for case in met) and any(case.layout for case in met) == ("attn_mask" not in facts)
        assert {case.forward.dtype for case in met} == {"bf16", "fp16"}
    sums = {(case.accumulates, case.grad_dtype, bool(case.layout)) for case in CASES}
    assert sums >= {(True, grad, packed) for grad in (None, "fp32") for packed in (False, True)}
