"""Which windows the forward kernel packs heads for, which config serves them, and what is left to the decode kernel."""

from dataclasses import replace

import pytest
from cache_calls import PACKED_CACHE, PACKED_PAGED, PAGED
from rule_calls import DECODE, DENSE, FP8, PACKED, A

from fa3_cute import DataType, explain
from fa3_cute.contract.params import NUMBERS
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.packing import MOST_KEYS, PACKED_HEAD_DIMS, PACKED_HEADS, packed_heads_of_window
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.selections import packed_configs
from fa3_cute.planning.tables import FORWARD, PACKED as ROWS, forward_config, packed_config, packed_row

# All calls have 16 heads over 4, of 64: an M tile of the decode kernel holds 16 queries.
WINDOW = {"window_size_left": 127, "window_size_right": 0, "head_dim": 64}
SMALL = replace(DENSE, seqlen_q=300, seqlen_k=300, **WINDOW)
SEQUENCES = replace(PACKED, **WINDOW)


def shape_of(params) -> ProblemShape:
    assert explain(params) == [], explain(params)
    return ProblemShape.of(plain(params))


def served(params) -> list:
    """Of its launches: "decode", or the forward kernel's packed heads."""
    configs = [launch.config for launch in operation_of(shape_of(params)).launches]
    return ["decode" if cfg.splits_keys else cfg.packed_heads for cfg in configs]


SERVED = {
    "a small window": (SMALL, [4]),
    "with LSE": (replace(SMALL, softmax_lse=A), [4]),
    "FP16, head_dim 128": (replace(SMALL, dtype=DataType.FP16, head_dim=128), [4]),
    "both sides": (replace(SMALL, window_size_left=64, window_size_right=64), [4]),
    "as wide as it is good for": (replace(SMALL, window_size_left=255), [4]),
    "wider": (replace(SMALL, window_size_left=256), [1]),
    "wider, to both sides": (replace(SMALL, window_size_left=128, window_size_right=128), [1]),
    "more heads, as wide": (replace(SMALL, num_heads_k=2, window_size_left=1023), [8]),
    "more heads, wider": (replace(SMALL, num_heads_k=2, window_size_left=1024), [1]),
    "more heads of sequences, as wide": (replace(SEQUENCES, num_heads_k=2, window_size_left=511), [8]),
    "more heads of sequences, wider": (replace(SEQUENCES, num_heads_k=2, window_size_left=512), [1]),
    "head_dim 128, as wide": (replace(SMALL, head_dim=128, window_size_left=1023), [4]),
    "head_dim 128, wider": (replace(SMALL, head_dim=128, window_size_left=1024), [1]),
    "head_dim 128 of sequences, as wide": (replace(SEQUENCES, head_dim=128, window_size_left=1023), [4]),
    "one side": (replace(SMALL, window_size_left=-1, window_size_right=3), [1]),
    "no window": (replace(SMALL, window_size_left=-1, window_size_right=-1), [1]),
    "a causal mask": (replace(SMALL, window_size_left=-1), [1]),
    "another head_dim": (replace(SMALL, head_dim=96), [1]),
    "FP8": (replace(SMALL, dtype=FP8), [1]),
    # Heads.
    "8 per KV head": (replace(SMALL, num_heads_k=2), [8]),
    "16 per KV head": (replace(SMALL, num_heads_k=1), [8]),
    "12 per KV head": (replace(SMALL, num_heads=24, num_heads_k=2), [4]),
    "6 per KV head": (replace(SMALL, num_heads=24), [2]),
    "2 per KV head": (replace(SMALL, num_heads_k=8), [2]),
    "3 per KV head": (replace(SMALL, num_heads=12), [1]),
    "as many KV heads": (replace(SMALL, num_heads_k=16), [1]),
    # The decode kernel's.
    "64 rows of a KV head": (replace(SMALL, seqlen_q=16), ["decode"]),
    "68 rows of a KV head": (replace(SMALL, seqlen_q=17), [4]),
    "splits": (replace(SMALL, num_splits=2), ["decode"]),
    "decode mode": (replace(SMALL, seqlen_q=1, mode=DECODE), ["decode"]),
    # pack_gqa.
    "not to be packed": (replace(SMALL, pack_gqa=False), [1]),
    "to be packed": (replace(SMALL, pack_gqa=True), [4]),
    "to be packed, a wide window": (replace(SMALL, window_size_left=4000, pack_gqa=True), [4]),
    "to be packed, one side": (replace(SMALL, window_size_left=-1, window_size_right=3, pack_gqa=True), [4]),
    "to be packed, few rows": (replace(SMALL, seqlen_q=16, pack_gqa=True), ["decode"]),
    "to be packed, another head_dim": (replace(SMALL, head_dim=96, pack_gqa=True), ["decode"]),
    "to be packed, 3 per KV head": (replace(SMALL, num_heads=12, pack_gqa=True), ["decode"]),
    "to be packed, no window": (
        replace(SMALL, window_size_left=-1, window_size_right=-1, pack_gqa=True),
        ["decode"],
    ),
    # Lengths, and keys that lie apart.
    "used lengths": (replace(SMALL, seqused_k=A), [4]),
    "entries": (replace(SMALL, kv_batch_idx=A, batch_size_k=9), [1]),
    "a cache": (replace(PACKED_CACHE, total_q=300, **WINDOW), ["decode", 1]),
    "padding": (replace(SEQUENCES, zero_padding=True), [1]),
    "padding, to be packed": (replace(SEQUENCES, zero_padding=True, pack_gqa=True), ["decode"]),
    "sequences": (SEQUENCES, [4]),
    "short sequences": (replace(SEQUENCES, max_seqlen_q=16), ["decode"]),
    "sequences to be packed": (replace(SEQUENCES, pack_gqa=True, window_size_left=2000), [4]),
    "short sequences to be packed": (replace(SEQUENCES, pack_gqa=True, max_seqlen_q=16), ["decode"]),
    "sequences to be packed, no window": (
        replace(SEQUENCES, pack_gqa=True, window_size_left=-1, window_size_right=-1),
        ["decode"],
    ),
    "pages": (replace(PAGED, seqlen_q=300, **WINDOW), [1]),
    "mixed, pages": (replace(PACKED_PAGED, total_q=300, **WINDOW), ["decode", 1]),
    "mixed, pages to be packed": (replace(PACKED_PAGED, total_q=300, pack_gqa=True, **WINDOW), ["decode"]),
}


