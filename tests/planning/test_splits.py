"""Which calls the decode kernel serves and how it is laid over the GPU: splits.py, and kernels/split.py on Python ints.

`plan` is a model that is fitted anew now and then: these tests hold it to what the kernel relies on, to the sense of
its choices, and to a few calls whose best plan was measured.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from split_calls import (
    CFG,
    DECODE,
    ONE_TOKEN,
    PREFILL,
    PROMPT,
    UNBOUNDED,
    A,
    check_memory,
    launch_of,
    plan_of,
    shape_of,
)

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.tables import decode_config
from fa3_cute.contract.params import DataType
from fa3_cute.contract.formats import MAX_SPLITS
from fa3_cute.planning import splits
from fa3_cute.planning.splits import CLUSTER_SLOTS, plan


# ---- which calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, changes, expected",
    [
        (ONE_TOKEN, {}, True),
        (ONE_TOKEN, {"mode": PREFILL}, True),
        (ONE_TOKEN, {"num_splits": 1}, True),
        (ONE_TOKEN, {"num_splits": 256, "pack_gqa": False}, True),
        (ONE_TOKEN, {"is_causal": True, "seqused_k": A}, True),
        # 64 rows per KV head: 8 query heads of 8 queries, or, each by itself, 64 queries
        (PROMPT, {"seqlen_q": 8}, True),
        (PROMPT, {"seqlen_q": 9}, False),
        (PROMPT, {"seqlen_q": 9, "num_heads": 14}, True),
        (PROMPT, {"seqlen_q": 64, "num_heads_k": 16}, True),
        (PROMPT, {"seqlen_q": 65, "num_heads_k": 16}, False),
        (PROMPT, {"seqlen_q": 64, "pack_gqa": False}, True),
        (PROMPT, {"seqlen_q": 65, "pack_gqa": False}, False),
        (PROMPT, {"seqlen_q": 64, "pack_gqa": 0}, True),
        (PROMPT, {"seqlen_q": 1, "num_heads": 130}, False),
        (PROMPT, {"seqlen_q": 1, "num_heads": 130, "mode": DECODE}, True),
        # any number of rows
        (PROMPT, {}, False),
        (PROMPT, {"num_splits": 1}, False),
        (PROMPT, {"num_splits": 2}, True),
        (PROMPT, {"num_splits": 2, "pack_gqa": False}, True),
        (PROMPT, {"pack_gqa": True}, True),
        (PROMPT, {"pack_gqa": np.True_}, True),
        (PROMPT, {"pack_gqa": np.False_}, False),
        (PROMPT, {"seqused_q": A, "seqused_k": A}, False),
        (ONE_TOKEN, {"cu_seqlens_q": 0}, True),
    ],
)
def test_is_decode(base, changes, expected):
    assert splits.is_decode(shape_of(replace(base, **changes))) is expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, False),
        ({"window_size_left": 4096}, True),
        ({"window_size_left": 0}, True),
        ({"window_size_left": UNBOUNDED_WINDOW}, False),
        ({"window_size_left": UNBOUNDED_WINDOW - 1}, True),
        # nothing lies to the right of the last query, and a single one is the last
        ({"window_size_right": 0}, False),
        ({"is_causal": True}, False),
        ({"is_causal": True, "seqlen_q": 2}, True),
        ({"window_size_right": 0, "seqlen_q": 2}, True),
        ({"window_size_right": UNBOUNDED_WINDOW, "seqlen_q": 2}, False),
        ({"window_size_left": 7, "window_size_right": 7}, True),
    ],
)
def test_is_windowed(changes, expected):
    assert splits.is_windowed(shape_of(replace(ONE_TOKEN, mode=PREFILL, **changes))) is expected


# ---- the number of splits that was asked for -------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_k", [1, 100, 8192, 2**20])
def test_exactly_as_many_splits_as_asked_for(seqlen_k):
    for num_splits in range(1, MAX_SPLITS + 1):
        found = plan(CFG, 4, 1, seqlen_k, 16, 2, UNBOUNDED, (None, num_splits))
        assert found.num_splits == num_splits
        assert found.cluster_size in CLUSTER_SLOTS and num_splits % found.cluster_size == 0
        check_memory(CFG, found, 4, 1, 16)


@pytest.mark.parametrize(
    "changes",
    [{"num_splits": 0}, {"num_splits": 256, "batch_size": 4096, "seqlen_q": 8, "seqlen_k": 65536}],
    ids=["one", "many"],
)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16], ids=lambda kind: kind.__name__)
def test_sizes_of_numpy_are_numbers(kind, changes):
    """They count as ints, also where a product leaves their range."""
    params = replace(ONE_TOKEN, mode=PREFILL, **changes)
    fields = ("batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k")
    narrow = {name: kind(value) for name in fields if (value := getattr(params, name)) <= np.iinfo(kind).max}
    expected = plan_of(params)
    splits.plan.cache_clear()  # equal sizes are equal keys
    try:
        assert plan_of(replace(params, **narrow)) == expected
    finally:
        splits.plan.cache_clear()


def test_plans_of_params():
    """plan_of reads what plan is told: the mask's reach, the heads that share a tile, the splits."""

    def told(is_local, reach, *choices, seqlen_q=1):
        return plan(decode_config("fp16", 128, is_local), 4, seqlen_q, 8192, 16, 2, reach, choices)

    assert plan_of(ONE_TOKEN) == told(False, UNBOUNDED, None, 0) == plan_of(replace(ONE_TOKEN, dtype=DataType.BF16))
    assert plan_of(replace(ONE_TOKEN, is_causal=True)) == told(False, UNBOUNDED_WINDOW + 1, None, 0)
    assert plan_of(replace(ONE_TOKEN, num_splits=7, pack_gqa=False)) == told(False, UNBOUNDED, False, 7)
    window = replace(ONE_TOKEN, mode=PREFILL, seqlen_q=3, window_size_left=300, window_size_right=2)
    assert plan_of(window) == told(True, 303, None, 0, seqlen_q=3) != plan_of(replace(window, window_size_left=-1))


