"""kernels/forward/order.py on Python ints: every tile once, longest first, sections that share L2, balanced work."""

import heapq
import itertools

import pytest

from fa3_cute.kernels.forward import order as scheduler

NUM_SMS = 132
SHAPES = [(1, 1, 1), (1, 3, 50), (7, 1, 1), (7, 16, 3), (32, 16, 4), (128, 16, 1), (5, 33, 2)]


def order(is_causal, grid):
    """(m_block, head, batch) of the whole launch, in order."""
    return [scheduler.dense_tile(is_causal, grid, index) for index in range(grid.num_tiles())]


@pytest.mark.parametrize("section", [1, 5, 32, 1000])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_exactly_once(is_causal, shape, section):
    tiles = order(is_causal, scheduler.TileGrid(*shape, section))
    assert sorted(tiles) == sorted(itertools.product(*map(range, shape)))


def test_causal_runs_longest_first_within_a_section():
    grid = scheduler.TileGrid(8, 16, 4, 20)
    tiles = order(True, grid)
    heads = [batch * grid.num_heads + head for _, head, batch in tiles]
    for first in range(0, 64, 20):
        rows = [m_block for (m_block, _, _), head in zip(tiles, heads, strict=True) if first <= head < first + 20]
        assert rows == sorted(rows, reverse=True)
    assert [head // 20 for head in heads] == sorted(head // 20 for head in heads)


@pytest.mark.parametrize(
    "num_heads, group, seqlen_k, expected",
    [
        (16, 1, 16384, 16),  # fewer heads than the least section
        (64, 1, 4096, 32),  # 16 would share L2, but the least section is 32
        (256, 1, 1024, 64),  # 32 MB of K and V
        (256, 8, 1024, 256),  # the same with 8 query heads per KV head
        (65, 1, 4096, 22),  # three sections of about equal size, not 32 + 32 + 1
        (7, 1, 0, 7),
        (1, 1, 1, 1),
    ],
)
def test_heads_per_section(num_heads, group, seqlen_k, expected):
    """At head_dim 128 in 16 bits: 512 bytes of K and V per token."""
    assert scheduler.heads_per_section(num_heads, group, seqlen_k, 512) == expected


@pytest.mark.parametrize("num_m_blocks, batch, least", [(4, 32, 0.96), (8, 16, 0.97), (32, 4, 0.98), (128, 1, 0.98)])
def test_causal_balance(num_m_blocks, batch, least):
    """Mean over maximum of the CTAs' work when each takes its next tile as it starts one (see schedule.py).

    A square tile in row m costs m + 1 steps and about one for its ends.
    """
    section = scheduler.heads_per_section(16 * batch, 1, num_m_blocks * 128, 512)
    work = [m_block + 2 for m_block, _, _ in order(True, scheduler.TileGrid(num_m_blocks, 16, batch, section))]
    queue = iter(work)
    ctas = [(0, cta, next(queue)) for cta in range(NUM_SMS)]  # (time, CTA, the tile it has taken)
    end = 0
    while ctas:
        now, cta, taken = heapq.heappop(ctas)
        end = max(end, now + taken)
        following = next(queue, None)
        if following is not None:
            heapq.heappush(ctas, (now + taken, cta, following))
    assert sum(work) / NUM_SMS / end >= least
