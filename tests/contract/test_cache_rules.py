"""The rules of caches, pages, splits and what packed queries add: what is accepted, what is refused and how."""

from dataclasses import replace

import pytest
from cache_calls import CACHES, PACKED_CACHE, PACKED_PAGED, PAGED
from rule_calls import BF16, DECODE, DENSE, FP8, PACKED, A, Array, Handle, every, first_problem

from fa3_cute.contract.limits import MAX_MASKED_ROWS, MAX_SIZE
from fa3_cute.contract.scores import MASK_STRIDES
from fa3_cute.contract.status import Status, error_for
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import STRIDES, ProblemShape

NO_KV_STRIDES = every("k_row_stride v_row_stride k_batch_stride v_batch_stride", 0)
ROWS = {"kv_batch_idx": A, "batch_size_k": 2}

ACCEPTED = [
    *((call, {}) for call in CACHES),
    *((call, {"dtype": dtype}) for call in CACHES for dtype in (BF16, FP8)),
    *(
        (call, changes)
        for call in (*CACHES, DENSE, PACKED)
        for changes in (
            {"num_splits": 256},
            {"num_splits": 4, "max_num_splits": 4},
            {"max_num_splits": 256},
            {"fixed_split_size": 3},
            {"fixed_split_size": 64, "num_splits": 1},
            {"fixed_split_size": 10**30},
            {"fixed_split_size": 176, "max_num_splits": 4},
            {"pack_gqa": True, "is_causal": True},
            {"sm_margin": 8, "scheduler_metadata": A + 1},
            {"scheduler_metadata": Handle()},
        )
    ),
    *((call, {"zero_padding": flag}) for call in (PACKED, PACKED_CACHE, PACKED_PAGED) for flag in (True, 1)),
    *((call, {"max_seqlen_q": rows}) for call in (PACKED, PACKED_CACHE, PACKED_PAGED) for rows in (1, MAX_SIZE)),
    # a cache of more entries, fewer with kv_batch_idx; the ones of a table are its rows
    *((call, {"batch_size_k": entries}) for call in (*CACHES, DENSE) for entries in (3, 1000, MAX_SIZE)),
    *((call, ROWS | {"batch_size_k": entries}) for call in (*CACHES, DENSE) for entries in (1, 2, 1000)),
    # NHD, HND, K and V interleaved by head, by row and by page, one layer of 32, pages of one row
    (PAGED, every("k_batch_stride v_batch_stride", 16 * 4 * 128) | every("k_row_stride v_row_stride", 4 * 128)),
    (PAGED, every("k_row_stride v_row_stride", 128) | every("k_head_stride v_head_stride", 16 * 128)),
    (PAGED, every("k_head_stride v_head_stride", 2 * 128) | every("k_row_stride v_row_stride", 2 * 4 * 128)),
    (PAGED, every("k_row_stride v_row_stride", 2 * 4 * 128) | {"k_batch_stride": 2 * 16 * 4 * 128}),
    (PAGED, {"k_batch_stride": 2 * 16 * 4 * 128}),
    (PACKED_PAGED, every("k_batch_stride v_batch_stride", 32 * 2 * 16 * 4 * 128)),
    (PAGED, {"k_batch_stride": 2**39 - 8, "num_pages": MAX_SIZE}),
    (PAGED, {"page_size": 1, "k_row_stride": 3, "num_pages": 1, "v_batch_stride": -1}),
    *((PAGED, {"page_size": rows, "seqlen_k": 33 * rows}) for rows in (1, 2, 3, 8, 48, 528)),
    *((PACKED_PAGED, {"page_table_batch_stride": stride}) for stride in (0, 7, 40, MAX_SIZE)),
    (PAGED, {"batch_size": 1, "page_table_batch_stride": 2**62}),
    (PACKED_PAGED, {"mode": 2, "seqlen_q": -5, "total_q": 0} | every("q out", None)),
    (PACKED_CACHE, {"total_q": 0} | every("q out", 0)),
    (PAGED, {"mode": DECODE, "seqlen_q": 1}),
    (DENSE, every("page_table kv_batch_idx scheduler_metadata", 0)),
    (DENSE, {"page_table_batch_stride": 0}),
    (PACKED_CACHE, {"is_causal": True, "seqlen_k": MAX_MASKED_ROWS - 896} | NO_KV_STRIDES),
    (PACKED, every("seqlen_q seqlen_k", -5)),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    assert problems(replace(base, **changes)) == []
    assert first_problem(replace(base, **changes)) is None


# status, the good call, what is changed, the words that its one sentence must have.
REFUSED = [
    # null tensors: those without rows alone
    *((-1, call, {name: None}, (f"{name}=None",)) for call in CACHES for name in ("q", "k", "v", "out")),
    *((-1, call, {"total_q": 0, name: None}, (f"{name}=None",)) for call in CACHES[1:] for name in "kv"),
    # what packs
    (-6, DENSE, {"cu_seqlens_k": A, "mode": 2, "total_k": 700}, ("cu_seqlens_q=None", "need packed queries")),
    (-6, PACKED_CACHE, {"cu_seqlens_q": 0}, ("cu_seqlens_q=0", "packed queries")),
    (-6, PACKED_CACHE, {"seqused_k": None}, ("cu_seqlens_k=None", "or seqused_k")),
    (-6, PACKED, {"page_table": A, "seqused_k": A, "page_size": 16, "num_pages": 9}, ("page_table=", "cu_seqlens_k")),
    (-6, PACKED, {"kv_batch_idx": A}, ("kv_batch_idx=", "None or 0 with cu_seqlens_k")),
    (-6, PACKED, {"batch_size_k": 3}, ("batch_size_k=3", "None or 0 with cu_seqlens_k")),
    *((-6, call, {"total_k": 700}, ("total_k=700", "without cu_seqlens_k")) for call in (PACKED_CACHE, PACKED_PAGED)),
    *(
        (-6, call, {"mode": mode}, ("mode=", "VARLEN_PREFILL with cu_seqlens_q"))
        for call in CACHES[1:]
        for mode in (0, 1)
    ),
    *(
        (-6, call, {name: 896}, (f"{name}=896", "without cu_seqlens_q"))
        for call in (DENSE, PAGED)
        for name in ("total_q", "total_k", "max_seqlen_q")
    ),
    # sizes
    *(
        (-7, call, {"seqlen_k": value}, (f"seqlen_k={value!r}", f"from 1 to {MAX_SIZE}"))
        for call in CACHES
        for value in (0, -16, None, 16.0)
    ),
    *((-7, call, {"total_q": value}, (f"total_q={value!r}", "from 0")) for call in CACHES[1:] for value in (-1, None)),
    *(
        (-7, call, ROWS | {"batch_size_k": value}, (f"batch_size_k={value!r}", "from 1", "with kv_batch_idx"))
        for call in CACHES
        for value in (0, -1, None, 2.0, MAX_SIZE + 1)
    ),
    *(
        (-7, call, {"batch_size_k": value}, (f"batch_size_k={value!r}", "from batch_size=", "without kv_batch_idx"))
        for call in (*CACHES, DENSE)
        for value in (1, -3, "4", MAX_SIZE + 1)
    ),
    *((-7, PACKED, {"max_seqlen_q": value}, (f"max_seqlen_q={value!r}", "from 0")) for value in (-1, None, "8", 2**31)),
    (-7, PAGED, {"k_row_stride": 516}, ("k_row_stride=516", "multiple of 8 elements")),
    (-7, PACKED_PAGED, {"v_batch_stride": 2**39}, (f"v_batch_stride={2**39}", f"below {2**39}")),
    (
        -7,
        PAGED,
        {"page_size": 2**27, "seqlen_k": 2**27, "head_dim": 256, "num_heads_k": 16},
        (f"k_batch_stride=None (contiguous: {2**39})", f"below {2**39}"),
    ),
    (-7, PAGED, {"k_head_stride": -128}, ("k_head_stride=-128", "at least 0")),
    (
        -7,
        PACKED_PAGED,
        {"is_causal": True, "seqlen_k": MAX_MASKED_ROWS - 880},
        ("total_q=896, seqlen_k=", f"at most {MAX_MASKED_ROWS}"),
    ),
    (
        -7,
        replace(PACKED_CACHE, batch_size=2**22),
        {"fixed_split_size": 4, "seqlen_k": 1000},
        ("total_q=896 in 250 splits", "2147483647 tiles"),
    ),
    # flags, margins, pointers
    *((-9, PACKED, {"zero_padding": value}, (f"zero_padding={value!r}", "True or False")) for value in (2, None, "no")),
    *((-9, call, {"zero_padding": True}, ("zero_padding=True", "without cu_seqlens_q")) for call in (DENSE, PAGED)),
    *((-9, DENSE, {"sm_margin": value}, (f"sm_margin={value!r}", "at least 0")) for value in (-1, 1.0, None)),
    *((-9, PAGED, {name: A + 2}, (f"{name}=", "4 bytes")) for name in ("page_table", "seqused_k")),
    *((-9, call, ROWS | {"kv_batch_idx": A + 1}, ("kv_batch_idx=", "4 bytes")) for call in (*CACHES, DENSE)),
    *((-9, DENSE, {"scheduler_metadata": value}, ("scheduler_metadata=", "address")) for value in (Array(), -4, "x")),
    *(
        (-9, DENSE, {name: value}, (f"{name}={value!r}", "an int"))
        for name in ("num_splits", "max_num_splits", "fixed_split_size")
        for value in (1.0, None, "2", True)
    ),
    # splits
    *(
        (-13, call, {"max_num_splits": value}, (f"max_num_splits={value}", "256"))
        for call in CACHES
        for value in (-1, 257)
    ),
    (-13, DENSE, {"fixed_split_size": -64}, ("fixed_split_size=-64", "at least 0")),
    *(
        (-13, call, {"num_splits": 2, "fixed_split_size": 64}, ("num_splits=2", "fixed_split_size=64"))
        for call in CACHES
    ),
    (-13, PACKED, {"num_splits": 5, "max_num_splits": 4}, ("num_splits=5", "max_num_splits=4")),
    *((-13, call, {"fixed_split_size": 2}, ("fixed_split_size=2", "at least 3", "seqlen_k=640")) for call in CACHES),
    (-13, PACKED, {"fixed_split_size": 2}, ("fixed_split_size=2", "at least 3", "total_k=700")),
    (-13, PAGED, {"fixed_split_size": 159, "max_num_splits": 4}, ("at least 160", "at most 4 splits")),
    # pages
    *((-14, call, {"seqused_k": None}, ("seqused_k=None", "with page_table")) for call in (PAGED, PACKED_PAGED)),
    *(
        (-14, call, {name: value}, (f"{name}={value!r}", f"from 1 to {MAX_SIZE}"))
        for call in (PAGED, PACKED_PAGED)
        for name in ("page_size", "num_pages")
        for value in (0, -1, None, 16.0, "16", MAX_SIZE + 1)
    ),
    *((-14, PAGED, {"seqlen_k": value}, (f"seqlen_k={value}", "multiple of page_size=16")) for value in (1, 15, 632)),
    *(
        (-14, PAGED, {"page_table_batch_stride": value}, (f"page_table_batch_stride={value!r}", "from 0"))
        for value in (-1, 2.0, "40", MAX_SIZE + 1)
    ),
    *(
        (-14, call, {name: 16}, (f"{name}=16", "without page_table"))
        for call in (DENSE, PACKED, PACKED_CACHE)
        for name in ("page_size", "num_pages", "page_table_batch_stride")
    ),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    found = problems(params)
    assert found, "accepted"
    assert first_problem(params) == found[0] and found[0].status == status, found
    same = [problem for problem in found if problem.status == status]
    assert any(all(word in problem.detail for word in words) for problem in same), same


@pytest.mark.parametrize("status", [-11, -13, -14, -15])
def test_bad_values_of_features_are_value_errors(status):
    error = error_for(Status(status))
    assert isinstance(error, ValueError) and not isinstance(error, NotImplementedError)


# ---- the shape of such calls -----------------------------------------------------------------------------------------


def strides_of(params) -> dict:
    shape = ProblemShape.of(params)
    names = *STRIDES, "page_table_batch_stride", "alibi_batch_stride", *MASK_STRIDES
    return dict(zip(names, shape.strides, strict=True))


def test_a_pool_has_the_strides_of_its_pages():
    for call in (PAGED, PACKED_PAGED):
        strides = strides_of(call)
        assert [strides[f"k_{dim}_stride"] for dim in ("batch", "row", "head")] == [16 * 4 * 128, 4 * 128, 128]
        assert strides["page_table_batch_stride"] == 40
        assert strides_of(replace(call, page_table_batch_stride=7))["page_table_batch_stride"] == 7
    assert strides_of(replace(PAGED, batch_size=1, page_table_batch_stride=2**62))["page_table_batch_stride"] == 40
    # a table that is one row for all sequences is still as many as there are
    assert strides_of(replace(PAGED, page_table_batch_stride=0))["page_table_batch_stride"] == 0
    assert strides_of(replace(PAGED, num_pages=1, k_batch_stride=5))["k_batch_stride"] == 16 * 4 * 128


def test_a_cache_of_packed_queries_has_its_own_batch_stride():
    strides = strides_of(PACKED_CACHE)
    assert strides["k_batch_stride"] == 640 * 4 * 128 and strides["q_batch_stride"] == 0
    assert strides_of(PACKED)["k_batch_stride"] == 0


def test_what_a_shape_says_of_them():
    shape = ProblemShape.of(replace(PACKED_PAGED, max_seqlen_q=64, zero_padding=True, **ROWS))
    assert (shape.is_packed, shape.has_packed_keys, shape.is_paged) == (True, False, True)
    assert (shape.seqlen_q, shape.seqlen_k, shape.page_size, shape.num_pages) == (896, 640, 16, 100)
    assert (shape.batch_size_k, shape.max_seqlen_q, shape.zero_padding) == (2, 64, True)
    assert ProblemShape.of(PACKED_CACHE).batch_size_k == 3
    assert not ProblemShape.of(DENSE).is_paged and ProblemShape.of(PACKED).has_packed_keys
