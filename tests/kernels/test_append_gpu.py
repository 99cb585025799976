"""New keys and values, rotary positions on the GPU: layouts, pairs, lengths, graphs; nothing else of a cache is
written."""

from dataclasses import replace

import numpy as np
import pytest
from test_decode_graph_gpu import captured
from updates import Update, UpdateProblem

from fa3_cute import forward, warmup
from fa3_cute.arrays import memory as cuda

pytestmark = pytest.mark.gpu

DECODE = Update()
PAGED = Update(page_size=64, is_indexed=True)
RAGGED = Update(
    new=(2, 0, 3, 70), packs_new=True, queries=(2, 5, 1, 70), packs_queries=True, page_size=64, is_indexed=True
)
ONE_ROW = Update(new=(1,) * 4, old=(0, 63, 512, 300))  # of a full sequence none is appended
PREFILL = Update(queries=(200,) * 4, new=(200,) * 4)
UPDATES = {
    "decode": DECODE,
    "paged": PAGED,
    "small pages": replace(RAGGED, page_size=1),
    "ragged": RAGGED,
    "dense cache": replace(RAGGED, page_size=0),
    "prefill": PREFILL,
    "one row": ONE_ROW,
    "one row of pages": replace(ONE_ROW, page_size=64, is_indexed=True),
    "one row of small pages": replace(ONE_ROW, page_size=1, queries=(2,) * 4),
    "full": replace(DECODE, is_causal=False, queries=(3,) * 4),
}
ROTARY = {
    "halves": {"rotary": "halves"},
    "neighbours": {"rotary": "neighbours", "table_dtype": "bf16", "rotary_dim": 128, "starts": (9, 560, 0, 300)},
}


def run(update: Update, stream, **changes) -> UpdateProblem:
    problem = UpdateProblem(update)
    problem.upload(stream)
    forward(problem.params(**changes), stream).check()
    problem.check(problem.results(stream))
    return problem


@pytest.mark.parametrize("rotary", [{}, *ROTARY.values()], ids=["plain", *ROTARY])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_updates(update, rotary, stream):
    run(replace(update, **rotary), stream)


@pytest.mark.parametrize("rotary", [{}, ROTARY["halves"]], ids=["plain", "halves"])
def test_one_row_of_sequences_without_queries(rotary, stream):
    """They are appended to all the same; and where CTAs share a KV head, and split its keys."""
    update = replace(ONE_ROW, queries=(1, 0, 2, 0), packs_queries=True, page_size=64, is_indexed=True, **rotary)
    run(update, stream, max_seqlen_q=2)
    many = replace(ONE_ROW, old=(4000, 5, 4093, 1), capacity=4096, heads=(16, 2), queries=(9,) * 4, **rotary)
    run(many, stream, num_splits=6)
    run(replace(many, queries=(1,) * 4), stream, pack_gqa=False)


@pytest.mark.parametrize("update", [DECODE, PREFILL, RAGGED], ids=["decode", "prefill", "ragged"])
def test_queries_alone(update, stream):
    run(replace(update, new=None, packs_new=False, rotary="halves", rotary_dim=32), stream)


@pytest.mark.parametrize("head_dim, dtype", [(64, "fp16"), (256, "bf16"), (128, "fp8_e4m3")])
def test_head_dims_and_types(head_dim, dtype, stream):
    rotary = {} if dtype == "fp8_e4m3" else {"rotary": "neighbours", "table_dtype": dtype, "rotary_dim": head_dim}
    run(replace(PAGED, head_dim=head_dim, dtype=dtype, **rotary), stream)


@pytest.mark.parametrize("update", [DECODE, ONE_ROW, RAGGED], ids=["decode", "one row", "ragged"])
@pytest.mark.parametrize("dims", [(192, 128), (64, 128)], ids=str)
def test_values_of_other_columns(dims, update, stream):
    """Rows of v with fewer pieces than those of k, and with more."""
    head_dim, head_dim_v = dims
    run(replace(update, head_dim=head_dim, head_dim_v=head_dim_v, rotary="halves"), stream)


def test_splits_and_many_sequences(stream):
    """Of partial results and what is made ahead neither overwrites the other; 1,100 sequences are searched in steps."""
    run(replace(DECODE, rotary="halves", capacity=4096, old=(4000, 5, 4093, 1)), stream, num_splits=48)
    count = 1100
    old = tuple(np.random.default_rng(1).integers(0, 60, count).tolist())
    new = tuple(np.random.default_rng(2).integers(0, 4, count).tolist())
    many = replace(RAGGED, old=old, new=new, queries=(1,) * count, capacity=64, rotary="halves")
    run(replace(many, heads=(2, 1), page_size=0, is_indexed=False), stream)


def test_a_graph_of_steps(device):
    """Captured once, replayed with other lengths, on what the caches then hold."""
    stream = device.create_stream()
    update = replace(PAGED, rotary="halves", table_dtype="bf16", rotary_dim=128)
    problem = UpdateProblem(update)
    problem.upload(stream)
    warmup(problem.params(), stream).check()
    graph = captured(stream, problem.params())
    for old in ((0, 5, 511, 300), (3, 8, 511, 303), (0, 500, 1, 64)):
        problem = fresh(problem, replace(update, old=old), stream)
        graph.launch(stream)
        problem.check(problem.results(stream))


def test_steps_read_what_those_ahead_wrote(device):
    """Of a graph every launch starts before the one ahead has ended, attention's before new rows are there: the bits
    are those of steps that were waited for."""
    stream = device.create_stream()
    problem = UpdateProblem(replace(DECODE, heads=(4, 4), new=(1,) * 4, rotary="halves"))
    problem.upload(stream)
    other = cuda.allocate(problem.arrays["q"].nbytes, stream=stream)
    places = [cuda.address(buffer) for buffer in (problem.buffers["q"], *(problem.out, other) * 10, problem.out)]
    steps = [problem.params(q=x, k_new=x, v_new=x, out=y) for x, y in zip(places, places[1:], strict=False)]
    for step in steps:
        forward(step, stream).check()
        stream.sync()
    expected = problem.results(stream)
    graph = captured(stream, *steps)
    for _ in range(3):
        problem = fresh(problem, problem.update, stream)
        graph.launch(stream)
        for name, found in problem.results(stream).items():
            assert np.array_equal(found.view(np.uint8), expected[name].view(np.uint8)), name


def fresh(before: UpdateProblem, update: Update, stream) -> UpdateProblem:
    """A problem of other lengths in the same buffers."""
    problem = UpdateProblem(update)
    problem.buffers = before.buffers
    problem.upload(stream)
    problem.out, problem.lse = before.out, before.lse
    return problem


def test_rows_beyond_what_there_is(stream):
    """Lengths that are negative or beyond the capacity, pages that do not exist: nothing else is written."""
    problem = UpdateProblem(replace(PAGED, old=(512, 0, 64, 64)))
    arrays = problem.arrays
    arrays["seqused_k"][:] = 600, -5, 64, 64
    entries = arrays["kv_batch_idx"]
    arrays["page_table"][entries[2], 1] = -1
    arrays["page_table"][entries[3], 1] = len(arrays["k"])
    problem.upload(stream)
    forward(problem.params(), stream).check()
    found = problem.results(stream)
    page = arrays["page_table"][entries[1], 0]
    for name in ("k", "v"):
        expected = arrays[name].copy()
        expected[page, :3] = arrays[f"{name}_new"][1]
        assert np.array_equal(found[name], expected)
