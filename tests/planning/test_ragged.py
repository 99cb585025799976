"""Plans of ragged batches: which kernels serve a call, over which source, and that they depend on bounds alone."""

from dataclasses import replace

import pytest
from cache_calls import CACHES, PACKED_CACHE, PACKED_PAGED, PAGED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_calls import DECODE, DENSE, FP8, PACKED, A

from fa3_cute import explain, workspace_size
from fa3_cute.contract.plain import plain
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.ragged import UNLIMITED, Kernels, kernels_of, max_queries
from fa3_cute.planning.splits import CLUSTER_SLOTS, MAX_DECODE_ROWS

# All calls have 16 heads over 4: an M tile holds 16 queries.
ONE_TOKEN = replace(PAGED, seqlen_q=1)
DECODES = replace(PACKED_PAGED, batch_size=64, total_q=64)


def shape_of(params) -> ProblemShape:
    assert explain(params) == [], explain(params)
    return ProblemShape.of(plain(params))


def launches(params):
    return operation_of(shape_of(params)).launches


def kinds(params) -> str:
    """Of its launches: d or f, capital if the kernel is one of ragged batches."""
    letters = ("d" if launch.config.packs_heads else "f" for launch in launches(params))
    pairs = zip(letters, launches(params), strict=True)
    return "".join(letter.upper() if launch.config.is_ragged else letter for letter, launch in pairs)


# ---- which kernels -------------------------------------------------------------------------------------------------

SERVED = {
    # Dense queries: one kernel, by their number.
    "dense": (DENSE, "f"),
    "dense, one token": (replace(DENSE, seqlen_q=1), "d"),
    "dense, used lengths": (replace(DENSE, seqused_k=A), "f"),
    "dense, one token, used lengths": (replace(DENSE, seqlen_q=1, seqused_k=A), "D"),
    "dense, one token, a fixed split": (replace(DENSE, seqlen_q=1, fixed_split_size=64), "D"),
    "pages": (PAGED, "F"),
    "pages, one token": (ONE_TOKEN, "D"),
    "pages, decode mode": (replace(ONE_TOKEN, mode=DECODE), "D"),
    "pages, splits": (replace(PAGED, num_splits=2), "D"),
    "pages, 16 queries": (replace(PAGED, seqlen_q=16), "D"),
    "pages, 17 queries": (replace(PAGED, seqlen_q=17), "F"),
    "entries": (replace(DENSE, kv_batch_idx=A, batch_size_k=9), "F"),
    "entries, one token": (replace(DENSE, seqlen_q=1, kv_batch_idx=A, batch_size_k=9), "D"),
    # Packed queries and keys: the forward kernel, unless a bound says that all are short.
    "packed": (PACKED, "f"),
    "packed, padding": (replace(PACKED, zero_padding=True), "F"),
    "packed, short": (replace(PACKED, max_seqlen_q=16), "D"),
    "packed, longer": (replace(PACKED, max_seqlen_q=17), "f"),
    "packed, one each": (replace(PACKED, total_q=3), "D"),
    "packed, one sequence, short": (replace(PACKED, batch_size=1, total_q=5), "f"),
    "packed, splits": (replace(PACKED, num_splits=2), "D"),
    # Packed queries over a cache or pages: both kernels, unless a bound says that one suits all.
    "packed, a cache": (PACKED_CACHE, "DF"),
    "packed, pages": (PACKED_PAGED, "DF"),
    "packed, pages, padding": (replace(PACKED_PAGED, zero_padding=True), "DF"),
    "packed, pages, short": (replace(PACKED_PAGED, max_seqlen_q=16), "D"),
    "packed, pages, longer": (replace(PACKED_PAGED, max_seqlen_q=17), "DF"),
    "packed, pages, one each": (DECODES, "D"),
    "packed, pages, one each, a larger hint": (replace(DECODES, max_seqlen_q=20), "DF"),
    "packed, pages, not packed heads": (replace(PACKED_PAGED, pack_gqa=False), "DF"),
    "packed, pages, packed heads": (replace(PACKED_PAGED, pack_gqa=True), "D"),
    "packed, pages, never split": (replace(PACKED_PAGED, num_splits=1), "DF"),
    "packed, pages, 2 splits": (replace(PACKED_PAGED, num_splits=2), "D"),
    "packed, pages, a fixed split": (replace(PACKED_PAGED, fixed_split_size=64), "DF"),
    "one packed sequence, short": (replace(PACKED_PAGED, batch_size=1, total_q=16), "D"),
    "one packed sequence, longer": (replace(PACKED_PAGED, batch_size=1, total_q=17), "DF"),
    "too many heads for a tile": (replace(PACKED_PAGED, num_heads=80, num_heads_k=1), "F"),
}


@pytest.mark.parametrize("params, expected", SERVED.values(), ids=SERVED.keys())
def test_which_kernels_serve_a_call(params, expected):
    assert kinds(params) == expected