@pytest.mark.parametrize("params, expected", SERVED.values(), ids=SERVED.keys())
def test_what_serves_a_call(params, expected):
    assert served(params) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_chunk": 64},
        {"optionals": ("attn_mask",)},
        {"score_mod": "a"},
        {"mask_mod": "a"},
        {"numbers": tuple(0.1 * (name == "p_dropout") for name in NUMBERS)},
    ],
    ids=str,
)
def test_what_scores_ask_for_is_not_packed(changes):
    """K/V tiles of packed heads count keys from the first that a tile of O sees."""
    shape = shape_of(SMALL)
    assert packed_heads_of_window(shape) == 4 and packed_heads_of_window(shape._replace(**changes)) == 1


def test_sinks_slopes_and_softcap_are_packed():
    for changes in ({}, {"softcap": 30.0}, {"s_aux": A, "alibi_slopes": A}, {"alibi_slopes": A, "softcap": 30.0}):
        params = replace(SMALL, **changes)
        (launch,) = operation_of(shape_of(params)).launches
        assert served(params) == [4] and launch.config.has_softcap == ("softcap" in changes)


def test_a_config_for_each_number_of_heads():
    assert set(ROWS) == {(head_dim, heads) for head_dim in PACKED_HEAD_DIMS for heads in PACKED_HEADS} == set(MOST_KEYS)
    assert {(cfg.head_dim, cfg.packed_heads) for cfg in packed_configs()} == set(ROWS)
    with_features = [cfg for cfg in packed_configs() if cfg.transforms_scores]
    assert {(cfg.head_dim, cfg.packed_heads) for cfg in with_features} == set(ROWS)
    assert {(cfg.has_softcap, cfg.num_consumer_wgs, cfg.is_varlen) for cfg in with_features} >= {
        (True, 3, False),
        (True, 2, True),
        (True, 2, False),
        (False, 2, True),
        (False, 2, False),
    }
    for head_dim, heads in ROWS:
        for is_varlen in (False, True):
            row = packed_row(head_dim, heads, is_varlen)
            plain_one = forward_config("fp16", head_dim, "local", True, is_varlen)
            cfg = packed_config(plain_one, heads)
            assert (cfg.packed_heads, cfg.tile_m, cfg.tile_n, cfg.num_kv_stages) == (
                heads,
                row.tile_m,
                row.tile_n,
                row.num_kv_stages,
            )
            same = {"packed_heads", "tile_m", "tile_n", "num_q_stages", "num_kv_stages", "use_pingpong"}
            both = [{k: v for k, v in c.as_dict().items() if k not in same} for c in (cfg, plain_one)]
            assert both[0] == both[1] and packed_config(plain_one, heads) is cfg


def test_the_reason_is_that_of_the_packed_row():
    launch = operation_of(shape_of(SMALL)).launches[0]
    assert launch.reason == ROWS[64, 4].reason != FORWARD[2, 64, "local"].reason


@pytest.mark.parametrize(
    "cfg, changes, problem",
    [
        (forward_config("bf16", 64, "local", False, True), {"packed_heads": 3}, "packed_heads=3: must be 1, 2, 4 or 8"),
        (forward_config("fp8_e4m3", 64, "local", False, True, "bf16"), {"packed_heads": 4}, "16-bit elements"),
        (
            forward_config("bf16", 64, "local", False, True),
            {"packed_heads": 4, "is_ragged": True},
            "not with is_ragged",
        ),
        (
            forward_config("bf16", 64, "local", False, True),
            {"packed_heads": 4, "has_chunks": True},
            "not with features that ask for the places of keys",
        ),
    ],
)
def test_configs_that_do_not_exist_are_refused(cfg, changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(cfg, **changes)
