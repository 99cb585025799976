"""Head dims that the tables do not have, and columns of V of their own, on the GPU.

What lies behind a row of a tensor is NaN where tensors are `padded`, and guarded: it must not be read into results, nor
written.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, Case
from check import (
    assert_same_bits,
    check,
    make_problem,
    packed_problem,
    run,
    run_and_check,
    run_each_and_check,
)
from descales import per_batch_and_head
from images import contiguous, padded
from ragged_problems import Ragged
from ragged_problems import run_and_check as run_ragged_and_check
from test_partials_gpu import rounded_and_16_bit
from test_varlen_gpu import LAYOUTS

pytestmark = pytest.mark.gpu

PLACES = pytest.mark.parametrize("place", [contiguous, padded], ids=["contiguous", "padded"])
SPLITS = [{}, {"num_splits": 1}, {"num_splits": 8}, {"num_splits": 48}]
NONE_AT_BOTH_ENDS = LAYOUTS["rows of none at both ends"]
FULL = Case("bf16", 128, False, 6, 2, 300, 420, batch=2)
CAUSAL = replace(FULL, is_causal=True)
# Of every tile, in both types: a column short of it, and nearer to the next smaller one.
DIMS = (
    (8, "bf16"),
    (40, "fp16"),
    (72, "bf16"),
    (80, "fp16"),
    (112, "bf16"),
    (160, "fp16"),
    (224, "bf16"),
    (248, "fp16"),
)


@pytest.mark.parametrize("is_causal, place", [(False, contiguous), (True, padded)], ids=["full", "causal, padded"])
@pytest.mark.parametrize("head_dim, dtype", DIMS)
def test_dense(head_dim, dtype, is_causal, place, stream):
    """By the kernels of the tables."""
    run_and_check(make_problem(replace(FULL, head_dim=head_dim, dtype=dtype, is_causal=is_causal), place), stream)


@pytest.mark.parametrize("head_dim", [40, 112, 160])
def test_windows(head_dim, stream):
    run_and_check(make_problem(replace(FULL, head_dim=head_dim, window=(70, 3)), padded), stream)


@pytest.mark.parametrize("head_dim", [72, 88])
def test_the_bits_are_those_of_zeros_behind_the_columns(head_dim, stream):
    """The same kernel, of tensors as wide as its tiles."""
    narrow = make_problem(replace(CAUSAL, head_dim=head_dim), padded)
    out, lse = run(narrow, stream)
    wide = make_problem(replace(CAUSAL, head_dim=96), softmax_scale=1 / math.sqrt(head_dim))
    for tensor, of in zip((wide.q, wide.k, wide.v), narrow.inputs, strict=True):
        tensor.array[...] = 0
        tensor.array[..., :head_dim] = of
    wide.upload()
    whole, same = run(wide, stream)
    assert_same_bits((out, lse), (np.ascontiguousarray(whole[..., :head_dim]), same))
    assert not whole[..., head_dim:].any()


@PLACES
@pytest.mark.parametrize("head_dim", [72, 88])
def test_packed(head_dim, place, stream):
    """Tiles that end within the next sequence's rows are stored row by row."""
    run_and_check(packed_problem(replace(CAUSAL, head_dim=head_dim), NONE_AT_BOTH_ENDS, place), stream)


@PLACES
def test_partial_results(place, stream):
    """O in FP32, rounded, is what is 16 bit of the kernel that stores with TMA."""
    problem = make_problem(replace(FULL, head_dim=40, out_dtype="fp32"), place)
    if place is contiguous:
        rounded, narrow = rounded_and_16_bit(problem, stream, "bf16")
        assert np.array_equal(rounded, narrow)
    else:
        check(problem, *run(problem, stream))


# ---- decode --------------------------------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("head_dim", [40, 72, 80])
def test_decode(head_dim, place, stream):
    """Splits that merge in a cluster, and between clusters through memory."""
    case = Case("bf16", head_dim, False, 16, 2, 1, 3000, batch=3)
    run_each_and_check(make_problem(case, place), stream, SPLITS)


@pytest.mark.parametrize("queries", [1, 5])
def test_decode_of_some_queries(queries, stream):
    """Rows of several queries and heads, and an M tile that is not full."""
    case = Case("bf16", 80, False, 6, 2, queries, 999, batch=2)
    run_each_and_check(make_problem(case, padded), stream, SPLITS)