@pytest.mark.parametrize("params", [PACKED_PAGED, PACKED_CACHE, replace(PACKED_PAGED, pack_gqa=False)])
def test_two_launches_divide_the_sequences(params):
    """Both are told the same number of queries, up to which the decode kernel's sequences go."""
    decode, forward = launches(params)
    most = decode.plan.decode_queries
    assert forward.ragged == (0, most) and most * decode.plan.packed_heads == MAX_DECODE_ROWS
    assert kernels_of(shape_of(params)) == Kernels(True, True, most)


@pytest.mark.parametrize("params", [DECODES, replace(PACKED_PAGED, num_splits=2), ONE_TOKEN])
def test_one_launch_serves_all_sequences(params):
    (decode,) = launches(params)
    assert decode.plan.decode_queries == UNLIMITED


@pytest.mark.parametrize("params", [replace(PACKED_PAGED, zero_padding=True), replace(DECODES, zero_padding=True)])
def test_every_launch_knows_of_padding(params):
    for launch in launches(params):
        assert (launch.plan.has_padding if launch.plan else launch.ragged[0]) == 1


@pytest.mark.parametrize(
    "params, most",
    [
        (DENSE, 512),
        (PACKED_PAGED, 0),
        (replace(PACKED_PAGED, max_seqlen_q=7), 7),
        (DECODES, 1),
        (replace(DECODES, max_seqlen_q=3), 3),
        (replace(PACKED_PAGED, batch_size=1), 896),
    ],
)
def test_what_the_host_knows_of_lengths(params, most):
    assert max_queries(shape_of(params)) == most


# ---- over which source ---------------------------------------------------------------------------------------------

INTERLEAVED = {"k_batch_stride": 2 * 16 * 512, "v_batch_stride": 2 * 16 * 512}
HEADS_FIRST = {f"{name}_{dim}_stride": size for name in "kv" for dim, size in (("row", 128), ("head", 16 * 128))}
ODD = {"k_batch_stride": 16 * 512 + 8}
SOURCES = {
    "cache": (PACKED_CACHE, (0, False)),
    "pages": (PACKED_PAGED, (16, True)),
    "K and V in turn": (replace(PACKED_PAGED, **INTERLEAVED), (16, True)),
    "heads first": (replace(PACKED_PAGED, **HEADS_FIRST), (16, True)),
    "no multiple of heads": (replace(PACKED_PAGED, **ODD), (16, False)),
    "too many heads for a coordinate": (replace(PACKED_PAGED, num_pages=2**30), (16, False)),
    "FP8": (replace(PACKED_PAGED, dtype=FP8), (16, False)),
    "pages of 64": (replace(PACKED_PAGED, page_size=64), (64, True)),
    "pages of 128": (replace(PACKED_PAGED, page_size=128), (64, True)),
    "pages of 8": (replace(PACKED_PAGED, page_size=8), (8, True)),
    "pages of 40": (replace(PACKED_PAGED, page_size=40), (8, True)),
    "pages of 12": (replace(PACKED_PAGED, page_size=12, seqlen_k=600), (1, False)),
    "pages of 1": (replace(PACKED_PAGED, page_size=1), (1, False)),
    "pages of 160": (replace(PACKED_PAGED, page_size=160), (32, True)),
}


@pytest.mark.parametrize("params, expected", SOURCES.values(), ids=SOURCES.keys())
def test_sources(params, expected):
    """Boxes are the largest of which pages and tiles are made."""
    decode, forward = launches(replace(params, is_causal=True))
    assert (decode.config.page_box, decode.config.box_is_wide) == expected
    assert (forward.config.page_box, forward.config.box_is_wide) == expected  # tiles of 128 keys, too


def test_boxes_divide_the_tile():
    """Of 112 or 160 keys, boxes of 64 do not."""
    for head_dim, box in ((64, 16), (128, 32)):
        forward = launches(replace(PACKED_PAGED, page_size=64, head_dim=head_dim))[1]
        assert forward.config.page_box == box and forward.config.tile_n % box == 0


