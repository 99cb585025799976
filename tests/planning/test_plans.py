"""Automatic plans of split-KV: what the kernel relies on, the sense of the choices, and a few that were measured."""

import math
import random
from itertools import product

import pytest
from split_calls import CFG, LOCAL, UNBOUNDED, check_memory

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.tables import all_decode_configs, decode_config
from fa3_cute.contract.formats import MAX_SPLITS
from fa3_cute.planning import splits
from fa3_cute.planning.splits import CLUSTER_SLOTS, NUM_SMS, plan

TWO_PER_SM = [cfg for cfg in all_decode_configs() if cfg.ctas_per_sm == 2]


def random_call(rng):
    """(batch_size, seqlen_q, seqlen_k, num_heads, num_heads_k, reach, pack_gqa)"""
    heads_k = rng.choice((1, 2, 3, 4, 8, 16, 32))
    seqlen_k = rng.choice((rng.randint(1, 300), rng.randint(1, 2**14), rng.randint(1, 2**21)))
    reach = rng.choice((1, rng.randint(1, 5000), UNBOUNDED_WINDOW + 1, UNBOUNDED))
    return (
        rng.choice((1, 2, 3, 7, 16, 64, 133, 512, 5000)),
        rng.choice((1, 1, 1, 2, 8, 70, 3000)),
        seqlen_k,
        heads_k * rng.choice((1, 2, 4, 5, 7, 8, 16, 80)),
        heads_k,
        reach,
        rng.choice((None, None, True, False)),
    )


@pytest.mark.parametrize("cfg", all_decode_configs(), ids=lambda cfg: cfg.name)
def test_automatic_plans(cfg):
    rng = random.Random(cfg.name)
    for _ in range(400):
        batch_size, seqlen_q, seqlen_k, num_heads, num_heads_k, reach, pack = random_call(rng)
        call = cfg, batch_size, seqlen_q, seqlen_k, num_heads, num_heads_k, reach, (pack, 0)
        found = plan(*call)
        assert found.packed_heads == (1 if pack is False else num_heads // num_heads_k), call
        assert 1 <= found.num_splits <= min(MAX_SPLITS, -(-seqlen_k // cfg.tile_n)), call
        assert found.cluster_size in CLUSTER_SLOTS, call
        check_memory(cfg, found, batch_size, seqlen_q, num_heads)


def test_the_plan_depends_on_the_call_alone():
    """Not on the calls before it, nor on FP16 or BF16; and the config in a plan is the one that is launched."""
    rng = random.Random(1)
    calls = [random_call(rng) for _ in range(300)]

    def plans(calls, dtype):
        splits.plan.cache_clear(), splits.fastest.cache_clear()
        return [plan(decode_config(dtype, 96, True), *shape, (pack, 0)) for *shape, pack in calls]

    assert plans(calls, "fp16") == plans(calls[::-1], "fp16")[::-1] == plans(calls, "bf16")


# ---- do they make sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_a_single_long_context_takes_the_whole_gpu(head_dim):
    cfg = decode_config("bf16", head_dim, False)
    for seqlen_k, fewest in ((32768, 96), (100000, 101), (2**17, 101), (2**20, 101)):
        assert fewest <= plan(cfg, 1, 1, seqlen_k, 8, 1, UNBOUNDED, (None, 0)).num_splits <= NUM_SMS


@pytest.mark.parametrize("cfg", TWO_PER_SM, ids=lambda cfg: cfg.name)
def test_plenty_of_items_are_not_split(cfg):
    """Where one CTA has an SM for itself the last round may still be worth a split."""
    for batch_size, seqlen_k in product((8 * NUM_SMS + 1, 1500, 4000, 10**6, 2**31 - 1), (1, 1000, 8192, 2**20)):
        assert plan(cfg, batch_size, 1, seqlen_k, 8, 1, UNBOUNDED, (None, 0))[1:3] == (1, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
@pytest.mark.parametrize("seqlen_q, window", [(1, 500), (4, 1024), (1, 4096)])
def test_a_window_is_planned_for_what_it_shows(seqlen_q, window, batch_size):
    """However long the context behind it is; and without splits that have nothing to read."""
    plans = {
        plan(LOCAL, batch_size, seqlen_q, seqlen_k, 16, 2, window + 1, (None, 0))
        for seqlen_k in (8192, 2**15, 2**17, 2**20)
    }
    assert max(found.num_splits for found in plans) <= (window + seqlen_q) // LOCAL.tile_n + 2
    assert len(plans) == 1, plans


def test_short_contexts_are_not_split_further_than_their_tiles():
    for seqlen_k in (1, 63, 64, 65, 128, 129, 640):
        for num_items in (1, 2, 132):
            found = plan(CFG, num_items, 1, seqlen_k, 8, 1, UNBOUNDED, (None, 0))
            assert found.num_splits <= -(-seqlen_k // CFG.tile_n)


# Measured: the fastest, or within the noise of it.
@pytest.mark.parametrize(
    "batch_size, seqlen_k, heads, splits_and_cluster",
    [
        (1, 2048, (16, 2), (16, 16)),
        (4, 2048, (16, 2), (8, 8)),
        (64, 8192, (32, 8), (1, 1)),
    ],
)
def test_pinned_plans(batch_size, seqlen_k, heads, splits_and_cluster):
    found = plan(CFG, batch_size, 1, seqlen_k, *heads, UNBOUNDED, (None, 0))
    assert (found.num_splits, found.cluster_size) == splits_and_cluster


@pytest.mark.parametrize("cfg", all_decode_configs(), ids=lambda cfg: cfg.name)
def test_the_model_is_a_time(cfg):
    """Positive and finite; of the candidates, which fit the GPU and are never empty, the chosen one is the fastest."""
    for num_items, n_blocks in product((1, 5, 66, 132, 133, 2000), (0, 1, 2, 17, 500, 16384)):
        candidates = list(splits.candidates(cfg, num_items, n_blocks))
        assert (1, 1) in candidates
        for _, *rates in splits.RATES:
            times = {choice: splits.time_of(cfg, num_items, n_blocks, *choice, rates) for choice in candidates}
            assert all(time > 0 and math.isfinite(time) for time in times.values())
            chosen = splits.fastest(cfg, num_items, n_blocks, tuple(rates))
            assert times[chosen] <= min(times.values()) + 0.1  # it rounds to tenths
        for num_splits, cluster_size in candidates:
            assert num_splits % cluster_size == 0 and num_splits <= min(MAX_SPLITS, max(n_blocks, 1))
            assert num_splits == cluster_size or num_items * num_splits <= max(CLUSTER_SLOTS[cluster_size])


def test_more_work_never_takes_less_time():
    """Of one plan, in tiles; the time of two K/V lengths tells how many splits they are worth."""
    for choice, num_items in product(((1, 1), (4, 4), (48, 8)), (1, 2, 40)):
        times = [splits.time_of(CFG, num_items, n_blocks, *choice, splits.RATES[-1][1:]) for n_blocks in range(300)]
        assert times == sorted(times)
