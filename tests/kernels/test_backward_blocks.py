"""Which Q tiles a block of keys is passed by, and in what order blocks run, against brute force. No GPU."""

from itertools import product

import pytest

from fa3_cute.planning.backward import BackwardConfig
from fa3_cute.planning.backward_kernels import MASKS, pass_config
from fa3_cute.planning.backward_tables import TABLE
from fa3_cute.planning.sections import CTAS, STEPS_APART, heads_apart, heads_in_waves, heads_per_section

pytest.importorskip("cutlass")

from fa3_cute.kernels.backward.blocks import first_key_block, last_key_block, query_range
from fa3_cute.kernels.backward.order import rises
from fa3_cute.kernels.common.block_range import Window
from fa3_cute.kernels.common.order import block_and_head

LENGTHS = [(1, 1), (64, 128), (80, 129), (200, 333), (333, 200), (257, 5), (5, 700), (640, 640)]
WINDOWS = [(0, 0), (64, 0), (100, 50), (3, 300), (1000, 1000)]
GROUP = 3  # query heads of a KV head
CHUNKS = [((99, 99), 100), ((63, 0), 64), ((30, 5), 70), ((299, 299), 300)]  # and the windows that they are too


def cases_of(rows) -> list[tuple]:
    windows = {"local": [(window, 0) for window in WINDOWS] + CHUNKS}
    return [
        (head_dim, mask, window, lengths, chunk)
        for head_dim, mask in rows
        for window, chunk in windows.get(mask, [((0, 0), 0)])
        for lengths in LENGTHS
    ]


CASES = cases_of(TABLE)
SIDE_CASES = cases_of(product((256,), MASKS))
ORDERED = cases_of(row for row, chosen in TABLE.items() if not chosen.is_split)


def problem(head_dim: int, mask: str, window: tuple[int, int], chunk: int, is_deterministic: bool = False):
    """(config of a kernel whose CTAs have keys, Window)"""
    features = frozenset({("has_chunks", True)}) if chunk else frozenset()
    cfg = pass_config("bf16", head_dim, mask, False, is_deterministic, features)
    return cfg if isinstance(cfg, BackwardConfig) else cfg.pair or cfg.sides[1], Window(*window, chunk or None)


def sees(mask: str, window: tuple[int, int], query: int, key: int, lengths: tuple[int, int], chunk: int) -> bool:
    """Bottom-right aligned."""
    diagonal = query + lengths[1] - lengths[0]
    distance = diagonal - key
    if chunk and diagonal // chunk != key // chunk:
        return False
    return (
        mask == "full"
        or -(window[1] if mask == "local" else 0) <= distance
        and (mask == "causal" or distance <= window[0])
    )


