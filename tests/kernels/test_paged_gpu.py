"""K and V in pages and in rows of a cache on the GPU: layouts, page sizes, tables, and NaN in all that is not used."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, FP8_HEAD_DIMS, HEAD_DIMS, HEADS, Case, with_heads
from check import assert_same_bits
from descales import different, per_batch_and_head
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import POISON
from ragged_problems import POOLS, Ragged, RaggedProblem, run_and_check

from fa3_cute.arrays import memory as cuda

pytestmark = pytest.mark.gpu

CASE = Case("bf16", 128, True, 8, 2, 0, 0)
KEYS = (1000, 1, 513, 0, 64, 2100)
DECODES = Ragged(CASE, (1,) * 6, KEYS, fields={"max_seqlen_q": 1})
# Both kernels: sequences of up to 16 queries are the decode kernel's.
MIXED = Ragged(CASE, (1, 300, 4, 129, 1, 0), (1000, 400, 20, 129, 2100, 50))
CHUNKS = Ragged(CASE, (300, 129, 17), (400, 129, 900), fields={"max_seqlen_q": 300})
WINDOW = replace(CASE, is_causal=False, window=(60, 0))
PAGE_SIZES = (1, 8, 12, 16, 24, 32, 48, 64, 128, 528)  # 1 and 12: row by row


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_layouts(ragged, layout, stream):
    """Whatever lies between pages, rows and heads is not touched; inputs stay as they are."""
    problem = RaggedProblem(replace(ragged, layout=layout))
    problem.check(*problem.run(stream))
    for tensor in problem.inputs:
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


@pytest.mark.parametrize("layout", ["nhd", "odd"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size, layout, stream):
    run_and_check(replace(MIXED, page_size=page_size, layout=layout), stream)


@pytest.mark.parametrize("mask", [CASE, WINDOW, replace(CASE, is_causal=False)], ids=["causal", "window", "full"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, mask, stream):
    case = replace(mask, head_dim=head_dim, dtype="fp16" if head_dim in (96, 192) else "bf16")
    run_and_check(replace(MIXED, case=case), stream)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("window", [(-1, -1), (60, 0)], ids=["causal", "window"])
@pytest.mark.parametrize("head_dim", FP8_HEAD_DIMS)
def test_fp8(head_dim, window, page_size, stream):
    case = Case(FP8, head_dim, window == (-1, -1), 8, 2, 0, 0, window=window, out_dtype="bf16")
    for descale in (None, per_batch_and_head, different):
        run_and_check(replace(MIXED, case=case, page_size=page_size), stream, descale)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_head_ratios(heads, layout, stream):
    run_and_check(replace(MIXED, case=with_heads(CASE, heads), layout=layout), stream)


@pytest.mark.parametrize("ragged", [DECODES, CHUNKS], ids=["decodes", "chunks"])
def test_without_lse(ragged, stream):
    run_and_check(replace(ragged, case=replace(CASE, has_lse=False)), stream)


# ---- the cache, dense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, (4, 0, 7, 1, 1, 2)], ids=["own", "kv_batch_idx"])
@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_cache_rows(ragged, rows, stream):
    """Two sequences of one row too; rows behind the used ones are NaN, and so are entries that nobody has."""
    run_and_check(replace(ragged, page_size=0, rows=rows), stream)


@pytest.mark.parametrize("splits", [{"num_splits": 1}, {"num_splits": 6}, {"fixed_split_size": 256}], ids=str)
@pytest.mark.parametrize("case", [CASE, WINDOW, Case(FP8, 128, True, 8, 2, 0, 0, out_dtype="bf16")], ids=str)
def test_pages_give_the_bits_of_the_cache(case, splits, stream):
    """For boxes of every kind; the capacity is the same."""
    base = replace(MIXED, case=case, capacity=2304, fields=splits)
    expected = RaggedProblem(replace(base, page_size=0))
    wanted = expected.run(stream)
    expected.check(*wanted)
    for page_size, layout in ((16, "nhd"), (16, "odd"), (64, "hnd"), (8, "nhd"), (1, "nhd")):
        found = RaggedProblem(replace(base, page_size=page_size, layout=layout))
        assert np.array_equal(found.q.array, expected.q.array)
        assert_same_bits(found.run(stream), wanted)


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [-1, 2**31 - 1, -(2**31), 3])
@pytest.mark.parametrize("case", [CASE, WINDOW], ids=["causal", "window"])
def test_ids_behind_the_used_pages(case, stale, stream):
    """They are not read: whether they are none, beyond the pool, or another sequence's pages."""
    run_and_check(replace(MIXED, case=case, stale=stale), stream)