FP8 = DataType.FP8_E4M3


@pytest.mark.parametrize(
    "changes, config",
    [
        ({}, ("fp16", 128, False)),
        ({"dtype": DataType.BF16, "out_dtype": DataType.BF16, "window_size_left": 7}, ("bf16", 128, True)),
        ({"dtype": FP8}, ("fp8_e4m3", 128, False, "bf16")),
        ({"dtype": 2, "out_dtype": 1, "head_dim": np.int64(64)}, ("fp8_e4m3", 64, False, "bf16")),
        (
            {
                "dtype": FP8,
                "out_dtype": DataType.FP16,
                "is_causal": True,
                "seqlen_q": 2,
                "mode": PREFILL,
                "head_dim": 96,
            },
            ("fp8_e4m3", 96, True, "fp16"),
        ),
    ],
)
def test_config_of_params(changes, config):
    assert launch_of(replace(ONE_TOKEN, **changes)).config == decode_config(*config)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_fp8_has_plans_of_its_own(head_dim):
    """By its own rows of the heuristics and its own bytes; O's element type has no part in it."""

    def plans(dtype, out_dtype=None):
        calls = product((1, 3, 16, 64), (1, 200, 2000, 8192, 2**15, 2**17))
        return [
            plan_of(
                replace(
                    ONE_TOKEN,
                    dtype=dtype,
                    out_dtype=out_dtype,
                    head_dim=head_dim,
                    batch_size=batch_size,
                    seqlen_k=seqlen_k,
                )
            )
            for batch_size, seqlen_k in calls
        ]

    cfg = decode_config("fp8_e4m3", head_dim, False, "bf16")
    told = [
        plan(cfg, batch_size, 1, seqlen_k, 16, 2, UNBOUNDED, (None, 0))
        for batch_size, seqlen_k in product((1, 3, 16, 64), (1, 200, 2000, 8192, 2**15, 2**17))
    ]
    assert plans(FP8) == plans(FP8, DataType.FP16) == told != plans(DataType.BF16)


# ---- kernels/split.py ------------------------------------------------------------------------------------------------


class Number(int):
    """kernels/split.Divisor without the DSL."""

    @property
    def divisor(self):
        return int(self)


@pytest.mark.parametrize(
    "batch_size, seqlen_q, num_heads, num_heads_k, packed_heads",
    [(1, 1, 1, 1, 1), (3, 1, 16, 2, 8), (2, 9, 16, 2, 8), (2, 130, 6, 3, 2), (2, 130, 6, 3, 1), (3, 5, 80, 1, 80)],
)
@pytest.mark.parametrize("num_splits, cluster_size", [(1, 1), (6, 6), (11, 1), (24, 8)])
def test_every_split_of_every_tile_has_one_cta(
    monkeypatch, batch_size, seqlen_q, num_heads, num_heads_k, packed_heads, num_splits, cluster_size
):
    """Also the grid's size is plan's idea of it, and a cluster works on one item."""
    from fa3_cute.kernels.decode import split as module

    monkeypatch.setattr(module, "Divisor", Number)
    grid = module.SplitGrid.create(
        64, batch_size, seqlen_q, num_heads, num_heads // num_heads_k, packed_heads, num_splits, cluster_size
    )
    pack = packed_heads > 1 or num_heads == num_heads_k
    found = plan(CFG, batch_size, seqlen_q, 4096, num_heads, num_heads_k, UNBOUNDED, (pack, num_splits))
    assert grid.num_items == check_memory(CFG, found, batch_size, seqlen_q, num_heads)
    assert grid.num_rows == seqlen_q * packed_heads and found.packed_heads == packed_heads

    places = [module.place_of(grid, index) for index in range(grid.num_items * num_splits)]
    m_blocks, groups = -(-grid.num_rows // 64), num_heads // packed_heads
    work = [(batch, group, m_block, split) for _, split, m_block, group, batch in places]
    assert sorted(work) == list(product(*map(range, (batch_size, groups, m_blocks, num_splits))))
    for start in range(0, len(places), cluster_size):
        cluster = places[start : start + cluster_size]
        assert len({item for item, *_ in cluster}) == 1
        assert [split % cluster_size for _, split, *_ in cluster] == list(range(cluster_size))
    kv_heads = [group // grid.groups_per_kv_head for group in range(groups)]
    assert kv_heads == sorted([*range(num_heads_k)] * (groups // num_heads_k))