@pytest.mark.parametrize("head_dim, mask, window, lengths, chunk", CASES + SIDE_CASES)
def test_query_range(head_dim, mask, window, lengths, chunk):
    """Every tile with a query that sees one of the keys, and no mask where all see all of them."""
    seqlen_q, seqlen_k = lengths
    cfg, seen_by = problem(head_dim, mask, window, chunk)
    for n_block in range(-(-seqlen_k // cfg.tile_n)):
        keys = range(n_block * cfg.tile_n, (n_block + 1) * cfg.tile_n)
        found = query_range(cfg, seen_by, n_block, seqlen_q, seqlen_k)
        assert found.m_block_min <= found.m_block_full_min <= found.m_block_full_max <= found.m_block_max
        walked = [m_block for kind in range(3) for m_block in reversed(range(*found.of_kind(kind)))]  # loop by loop
        assert walked == list(range(found.m_block_min, found.m_block_max))[::-1]
        passing = [(m_block, of_group) for m_block in walked for of_group in range(GROUP)]
        assert [found.passing(i, GROUP) for i in range(found.num_passes(GROUP))] == passing
        rising = [found.passing(i, GROUP, 1) for i in range(found.num_passes(GROUP))]
        assert rising == [(m_block, of_group) for m_block in walked[::-1] for of_group in range(GROUP)]
        if mask != "local":
            assert found.m_block_full_max == found.m_block_max  # the role loops over no third part
        for m_block in range(-(-seqlen_q // cfg.tile_m)):
            queries = range(m_block * cfg.tile_m, min((m_block + 1) * cfg.tile_m, seqlen_q))
            seen = [
                key < seqlen_k and sees(mask, window, query, key, lengths, chunk) for query in queries for key in keys
            ]
            if any(seen):
                assert found.m_block_min <= m_block < found.m_block_max
            if found.m_block_full_min <= m_block < found.m_block_full_max:
                assert all(seen)


@pytest.mark.parametrize("head_dim, mask, window, lengths, chunk", ORDERED)
def test_turns(head_dim, mask, window, lengths, chunk):
    """The CTAs that add to a Q tile are neighbours, and their turns count from 0 at the first keys."""
    seqlen_q, seqlen_k = lengths
    cfg, seen_by = problem(head_dim, mask, window, chunk, True)
    ranges = [query_range(cfg, seen_by, n_block, seqlen_q, seqlen_k) for n_block in range(-(-seqlen_k // cfg.tile_n))]
    for m_block in range(-(-seqlen_q // cfg.tile_m)):
        adders = [n for n, found in enumerate(ranges) if found.m_block_min <= m_block < found.m_block_max]
        first = first_key_block(cfg, seen_by, m_block, seqlen_q, seqlen_k)
        assert [n - first for n in adders] == list(range(len(adders)))
        if cfg.has_directions and adders:
            last = last_key_block(cfg, m_block, seqlen_q, seqlen_k)
            assert [last - n for n in adders[::-1]] == list(range(len(adders)))


@pytest.mark.parametrize("is_causal, is_reversed", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("num_blocks, num_heads, seqlen_q, group", [(1, 1, 64, 1), (5, 7, 4096, 4), (32, 16, 4096, 1)])
def test_order(is_causal, is_reversed, num_blocks, num_heads, seqlen_q, group):
    """Every tile once; of each head in one direction, as deterministic CTAs count on."""
    section = heads_per_section(num_heads, group, seqlen_q, 128, num_blocks)
    assert 1 <= section <= num_heads
    extents = num_blocks, num_heads, section
    tiles = [block_and_head(is_causal, is_reversed, i, *extents) for i in range(num_blocks * num_heads)]
    assert sorted(tiles) == [(block, head) for block in range(num_blocks) for head in range(num_heads)]
    for head in range(num_heads):
        assert [block for block, of in tiles if of == head] == list(range(num_blocks))[:: -1 if is_reversed else 1]


@pytest.mark.parametrize(
    "num_heads, group, seqlen_q, expected",
    [(512, 1, 512, 64), (64, 1, 4096, 8), (16, 1, 16384, 2), (32, 8, 4096, 4), (8, 4, 16384, 1), (8, 4, 65536, 1)],
)
def test_heads_per_section(num_heads, group, seqlen_q, expected):
    """As many as L2 holds; of few keys with many queries, as many as give every CTA a tile; or what is asked for."""
    extents = num_heads, group, seqlen_q, 128, seqlen_q // 128
    assert heads_per_section(*extents) == expected
    assert heads_per_section(*extents, least=expected + 1) in (num_heads, *range(expected, expected + 2))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("group, num_q_blocks", [(1, 26), (1, 205), (8, 52), (1, 7)])
def test_heads_apart(group, num_q_blocks, is_causal):
    """CTAs that start one after the other, as many in the time of a tile of keys as there are: neighbouring tiles of
    one head are that many Q tiles apart."""
    steps = group * num_q_blocks / (2 if is_causal else 1)
    heads = heads_apart(group, num_q_blocks, is_causal)
    apart = lambda heads: heads * steps / CTAS
    assert apart(heads) >= STEPS_APART > apart(heads - 1)


@pytest.mark.parametrize(
    "num_heads, num_blocks, expected",
    [
        (256, 32, 4),
        (32, 32, 4),
        (8, 128, 1),
        (4, 256, 1),
        (2048, 4, 33),
        (3, 7, 3),
        (16, 50, 3),
        (1, 1, 1),
        (10, 0, 10),
        (0, 7, 1),
    ],
)
def test_heads_in_waves(num_heads, num_blocks, expected):
    """About a tile for each of 132 CTAs, in sections of about equal size."""
    assert heads_in_waves(num_heads, num_blocks) == expected


@pytest.mark.parametrize(
    "num_tiles, waves", [(128, 1), (140, 1), (90, 1), (5, 1), (197, 1), (198, 2), (256, 2), (264, 2), (400, 3)]
)
def test_queries_pass_in_turns_up_and_down(num_tiles, waves):
    """From wave to wave, of a section's whole number of them."""
    found = [rises(index, num_tiles) for index in range(5 * num_tiles)]
    wave_of = lambda index: index // num_tiles * waves + min(index % num_tiles // CTAS, waves - 1)
    assert found == [wave_of(index) % 2 for index in range(5 * num_tiles)]
    assert {wave_of(index) for index in range(5 * num_tiles)} == set(range(5 * waves))


@pytest.mark.parametrize("group", [1, 8])
def test_causal_tiles_that_run_together_are_at_the_same_queries(group):
    """CTAs that take a tile when they end one, steps of one length: in a window of steps they read and add to few Q
    tiles, where all in one direction, with 8 heads in a group, are spread over many."""
    assert distinct_tiles(group, alternates=True) < 0.1 * CTAS * WINDOW_STEPS
    if group > 1:
        assert distinct_tiles(group, alternates=False) > 0.3 * CTAS * WINDOW_STEPS


WINDOW_STEPS = 12


def distinct_tiles(group: int, alternates: bool) -> float:
    """In the mean, in windows of so many steps, while all CTAs run: 32 heads of 32 blocks of keys and of queries."""
    num_heads, num_blocks = 32, 32
    section = heads_in_waves(num_heads, num_blocks)
    waiting = iter(range(num_heads * num_blocks))
    ctas, steps = [[] for _ in range(CTAS)], []
    while True:
        now = []
        for cta in ctas:
            if not cta and (index := next(waiting, None)) is not None:
                block, head = block_and_head(True, False, index, num_blocks, num_heads, section)
                is_rising = alternates and rises(index, section * num_blocks)
                rows = range(block, num_blocks)
                cta += [(head, row, of) for row in (rows if is_rising else rows[::-1]) for of in range(group)][::-1]
            if not cta:
                windows = [steps[i : i + WINDOW_STEPS] for i in range(0, len(steps), WINDOW_STEPS)]
                return sum(len(set().union(*window)) for window in windows) / len(windows)
            now.append(cta.pop())
        steps.append(set(now))
