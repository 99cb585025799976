"""MLA decode on the GPU: V is the first 512 of the 576 columns of K. What no sequence uses is NaN."""

from dataclasses import replace

import pytest
from cases import Case
from check import make_problem, run_each_and_check
from images import contiguous, padded
from ragged_problems import Ragged, RaggedProblem
from ragged_problems import run_and_check as run_ragged_and_check

pytestmark = pytest.mark.gpu

# By one CTA; a cluster; several CTAs without a cluster; several clusters.
SPLITS = [{}, {"num_splits": 1}, {"num_splits": 4}, {"num_splits": 11}, {"num_splits": 32}]
FEW_HEADS = Case("bf16", 576, False, 16, 1, 1, 3000, batch=3, head_dim_v=512)
MANY_HEADS = Case("fp16", 576, True, 128, 1, 2, 1100, batch=2, head_dim_v=512)
LENGTHS = (0, 1, 64, 65, 700, 1024)
PAGED = Ragged(replace(FEW_HEADS, is_causal=True), (4,) * 6, LENGTHS, page_size=64, is_packed=False)


@pytest.mark.parametrize("place", [contiguous, padded], ids=["contiguous", "padded"])
def test_few_heads(place, stream):
    run_each_and_check(make_problem(FEW_HEADS, place), stream, SPLITS)


def test_many_heads(stream):
    """Two M tiles of each of two causal queries."""
    run_each_and_check(make_problem(MANY_HEADS), stream, SPLITS)


def test_heads_that_do_not_fill_tiles(stream):
    """Queries begin and end within M tiles; two KV heads of 24 each."""
    case = replace(MANY_HEADS, num_heads=48, num_heads_k=2, seqlen_q=3, seqlen_k=500)
    run_each_and_check(make_problem(case, padded), stream, [{}, {"num_splits": 1}, {"num_splits": 3}])


@pytest.mark.parametrize("seqlen_k", [1, 64, 65])
def test_few_keys(seqlen_k, stream):
    """Fewer than queries; one tile; one key into the next."""
    run_each_and_check(make_problem(replace(MANY_HEADS, seqlen_k=seqlen_k, batch=1)), stream, [{}, {"num_splits": 2}])


def test_sinks(stream):
    """Added once, with splits and without."""
    case = replace(FEW_HEADS, seqlen_k=400, sinks=(2.0, -1.0, 30.0, float("-inf")))
    run_each_and_check(make_problem(case), stream, SPLITS)


@pytest.mark.parametrize("layout", ["nhd", "odd"])
def test_pages(layout, stream):
    """Four causal queries; of pages that are no multiple of rows apart boxes are narrow."""
    run_ragged_and_check(replace(PAGED, layout=layout), stream)


def test_packed_queries_over_pages(stream):
    """Some sequences have none; rows behind the last are filled."""
    queries = (3, 1, 0, 2, 4, 1)
    ragged = replace(PAGED, queries=queries, is_packed=True, total_q=14, fields={"zero_padding": True})
    run_ragged_and_check(ragged, stream)


def test_rows_of_a_cache(stream):
    """By an index, in splits of each sequence."""
    rows = (3, 1, 0, 2, 4, 5)
    problem = RaggedProblem(replace(PAGED, page_size=0, rows=rows))
    for fields in ({}, {"num_splits": 3}, {"fixed_split_size": 256}):
        problem.check(*problem.run(stream, **fields))
