"""The rule that judges gradients: an honest kernel, in NumPy, passes in every case, and one with a fault does not."""

import math
from itertools import product

import numpy as np
import pytest
from backward_cases import (
    LENGTHS,
    WINDOWS,
    BackwardCase,
    Inputs,
    backward_cases,
    check_case,
    check_gradients,
    expected_of,
    inputs_of,
)
from cases import HEADS, Case

from fa3_cute.contract.backward_reference import Gradients
from fa3_cute.contract.reference import as_float, round_to, to_bits, used_rows

TILE_M, TILE_N = 64, 80
CASES = backward_cases(64)
SMALL = [case for case in CASES if case.forward.seqlen_q * case.forward.seqlen_k <= 1 << 17]


def kernel(case, inputs: Inputs, fault: str = "") -> Gradients:
    """Gradients as a kernel computes them: in FP32, tile by tile with exp2, rounded to 16 bits where it must be."""
    dtype, (heads, heads_k) = case.forward.dtype, (case.forward.num_heads, case.forward.num_heads_k)
    q, k, v, dout, out = (as_float(array) for array in inputs[:5])
    found = [np.full(array.shape, np.nan, np.float32) for array in (q, k, v)]
    sides = zip(*(used_rows(array, *lengths(case, side)) for array, side in ((q, "q"), (k, "k"))), strict=True)
    for ((*outer, rows), of_k), head_k in product(sides, range(heads_k)):
        of_kv, sums = [array[*of_k, head_k] for array in (k, v)], [np.zeros_like(k[*of_k, head_k]) for _ in "kv"]
        for head in range(head_k * heads // heads_k, (head_k + 1) * heads // heads_k):
            if fault == "a head of the group" and head == heads - 1:
                continue
            vectors = inputs.lse[*outer, head, rows], 0 if inputs.dlse is None else inputs.dlse[*outer, head, rows]
            of_q = [array[*outer, rows, head] for array in (q, dout, out)]
            found[0][*outer, rows, head] = one_head(case, (*of_q, *of_kv), vectors, sums, fault)
        found[1][*of_k, head_k], found[2][*of_k, head_k] = sums
    return Gradients(*(to_bits(array, dtype) for array in found))


def lengths(case, side):
    return case.lengths.get(f"cu_seqlens_{side}"), case.lengths.get(f"seqused_{side}")


def one_head(case, tensors, vectors, sums, fault):
    q, dout, out, k, v = tensors
    lse, dlse = vectors
    dtype, scale = case.forward.dtype, np.float32(q.shape[-1] ** -0.5)
    d = (dout * out).sum(axis=1) - (0 if fault == "dlse" else dlse)
    d = np.zeros_like(d) if fault == "D" else d
    lse = np.where(np.isinf(lse), 0, lse)
    dq = np.zeros_like(q)
    for first, start in product(range(0, len(k), TILE_N), range(0, len(q), TILE_M)):
        n, m = slice(first, first + TILE_N), slice(start, start + TILE_M)
        log2e = np.float32(math.log2(math.e))
        scores = q[m] @ k[n].T
        scores = round_to(scores, dtype) if fault == "rounded S" else scores
        scores = scores * (scale * log2e) - lse[m, None] * log2e
        sees = visible(case, len(q), len(k), fault)[m, n]
        p = np.where(sees, np.exp2(np.where(sees, scores, 0)), 0)
        dp = dout[m] @ v[n].T
        ds = round_to(p * (dp - d[m, None]), dtype)
        if fault == "a tile" and first == TILE_N and start == TILE_M:
            continue
        sums[0][n] += ds.T @ q[m] * (1 if fault == "the scale of dk" else scale)
        sums[1][n] += round_to(p, dtype).T @ dout[m]
        dq[m] += ds @ k[n] * scale
    return dq


def visible(case, n_q, n_k, fault):
    diagonal = np.arange(n_k) - (np.arange(n_q)[:, None] + (0 if fault == "top left" else n_k - n_q))
    left, right = (-1, 0) if case.forward.is_causal else case.forward.window
    return ((diagonal >= -left) | (left < 0)) & ((diagonal <= right) | (right < 0))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_an_honest_kernel_passes(case):
    inputs = inputs_of(case)
    check_case(case, inputs, *kernel(case, inputs))


@pytest.mark.parametrize("kind", ["peaky", "mean"])
def test_an_honest_kernel_passes_with_inputs_that_are_hard(kind):
    case = next(case for case in SMALL if (case.forward.seqlen_q, case.forward.seqlen_k) == (160, 256))
    inputs = inputs_of(case, **({"scale_of_q": 4.0} if kind == "peaky" else {"mean_of_v": 1.0}))
    check_case(case, inputs, *kernel(case, inputs))


FAULTS = ("a head of the group", "D", "a tile", "the scale of dk", "top left", "dlse", "rounded S")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    """In a case that has what they concern: groups, more keys than queries, a gradient of the LSE, several tiles."""
    case = BackwardCase(Case("bf16", 64, True, 6, 2, 160, 256, 2), has_dlse=True)
    inputs = inputs_of(case)
    check_case(case, inputs, *kernel(case, inputs))
    with pytest.raises(AssertionError, match=r"out \(d[qkv]\)"):
        check_case(case, inputs, *kernel(case, inputs, fault))


def test_what_must_be_zero_or_untouched_is_found():
    case = next(case for case in SMALL if case.forward.window == (0, 0) and case.forward.seqlen_k == 300)
    inputs = inputs_of(case)
    dq, dk, dv = kernel(case, inputs)
    dk[0, 7, 0, 3] = to_bits(1e-6, case.forward.dtype)
    with pytest.raises(AssertionError, match="dk: 1 rows .* should be 0"):
        check_case(case, inputs, dq, dk, dv)
    case = next(case for case in SMALL if case.forward.is_causal and case.forward.seqlen_k == 3)
    inputs = inputs_of(case)
    dq, dk, dv = kernel(case, inputs)
    dq[1, 11, 0, 3] = to_bits(1e-6, case.forward.dtype)
    with pytest.raises(AssertionError, match="dq: 1 rows .* should be 0"):
        check_case(case, inputs, dq, dk, dv)
    case = next(case for case in SMALL if case.layout == "gaps")
    inputs = inputs_of(case)
    dq, dk, dv = kernel(case, inputs)
    dv[1] = 0
    with pytest.raises(AssertionError, match=r"out \(dv\): .* should be NaN"):
        check_case(case, inputs, dq, dk, dv)


def test_what_is_not_wanted_is_not_judged():
    case = SMALL[0]
    inputs = inputs_of(case)
    expected = expected_of(case, inputs)
    dq, dk, dv = kernel(case, inputs)
    check_gradients(None, dk, None, *expected)
    with pytest.raises(AssertionError, match=r"out \(dv\)"):
        check_gradients(None, dk, to_bits(2 * as_float(dv), case.forward.dtype), *expected)
    check_gradients(dq, None, None, *expected)


def test_cases_cover_what_they_should():
    assert len(set(map(str, CASES))) == len(CASES)
    for kind in (lambda f: f.mask == "full", lambda f: f.is_causal, lambda f: f.window != (-1, -1)):
        met = [case for case in CASES if kind(case.forward)]
        combinations = {(case.forward.dtype, case.forward.num_heads, case.has_dlse) for case in met}
        assert len(combinations) == 2 * len(HEADS) * 2
        assert {case.layout for case in met} >= {"", "gaps", "no queries", "no keys"} and any(case.used for case in met)
    lengths = {(case.forward.seqlen_q, case.forward.seqlen_k) for case in CASES}
    assert lengths >= {*LENGTHS, *(window[1:] for window in WINDOWS)}
