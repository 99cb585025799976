"""Windows of packed heads (planning/packing.py) against brute force, on Python ints: the keys that the K/V tiles of a
tile of O start with, which of them are visited, and whose row of Q a row of a tile is."""

from itertools import product

import pytest

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.kernels.common.block_range import Window, block_range
from fa3_cute.kernels.common.tiles import Tile, query_and_head
from fa3_cute.kernels.common.visibility import from_first_visible
from fa3_cute.planning.selections import packed_configs
from fa3_cute.planning.tables import FORWARD, forward_config

CONFIGS = {(cfg.packed_heads, cfg.tile_n): cfg for cfg in packed_configs()}
WINDOWS = [Window(*sides) for sides in product((0, 1, 127, 300, UNBOUNDED_WINDOW), (0, 17, 64, UNBOUNDED_WINDOW))]
QUERIES = (1, 15, 16, 17, 64, 130, 257)
KEYS = (0, 1, 16, 143, 144, 145, 300, 513)
FIRST_KEY = 1000  # of the sequence in K and V


def tiles_of(cfg, window, seqlen_q, seqlen_k):
    """The sequence's tiles of one group of heads, as the schedule role publishes them."""
    for m_block in range(-(-seqlen_q // cfg.queries_per_tile)):
        tile = Tile(m_block, 24, 3, 0, 0, seqlen_q, FIRST_KEY, seqlen_k, 0)
        yield from_first_visible(cfg, window, tile)


def queries_of(cfg, tile):
    """Those that have rows in the tile."""
    rows = range(tile.m_block * cfg.tile_m, (tile.m_block + 1) * cfg.tile_m)
    places = [query_and_head(cfg, tile, row) for row in rows]
    queries = sorted({query for query, _ in places})
    # Rows of one query are its heads, in order.
    assert places == [(query, tile.head + head) for query in queries for head in range(cfg.packed_heads)]
    return [query for query in queries if query < tile.seqlen_q]


def keys_seen(window, query, seqlen_q, seqlen_k):
    """The keys that a query sees, as a range: the definition of the masks, bottom-right aligned."""
    diagonal = query + seqlen_k - seqlen_q
    first, last = max(diagonal - window.left, 0), min(diagonal + window.right, seqlen_k - 1)
    return range(first, max(first, last + 1))


def check(cfg, window, seqlen_q, seqlen_k, tile):
    """A tile of O. Returns the K/V tiles that it visits and those that it leaves without a mask."""
    where = window, seqlen_q, seqlen_k, tile
    blocks = block_range(cfg, window, tile.m_block, tile.seqlen_q, tile.seqlen_k, cfg.packed_heads)
    origin = tile.offset_k - FIRST_KEY
    assert tile.seqlen_k == seqlen_k - origin, where
    queries = queries_of(cfg, tile)
    seen = [keys_seen(window, query, seqlen_q, seqlen_k) for query in queries]
    keys = [key for span in seen if span for key in (span[0], span[-1])]
    visited = range(blocks.n_block_min, max(blocks.n_block_max, blocks.n_block_min))
    if keys:
        # They start with the first key that is seen, and end in the tile of the last.
        assert origin == min(keys) and list(visited) == list(range((max(keys) - origin) // cfg.tile_n + 1)), where
    else:
        assert not visited, where
    for query, span in zip(queries, seen, strict=True):
        # What a row sees of the sequence that the tile is of are the keys that it sees.
        within = keys_seen(window, query, tile.seqlen_q, tile.seqlen_k)
        assert not span or [key + origin for key in within] == list(span), where
    full = range(max(blocks.n_block_full_min, blocks.n_block_min), min(blocks.n_block_full_max, blocks.n_block_max))
    for n_block in full:
        first = origin + n_block * cfg.tile_n
        assert all(first in span and first + cfg.tile_n - 1 in span for span in seen), where
    return len(visited), len(full)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=lambda cfg: f"{cfg.packed_heads}-{cfg.tile_m}x{cfg.tile_n}")
def test_against_brute_force(cfg):
    num_visited = num_full = 0
    for window, seqlen_q, seqlen_k in product(WINDOWS, QUERIES, KEYS):
        for tile in tiles_of(cfg, window, seqlen_q, seqlen_k):
            visited, full = check(cfg, window, seqlen_q, seqlen_k, tile)
            num_visited, num_full = num_visited + visited, num_full + full
    assert 0 < num_full < num_visited


@pytest.mark.parametrize("cfg", packed_configs(), ids=lambda cfg: cfg.name)
def test_a_window_of_128_keys_takes_the_tiles_that_it_needs(cfg):
    """What tile_n is made for: where tiles started at its multiples, more would be visited."""
    window, length = Window(127, 0), 4096
    counts = {check(cfg, window, length, length, tile)[0] for tile in tiles_of(cfg, window, length, length)}
    span = cfg.queries_per_tile + 127
    assert max(counts) == -(-span // cfg.tile_n) and max(counts) * cfg.tile_n - span < 16


def test_other_tiles_keep_the_sequence_s_first_key():
    window = Window(127, 0)
    for size, head_dim, mask in FORWARD:
        if size == 2:
            tile = Tile(7, 5, 1, 0, 0, 4096, FIRST_KEY, 4096, 0)
            assert from_first_visible(forward_config("bf16", head_dim, mask, True, True), window, tile) is tile