@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("page_size", [16, 64, 0])
def test_lengths_beyond_the_capacity(page_size, ragged, stream):
    """They are the capacity."""
    keys = (2**31 - 1, 1025, 513, 0, 1024, 10**9)
    run_and_check(replace(ragged, keys=keys, capacity=1024, page_size=page_size), stream)


@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_shared_pages(page_size, ragged, stream):
    """A prefix of all sequences."""
    keys = (1000, 400, 256, 300, 257, 900)
    run_and_check(replace(ragged, keys=keys, shared=256 // page_size, page_size=page_size), stream)


@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_rows_of_the_table(ragged, stream):
    """In any order, two sequences with the same one."""
    run_and_check(replace(ragged, rows=(4, 0, 7, 1, 1, 2)), stream)


@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "chunk"])
def test_tables_of_a_thousand_pages(queries, stream):
    """The pool's last page is among them."""
    keys = (16_500, 3, 16_000)
    run_and_check(Ragged(with_heads(CASE, (4, 1)), (queries,) * 3, keys, fields={"max_seqlen_q": queries}), stream)


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("layout", ["nhd", "odd"])
@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (5, 1, 200, 70)], ids=["decodes", "mixed"])
def test_pages_left_of_a_window_hold_nan(queries, layout, page_size, stream):
    """All of them one page that holds nothing but NaN, and so do rows of the first that is seen."""
    case, keys = replace(WINDOW, window=(100, 0)), (1000, 77, 900, 333)
    run_and_check(Ragged(case, queries, keys, page_size, layout), stream, is_evicted=True)


@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (5, 1, 200, 70)], ids=["decodes", "mixed"])
@pytest.mark.parametrize("head_dim", FP8_HEAD_DIMS)
def test_pages_left_of_a_window_hold_nan_in_fp8(head_dim, queries, stream):
    case = Case(FP8, head_dim, False, 8, 2, 0, 0, window=(100, 0), out_dtype="bf16")
    run_and_check(Ragged(case, queries, (1000, 77, 900, 333)), stream, is_evicted=True)


@st.composite
def batches(draw) -> Ragged:
    """Pages of any size, any layout, masks, heads and lengths."""
    count = draw(st.sampled_from((1, 2, 5, 33)))
    length = st.one_of(st.just(1), st.integers(0, 20), st.integers(0, 150 if count > 5 else 300))
    queries = draw(st.lists(length, min_size=count, max_size=count))
    keys = draw(st.lists(st.integers(0, 700), min_size=count, max_size=count))
    case = draw(st.sampled_from((CASE, WINDOW, replace(CASE, is_causal=False))))
    return Ragged(
        with_heads(case, draw(st.sampled_from(list(HEADS.values())))),
        (*queries, 1),
        (*keys, 1),
        page_size=draw(st.sampled_from((1, 8, 13, 16, 40, 64, 112, 256))),
        layout=draw(st.sampled_from(list(POOLS))),
        capacity=draw(st.sampled_from((0, 500, 1024))),
        stale=draw(st.sampled_from((-1, 2**31 - 1))),
        fields={"max_num_splits": draw(st.sampled_from((0, 1, 7)))},
    )


def test_random_pages(stream):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(batches())
    def test(ragged):
        run_and_check(ragged, stream)

    test()


# ---- pools beyond 2^31 elements ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1 << 21, (1 << 21) + 64], ids=["wide", "narrow"])
@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_pools_beyond_31_bits(ragged, stride, much_memory, stream):
    """One layer of a pool of many: pages 4 MiB apart, those in use more than 2^31 elements from the first."""
    small = RaggedProblem(replace(ragged, page_size=64))
    pages, page_bytes = small.num_pages, small.k.array[0].nbytes
    num_pages, v_offset = 1024 + pages, 1 << 21
    buffer = cuda.allocate(2 * stride * num_pages)
    try:
        cuda.fill(buffer, POISON)
        for page in range(pages):
            start = 2 * stride * (num_pages - 1 - page)
            for tensor, offset in ((small.k, 0), (small.v, v_offset)):
                place = cuda.window(buffer, start + offset, page_bytes)
                cuda.upload(np.ascontiguousarray(tensor.array[page]), place)
        table = small.table.array
        table[table >= 0] = num_pages - 1 - table[table >= 0]
        small.table.image.upload()
        pool = {"k": cuda.address(buffer), "v": cuda.address(buffer, v_offset), "num_pages": num_pages}
        small.check(*small.run(stream, **pool, k_batch_stride=stride, v_batch_stride=stride))
    finally:
        stream.sync()
        buffer.close()
