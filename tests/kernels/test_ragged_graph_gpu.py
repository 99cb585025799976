"""Ragged batches in CUDA graphs on the GPU: captured once with bounds, replayed with other lengths, tables, pages."""

from dataclasses import replace

import pytest
from cases import FP8, Case, with_heads
from check import assert_same_bits
from ragged_problems import Ragged, RaggedProblem
from workspaces import Workspace

from fa3_cute import forward, warmup, workspace_size

pytestmark = pytest.mark.gpu

CASE = Case("bf16", 128, True, 8, 2, 0, 0)
FP8_CASE = Case(FP8, 128, True, 8, 2, 0, 0, out_dtype="bf16")
# Bounds: 5 sequences, 300 rows, 1024 keys each; what is filled in at first is short.
BOUNDS = Ragged(CASE, (1, 1, 0, 2, 1), (3, 0, 5, 70, 1), capacity=1024, total_q=300)
# (queries, keys): all decodes, chunks and decodes, one chunk of all rows, nothing, lengths beyond the capacity.
REPLAYED = (
    ((1, 1, 1, 1, 1), (1024, 1, 777, 0, 64)),
    ((1, 150, 4, 17, 1), (1000, 400, 20, 129, 1024)),
    ((0, 300, 0, 0, 0), (0, 900, 0, 9, 0)),
    ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    ((16, 16, 15, 1, 0), (2**31 - 1, 100, 15, 5000, 0)),
    ((100, 1, 1, 1, 1), (100, 1023, 1024, 900, 3)),
)
# Of long sequences, which several clusters share.
LONG = replace(BOUNDS, case=with_heads(CASE, (4, 1)), capacity=8192, page_size=64, total_q=40)
LONG_REPLAYED = (
    ((1, 1, 1, 1, 1), (8192, 1, 777, 0, 64)),
    ((1, 30, 4, 1, 1), (40, 3000, 20, 8000, 300)),
    ((4, 1, 16, 1, 17), (2000, 2000, 2000, 2000, 3)),
)


def captured(problem, stream, **overrides):
    """`forward` as a graph; nothing is launched."""
    params = problem.params(**overrides)
    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    forward(params, builder).check()
    graph = builder.end_building().complete()
    assert problem.out.is_untouched(stream)
    return graph


def replay_all(problem, graph, streams, lengths=REPLAYED) -> None:
    """Other lengths, and with them other pages, tables and values; in turn on each stream."""
    for index, (queries, keys) in enumerate(lengths):
        stream = streams[index % len(streams)]
        problem.fill(queries, keys)
        graph.launch(stream)
        problem.check(*problem.results(stream))


@pytest.mark.parametrize(
    "fields",
    [{}, {"zero_padding": True}, {"num_splits": 6}, {"max_num_splits": 16}, {"fixed_split_size": 256}],
    ids=str,
)
@pytest.mark.parametrize("page_size", [16, 64, 0])
def test_replay_with_other_lengths(page_size, fields, device):
    stream, other = device.create_stream(), device.create_stream()
    problem = RaggedProblem(replace(BOUNDS, page_size=page_size, fields=fields))
    replay_all(problem, captured(problem, stream), (stream, other))


@pytest.mark.parametrize("case", [FP8_CASE, replace(CASE, is_causal=False, window=(60, 0))], ids=["fp8", "window"])
def test_replay_with_other_masks(case, device):
    stream = device.create_stream()
    problem = RaggedProblem(replace(BOUNDS, case=case))
    replay_all(problem, captured(problem, stream), (stream,))


def test_replay_with_other_rows_of_the_cache(device):
    """kv_batch_idx, too, is read at each replay."""
    stream = device.create_stream()
    for page_size in (16, 0):
        problem = RaggedProblem(replace(BOUNDS, page_size=page_size, rows=(4, 0, 7, 1, 1)))
        graph = captured(problem, stream)
        for rows in ((0, 1, 2, 3, 4), (7, 7, 7, 7, 0)):
            problem.ragged = replace(problem.ragged, rows=rows)
            problem.fill((1, 30, 4, 1, 1), (1000, 400, 20, 900, 1024))
            graph.launch(stream)
            problem.check(*problem.results(stream))


@pytest.mark.parametrize(
    "fields", [{}, {"num_splits": 48}, {"max_num_splits": 48}, {"fixed_split_size": 1024}], ids=str
)
def test_sequences_that_several_clusters_share(fields, device):
    """As many as their lengths ask for at each replay."""
    stream = device.create_stream()
    problem = RaggedProblem(replace(LONG, fields=fields))
    assert workspace_size(problem.params()) > 0
    replay_all(problem, captured(problem, stream), (stream,), LONG_REPLAYED)


def test_decodes_only(device):
    """A bound on the queries of a sequence: one kernel, and a longer one is right for all that."""
    stream = device.create_stream()
    problem = RaggedProblem(replace(BOUNDS, fields={"max_seqlen_q": 1}))
    replay_all(problem, captured(problem, stream), (stream,))


def test_replays_agree_bit_for_bit(device):
    """40 in a row: every one leaves counters and arrival counts at 0."""
    stream = device.create_stream()
    problem = RaggedProblem(LONG)
    graph = captured(problem, stream)
    problem.fill(*LONG_REPLAYED[1])
    expected = problem.run(stream)
    problem.check(*expected)
    for _ in range(40):
        problem.poison(stream)
        graph.launch(stream)
    assert_same_bits(problem.results(stream), expected)


def test_the_workspace_of_the_caller(device):
    """Enough for any lengths within the bounds; nothing around it is written."""
    stream = device.create_stream()
    problem = RaggedProblem(LONG)
    workspace = Workspace(workspace_size(problem.params()))
    before = workspace.parts(stream)[0]
    graph = captured(problem, stream, **workspace.fields)
    replay_all(problem, graph, (stream,), LONG_REPLAYED)
    assert (workspace.parts(stream)[0] == before).all()