# ---- pages ---------------------------------------------------------------------------------------------------------

PAGED = Case("bf16", 112, True, 8, 2, 0, 0)
KEYS = (1000, 1, 513, 0, 64, 2100)
DECODES = Ragged(PAGED, (1,) * 6, KEYS, fields={"max_seqlen_q": 1})
MIXED = Ragged(PAGED, (1, 300, 4, 129, 1, 0), (1000, 400, 20, 129, 2100, 50))


@pytest.mark.parametrize("layout", ["nhd", "odd", "hnd"])
@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_pages(ragged, layout, stream):
    run_ragged_and_check(replace(ragged, layout=layout), stream)


@pytest.mark.parametrize(
    "ragged, page_size", [(DECODES, 16), (MIXED, 16), (DECODES, 12)], ids=["decodes", "mixed", "row by row"]
)
def test_nan_behind_the_rows_of_pages(ragged, page_size, stream):
    """K and V are each a half of rows whose other half is NaN."""
    case = replace(PAGED, head_dim_v=112)
    run_ragged_and_check(replace(ragged, case=case, layout="one row", page_size=page_size), stream)


def test_splits_over_pages(stream):
    for splits in ({"num_splits": 6}, {"num_splits": 48}, {"fixed_split_size": 256}):
        run_ragged_and_check(replace(DECODES, fields=DECODES.fields | splits), stream)


# ---- columns of V of their own -------------------------------------------------------------------------------------

OF_MLA = replace(CAUSAL, head_dim=192, head_dim_v=128)


@PLACES
@pytest.mark.parametrize(
    "case", [OF_MLA, replace(OF_MLA, is_causal=False), replace(OF_MLA, is_causal=False, window=(70, 3))], ids=str
)
def test_192_and_128(case, place, stream):
    """O lies in a part of its Q's slot."""
    run_and_check(make_problem(case, place), stream)


@PLACES
def test_192_and_128_packed(place, stream):
    run_and_check(packed_problem(OF_MLA, NONE_AT_BOTH_ENDS, place), stream)


def test_192_and_128_of_many_tiles(stream):
    """Several tiles per CTA: the next Q waits for the O that lies in its slot."""
    run_and_check(
        make_problem(replace(OF_MLA, num_heads=16, num_heads_k=4, seqlen_q=900, seqlen_k=900, batch=3)), stream
    )


@PLACES
def test_192_and_128_decode(place, stream):
    case = Case("bf16", 192, False, 16, 2, 1, 3000, batch=3, head_dim_v=128)
    run_each_and_check(make_problem(case, place), stream, SPLITS)


@pytest.mark.parametrize("layout", ["nhd", "one row"])
def test_192_and_128_in_pages(layout, stream):
    """Wide boxes of both."""
    run_ragged_and_check(replace(DECODES, case=replace(PAGED, head_dim=192, head_dim_v=128), layout=layout), stream)


@PLACES
@pytest.mark.parametrize("dims", [(64, 32), (128, 64), (64, 256)], ids=str)
def test_columns_of_v(dims, place, stream):
    """By the kernels of the tables."""
    head_dim, head_dim_v = dims
    run_and_check(make_problem(replace(CAUSAL, head_dim=head_dim, head_dim_v=head_dim_v), place), stream)


def test_columns_of_v_in_decode(stream):
    case = Case("bf16", 64, False, 16, 2, 1, 3000, batch=3, head_dim_v=32)
    run_each_and_check(make_problem(case, padded), stream, SPLITS)


# ---- FP8 -----------------------------------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("dims", [(80, 0), (112, 0), (128, 64)], ids=str)
def test_fp8(dims, place, stream):
    head_dim, head_dim_v = dims
    case = replace(CAUSAL, dtype=FP8, head_dim=head_dim, head_dim_v=head_dim_v, out_dtype="bf16")
    run_and_check(make_problem(case, place, descale=per_batch_and_head), stream)


def test_fp8_packed(stream):
    case = replace(CAUSAL, dtype=FP8, head_dim=112, out_dtype="bf16")
    run_and_check(packed_problem(case, NONE_AT_BOTH_ENDS, padded, descale=per_batch_and_head), stream)


def test_fp8_decode(stream):
    case = Case(FP8, 48, False, 16, 2, 1, 3000, batch=3, out_dtype="bf16")
    run_each_and_check(make_problem(case, padded, descale=per_batch_and_head), stream, SPLITS)
