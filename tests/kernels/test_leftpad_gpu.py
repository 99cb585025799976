"""Keys whose first rows do not exist, on the GPU: both kernels, dense caches and pages, masks, splits, appended rows.
All rows that do not exist hold NaN."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, Case
from ragged_problems import Ragged, RaggedProblem, run_and_check
from test_decode_graph_gpu import captured
from updates import Update, UpdateProblem

from fa3_cute import forward, warmup

pytestmark = pytest.mark.gpu

CASE = Case("bf16", 128, True, 8, 2, 0, 0)
WINDOW = replace(CASE, is_causal=False, window=(60, 0))
CHUNKS = replace(CASE, attention_chunk=100)
# A tile and a bit, less than a tile, nothing, more than there is, all, all but one.
PADS = (70, 5, 0, 300, 64, 2099)
KEYS = (1000, 200, 513, 120, 64, 2100)
DECODES = Ragged(CASE, (1,) * 6, KEYS, leftpad=PADS, fields={"max_seqlen_q": 1})
MIXED = Ragged(CASE, (1, 190, 4, 129, 1, 0), KEYS, leftpad=PADS)
E4M3 = Case(FP8, 128, True, 8, 2, 0, 0, out_dtype="bf16")


@pytest.mark.parametrize("page_size", [0, 64], ids=["cache", "pages"])
@pytest.mark.parametrize("case", [CASE, WINDOW, E4M3], ids=["causal", "window", "fp8"])
def test_masks(case, page_size, stream):
    run_and_check(replace(MIXED, case=case, page_size=page_size), stream)


def test_chunks_and_sinks(stream):
    """Chunks begin with the first key that exists."""
    case = replace(CHUNKS, sinks=(0.5, -1.0), softcap=20.0)
    run_and_check(replace(MIXED, case=case, page_size=0, rows=(4, 0, 7, 1, 3, 2)), stream)


@pytest.mark.parametrize("splits", [{"num_splits": 6}, {"fixed_split_size": 256}], ids=str)
def test_splits(splits, stream):
    """Of decode, by number and by size, over pages."""
    run_and_check(replace(DECODES, fields=DECODES.fields | splits), stream)


@pytest.mark.parametrize("queries", [1, 150], ids=["decode", "prefill"])
def test_dense_queries_without_used_lengths(queries, stream):
    """Padding alone; the decode and the forward kernel."""
    case = replace(CASE, is_causal=queries > 1)
    ragged = Ragged(case, (queries,) * 3, (600,) * 3, 0, leftpad=(0, 65, 460), is_packed=False)
    run_and_check(replace(ragged, fields={"seqused_k": None, "seqused_q": None}), stream)


@pytest.mark.parametrize("page_size", [0, 64], ids=["cache", "pages"])
def test_appended_rows(page_size, stream):
    """They lie behind the old rows, which padding counts among; so do rotary positions."""
    update = Update(leftpad=(0, 5, 130, 3), page_size=page_size, is_indexed=True, rotary="halves")
    problem = UpdateProblem(update)
    problem.upload(stream)
    forward(problem.params(), stream).check()
    problem.check(problem.results(stream))


def test_a_graph_with_other_padding(device):
    """What is in device memory may change between replays, beyond what there is too."""
    stream = device.create_stream()
    problem = RaggedProblem(replace(DECODES, page_size=0))
    warmup(problem.params(), stream).check()
    graph = captured(stream, problem.params())
    for pads in (PADS, (0,) * 6, (999, 199, 0, 64, 63, 1)):
        problem.ragged = replace(problem.ragged, leftpad=pads)
        problem.fill(problem.ragged.queries, KEYS)
        graph.launch(stream)
        problem.check(*problem.results(stream))


def test_negative_padding_is_none(stream):
    problem = RaggedProblem(replace(DECODES, leftpad=(0,) * 6))
    expected, _ = problem.run(stream)
    problem.lengths["leftpad_k"].array[...] = -7
    problem.lengths["leftpad_k"].image.upload()
    out, lse = problem.run(stream)
    problem.check(out, lse)
    assert np.array_equal(out, expected)
