"""16-bit queries over FP8 keys on the GPU: judged as a 16-bit kernel on the dequantised cache."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, FP8_CACHE, FP8_SPLITS, Case, with_heads
from check import check, make_problem, run, run_each_and_check
from descales import per_batch_and_head
from ragged_problems import Ragged, run_and_check
from test_decode_gpu import MASKS

from fa3_cute.contract.reference import as_float, to_bits

pytestmark = pytest.mark.gpu

SOME = [FP8_CACHE[0], FP8_CACHE[3]]  # fp16 with head_dim 64, bf16 with head_dim 128
WIDE = FP8_CACHE[3]


def check_splits(case, stream, splits=FP8_SPLITS, **options) -> None:
    problem = make_problem(case, descale=per_batch_and_head, **options)
    run_each_and_check(problem, stream, [{"num_splits": n} for n in splits])


@pytest.mark.parametrize("family", SOME, ids=str)
def test_contexts(family, stream):
    """With LSE in every second one; the last with more K/V tiles than the rings have slots."""
    for index, seqlen_k in enumerate((1, 64, 129, 1000)):
        check_splits(replace(family, seqlen_k=seqlen_k, has_lse=index % 2 == 0), stream)


@pytest.mark.parametrize("seqlen_q, mask", [(5, "causal"), (3, "narrow")])
def test_masks(seqlen_q, mask, stream):
    case = replace(with_heads(WIDE, (8, 2)), seqlen_q=seqlen_q, seqlen_k=1029, **MASKS[mask])
    check_splits(case, stream)


def test_many_queries(stream):
    """More than one M tile: what the forward kernel would serve in other types."""
    check_splits(replace(WIDE, seqlen_q=300, seqlen_k=420, is_causal=True), stream, (0, 2))


def test_used_lengths(stream):
    """Rows of the cache past seqused_k are NaN, and invisible."""
    case = replace(WIDE, batch=6)
    check_splits(case, stream, lengths={"seqused_k": (385, 300, 64, 1, 65, 0)})


@pytest.mark.parametrize("page_size", [16, 1])
def test_pages(page_size, stream):
    """Packed queries, few and many; row by row too."""
    case = Case("bf16", 128, True, 8, 2, 0, 0, kv_dtype=FP8)
    queries, keys = (1, 80, 4, 1, 0), (1000, 400, 20, 2100, 50)
    run_and_check(Ragged(case, queries, keys, page_size=page_size), stream, per_batch_and_head)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_magnitudes_of_queries(head_dim, stream):
    """BF16 queries become FP16: a power of two times q, and its inverse times k's descale, changes no bit of the
    result, far beyond FP16's range."""
    problem = make_problem(
        Case("bf16", head_dim, False, 6, 2, 3, 385, 5, True, kv_dtype=FP8), descale=per_batch_and_head
    )
    exponents = np.array([[0, 0], [100, -100], [-100, 30], [30, 100], [-60, -105]])  # [batch, KV head]
    for tensor in (problem.q, problem.k, problem.v, *problem.descales.values()):
        tensor.array[...] = tensor.array[:1]
    of_heads = 2.0 ** exponents.repeat(3, axis=1)[:, None, :, None]
    problem.q.array[...] = to_bits((as_float(problem.q.array, np.float64) * of_heads).astype(np.float32), "bf16")
    problem.descales["k_descale"].array[...] *= (2.0**-exponents).astype(np.float32)
    problem.upload()
    for num_splits in (1, 3):
        out, lse = run(problem, stream, num_splits=num_splits)
        assert (out == out[:1]).all() and (lse == lse[:1]).all() and np.isfinite(lse).all()
        check(problem, out, lse)


def test_spread_of_queries(stream):
    """Heads of one tile from 2^-100 to 2^4, and elements of a row from 1 down to 2^-60 of the largest."""
    problem = make_problem(replace(with_heads(WIDE, (16, 2)), has_lse=True))
    of_heads = 2.0 ** np.linspace(-100, 4, 16).round()[:, None]
    of_columns = np.where(np.arange(16)[:, None] % 2, 2.0 ** -np.linspace(0, 60, 128).round(), 1.0)
    values = as_float(problem.q.array, np.float64) * of_heads * of_columns
    problem.q.array[...] = to_bits(values.astype(np.float32), "bf16")
    problem.upload()
    out, lse = run(problem, stream)
    check(problem, out, lse)


def test_queries_that_are_no_numbers(stream):
    """Of zeros, NaN and Inf in Q: their own rows alone change. Zeros are the mean of V."""
    problem = make_problem(WIDE)
    before, _ = run(problem, stream)
    problem.q.array[:, :, 0] = 0
    problem.q.array[:, :, 1, 77] = 0x7FC0
    problem.q.array[:, :, 2, 5] = 0x7F80
    problem.upload()
    out, _ = run(problem, stream)
    assert (out[:, :, 3:] == before[:, :, 3:]).all()
    found, values = as_float(out, np.float64), as_float(problem.v.array, np.float64)
    assert np.isnan(found[:, :, 1:3]).all()
    assert np.abs(found[:, 0, 0] - values[:, :, 0].mean(axis=1)).max() < 1e-3


@pytest.mark.parametrize("case", SOME, ids=str)
def test_every_value(case, stream):
    """All 256 bytes come out as what they stand for, each as the only key's value; NaN stays NaN."""
    problem = make_problem(replace(case, batch=4, seqlen_k=1))
    values = np.arange(256, dtype=np.uint8).reshape(4, 1, 1, 64)
    problem.v.array[...] = values[..., np.arange(case.head_dim) % 64]
    problem.v.image.upload()
    out, _ = run(problem, stream)
    found, stored = as_float(out, np.float32), as_float(problem.v.array, np.float32)
    assert np.array_equal(found, stored.repeat(3, axis=2), equal_nan=True)
    assert np.isnan(found).any() and (np.abs(found) == 448).any()
