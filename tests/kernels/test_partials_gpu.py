"""Partial results on the GPU: O in FP32, which rounded is what the same kernel gives in 16 bit."""

import numpy as np
import pytest
from cases import FP8, Case
from check import check, make_problem, packed_problem, params_of, run
from descales import per_batch_and_head
from images import contiguous, padded
from test_varlen_gpu import LAYOUTS

from fa3_cute import forward
from fa3_cute.contract.reference import to_bits

pytestmark = pytest.mark.gpu

CASES = [
    Case("bf16", 128, True, 6, 2, 300, 333, batch=2, out_dtype="fp32"),
    Case("fp16", 64, False, 2, 2, 200, 500, out_dtype="fp32"),
    Case("bf16", 256, False, 2, 1, 170, 100, has_lse=False, out_dtype="fp32"),
    Case("fp16", 96, False, 2, 2, 300, 400, window=(70, 3), out_dtype="fp32"),
    Case("bf16", 192, True, 2, 2, 100, 300, out_dtype="fp32"),
    Case(FP8, 128, True, 6, 2, 300, 333, batch=2, out_dtype="fp32"),
    Case("bf16", 128, False, 16, 2, 1, 3000, batch=3, out_dtype="fp32"),
    Case("fp16", 64, True, 8, 2, 4, 900, out_dtype="fp32"),
    Case(FP8, 64, False, 8, 2, 1, 2000, batch=2, out_dtype="fp32"),
]


def rounded_and_16_bit(problem, stream, out_dtype):
    """O in FP32, rounded, and O of the same call in 16 bit."""
    whole, lse = run(problem, stream)
    check(problem, whole, lse)
    narrow = contiguous("narrow", problem.out.array.shape, out_dtype)
    narrow.poison()
    of_call = dict.fromkeys(f"out_{dim}_stride" for dim in ("batch", "row", "head"))
    call = params_of(problem, out=narrow.address, out_dtype=None, **of_call)
    forward(call, stream).check()
    return to_bits(whole, out_dtype), narrow.read(stream)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_is_16_bit_before_rounding(case, stream):
    descale = per_batch_and_head if case.dtype == FP8 else None
    problem = make_problem(case, descale=descale)
    out_dtype = "bf16" if case.dtype == FP8 else case.dtype
    rounded, narrow = rounded_and_16_bit(problem, stream, out_dtype)
    assert np.array_equal(rounded, narrow)


@pytest.mark.parametrize("place", [contiguous, padded], ids=["contiguous", "padded"])
def test_packed_rows_of_others_stay_as_they_are(place, stream):
    """Tiles that end within the next sequence's rows, and rows of no sequence."""
    family = Case("bf16", 128, True, 6, 2, 0, 0, out_dtype="fp32")
    problem = packed_problem(family, LAYOUTS["rows of none at both ends"], place)
    check(problem, *run(problem, stream))