# ---- the plan ------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """Of the decode kernel, maybe beside the forward kernel's."""
    base = draw(st.sampled_from((*CACHES, DECODES)))
    batch = draw(st.sampled_from((1, 2, 7, 64, 133, 1000)))
    heads_k = draw(st.sampled_from((1, 2, 8)))
    fields = {"batch_size": batch, "num_heads_k": heads_k, "num_heads": heads_k * draw(st.sampled_from((1, 2, 5, 16)))}
    fields |= {"head_dim": draw(st.sampled_from((64, 96, 128, 192, 256)))}
    fields["seqlen_k"] = draw(st.sampled_from((16, 1024, 16 * 777, 1 << 20)))
    if base.cu_seqlens_q:
        fields |= {"total_q": draw(st.sampled_from((batch, batch + 1, 5 * batch, 3000)))}
        fields |= {"zero_padding": draw(st.booleans()), "max_seqlen_q": draw(st.sampled_from((0, 1, 4, 100)))}
    else:
        fields |= {"seqlen_q": draw(st.sampled_from((1, 4)))}
    splits = ({}, {"num_splits": 1}, {"num_splits": 48}, {"max_num_splits": 1}, {"max_num_splits": 13})
    fields |= draw(st.sampled_from((*splits, {"fixed_split_size": max(64, -(-fields["seqlen_k"] // 256))})))
    fields |= draw(st.sampled_from(({}, {"is_causal": True}, {"window_size_left": 500, "window_size_right": 0})))
    return replace(base, **fields)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(calls())
def test_plans_keep_within_their_limits(params):
    for launch in launches(params):
        if launch.plan is None:
            continue
        cfg, plan = launch.config, launch.plan
        assert plan.cluster_size in CLUSTER_SLOTS and cfg.smem_bytes <= plan.smem_bytes <= SMEM_BYTES_PER_CTA
        assert 1 <= plan.least_clusters <= plan.most_clusters
        assert plan.most_clusters * plan.cluster_size <= max(params.max_num_splits or 256, params.num_splits)
        assert 0 <= plan.first_base <= plan.num_clusters and plan.num_clusters * plan.cluster_size < 1 << 31
        results = 4 * plan.num_partials * plan.partial_rows * (cfg.head_dim + 1)
        assert results <= plan.partial_bytes <= max(results, 32 * plan.num_arrivals)
        assert 4 * plan.num_arrivals <= plan.partial_bytes / 8, "what a caller's tile_counter holds"
        assert plan.num_arrivals == plan.num_partials * plan.cluster_size
        assert (plan.partial_bytes > 0) == (launch.scratch == "splits")
        assert workspace_size(params) >= plan.partial_bytes
        if params.num_splits:
            assert plan.least_clusters * plan.cluster_size == params.num_splits == plan.num_splits
            assert not plan.has_shares and not plan.split_tiles
        if params.fixed_split_size:
            assert (
                plan.split_tiles * cfg.tile_n >= min(params.fixed_split_size, plan.most_tiles * cfg.tile_n)
                and plan.cluster_size == 1
            )
        if params.max_num_splits == 1:
            assert plan.num_partials == 0


def test_scratch_is_bounded_by_what_runs_at_once():
    """However many sequences there are, and however long they may be."""
    sizes = [
        workspace_size(replace(DECODES, batch_size=batch, total_q=batch, seqlen_k=1 << 20, num_pages=1 << 20))
        for batch in (1, 64, 1000, 20_000)
    ]
    most = max(slots for pair in CLUSTER_SLOTS.values() for slots in pair)
    assert max(sizes) <= 4 * 4 * most * MAX_DECODE_ROWS * 129


def test_max_num_splits_bounds_the_scratch():
    long = replace(DECODES, batch_size=2, total_q=2, seqlen_k=1 << 20, num_pages=1 << 17)
    assert workspace_size(replace(long, max_num_splits=1)) == 0 < workspace_size(long)


def test_the_plan_depends_on_bounds_alone():
    """Not on where lengths, tables and pools are."""
    moved = replace(PACKED_PAGED, k=A + 4096, page_table=A + 64, seqused_k=A + 128, cu_seqlens_q=A + 256)
    assert [launch.plan for launch in launches(moved)] == [launch.plan for launch in launches(PACKED_PAGED)]


def test_a_fixed_split_does_not_depend_on_the_batch():
    """Tiles of a split, and the cluster size."""
    plans = {
        (launch.plan.split_tiles, launch.plan.cluster_size, launch.config)
        for batch in (1, 5, 600)
        for launch in launches(replace(DECODES, batch_size=batch, total_q=batch, max_seqlen_q=1, fixed_split_size=100))
    }
    assert len(plans) == 1 and plans.pop()[0] == 2


@pytest.mark.parametrize(
    "params",
    [
        replace(PACKED, batch_size=4, total_q=4, total_k=0, fixed_split_size=64),
        replace(PACKED_PAGED, total_q=0, pack_gqa=True),
        replace(DECODES, fixed_split_size=10**12),
    ],
    ids=["no keys", "no queries", "a split of everything"],
)
def test_plans_of_next_to_nothing(params):
    (decode,) = launches(params)
    assert 0 < decode.plan.num_clusters < 1 << 31 and decode.plan.split_tiles < 1 << 31


def test_wide_boxes_need_pages_that_hold_their_heads():
    """In one stride of both, a page's heads would be another page's."""
    near = replace(DECODES, k_batch_stride=0, v_batch_stride=0)
    assert launches(DECODES)[0].config.box_is_wide and not launches(near)[0].config.box_is_wide


def test_max_num_splits_bounds_dense_calls():
    (decode,) = launches(replace(DENSE, batch_size=1, seqlen_q=1, seqlen_k=8192, max_num_splits=4))
    assert (
        decode.plan.num_splits == 4
        and launches(replace(DENSE, batch_size=1, seqlen_q=1, seqlen_k=8192))[0].plan.num_splits > 4
    )
