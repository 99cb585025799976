"""Heads of 512 with K and V of their own, and q_v: 64 columns of Q and K beside 512 of q_v and V, on the GPU. What no
sequence uses is NaN."""

from dataclasses import replace

import pytest
from cases import Case, Layout
from check import make_problem, packed_problem, run, check, run_each_and_check
from images import contiguous, padded
from ragged_problems import Ragged, RaggedProblem
from ragged_problems import run_and_check as run_ragged_and_check

pytestmark = pytest.mark.gpu

# By one CTA; a cluster; several CTAs without a cluster; several clusters.
SPLITS = [{}, {"num_splits": 1}, {"num_splits": 4}, {"num_splits": 11}, {"num_splits": 32}]
LARGE = Case("bf16", 512, False, 16, 2, 1, 3000, batch=3)
WITH_QV = Case("bf16", 64, False, 16, 1, 1, 3000, batch=3, head_dim_v=512)
LENGTHS = (0, 1, 31, 65, 700, 1024)
PAGED = Ragged(replace(LARGE, is_causal=True), (4,) * 6, LENGTHS, page_size=64, is_packed=False)
PAGED_QV = replace(PAGED, case=replace(WITH_QV, is_causal=True))


@pytest.mark.parametrize("case, place", [(LARGE, padded), (WITH_QV, padded)], ids=["512", "q_v"])
def test_few_rows(case, place, stream):
    run_each_and_check(make_problem(case, place), stream, SPLITS)


@pytest.mark.parametrize("case", [LARGE, WITH_QV], ids=["512", "q_v"])
def test_many_causal_rows(case, stream):
    """M tiles that begin and end within queries, and rows without a key; three query heads of each KV head."""
    case = replace(case, dtype="fp16", is_causal=True, num_heads=6, num_heads_k=2, seqlen_q=100, seqlen_k=97)
    run_each_and_check(make_problem(case, contiguous), stream, [{}, {"num_splits": 3}])


@pytest.mark.parametrize(
    "ragged",
    [PAGED, replace(PAGED, layout="odd", page_size=16), PAGED_QV],
    ids=["512", "512 in narrow boxes", "q_v"],
)
def test_pages(ragged, stream):
    """Four causal queries."""
    run_ragged_and_check(ragged, stream)


def test_packed_queries_over_pages(stream):
    """Some sequences have none; rows behind the last are filled."""
    queries = (3, 1, 0, 2, 4, 1)
    changes = {"queries": queries, "is_packed": True, "total_q": 14, "fields": {"zero_padding": True}}
    run_ragged_and_check(replace(PAGED, **changes), stream)


@pytest.mark.parametrize("case", [LARGE, WITH_QV], ids=["512", "q_v"])
def test_packed_keys(case, stream):
    """A prompt, a chunk of one, and a token."""
    family = replace(case, dtype="fp16", is_causal=True, num_heads=2, num_heads_k=1)
    problem = packed_problem(family, Layout((130, 20, 1), (130, 77, 60), 3, 2))
    check(problem, *run(problem, stream))


def test_rows_of_a_cache_with_qv(stream):
    """By an index, in splits of each sequence."""
    problem = RaggedProblem(replace(PAGED_QV, page_size=0, rows=(3, 1, 0, 2, 4, 5)))
    for fields in ({}, {"num_splits": 3}, {"fixed_split_size": 256}):
        problem.check(*problem.run(stream, **fields))
