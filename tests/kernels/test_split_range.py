"""kernels/common/block_range.py for the decode kernel, on Python ints: parts of split-KV, packed heads as rows."""

import random
from itertools import product

import pytest

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.config import DecodeConfig
from fa3_cute.kernels.common import block_range as module

MAX_SPLITS = 256


# ---- split_range ---------------------------------------------------------------------------------------------------


def parts_of(blocks, num_splits):
    return [module.split_range(blocks, split, num_splits) for split in range(num_splits)]


def check_parts(blocks, num_splits):
    """Disjoint and in order, together the whole range, of equal length but for one tile; the inner range is kept."""
    parts = parts_of(blocks, num_splits)
    where = (blocks, num_splits)
    tiles = [tile for part in parts for tile in range(part.n_block_min, part.n_block_max)]
    assert tiles == list(range(blocks.n_block_min, blocks.n_block_max)), where
    lengths = [part.n_block_max - part.n_block_min for part in parts]
    assert min(lengths) >= 0 and max(lengths) - min(lengths) <= 1, where
    for part in parts:
        assert (part.n_block_full_min, part.n_block_full_max) == (blocks.n_block_full_min, blocks.n_block_full_max)


def random_blocks(rng, longest):
    first = rng.choice((0, 0, rng.randrange(1000)))
    last = first + rng.randint(0, longest)
    inner = sorted(rng.randint(0, last + 5) for _ in range(2))
    return module.BlockRange(first, last, *inner)


@pytest.mark.parametrize("longest", [3, 40, 300, 3000])
def test_parts_of_random_ranges(longest):
    rng = random.Random(longest)
    for _ in range(400):
        check_parts(random_blocks(rng, longest), rng.randint(1, MAX_SPLITS))


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 7, 8, 255, 256, 257, 2048])
def test_every_number_of_splits(num_blocks):
    for num_splits in range(1, MAX_SPLITS + 1):
        check_parts(module.BlockRange(5, 5 + num_blocks, 5, 5 + num_blocks), num_splits)


@pytest.mark.parametrize("last", [7, 6, 0])
@pytest.mark.parametrize("num_splits", [1, 2, 7, 256])
def test_an_empty_range_has_empty_parts(last, num_splits):
    """Also if it ends before it begins, as `block_range` may say of a tile that no row needs."""
    for part in parts_of(module.BlockRange(7, last, 0, 0), num_splits):
        assert part.n_block_max == part.n_block_min


def test_one_split_is_the_whole_range():
    assert parts_of(module.BlockRange(3, 11, 4, 9), 1) == [module.BlockRange(3, 11, 4, 9)]


# ---- block_range with packed heads ---------------------------------------------------------------------------------

TILES_N = (64, 128)
QUERIES = (1, 2, 8, 20, 65, 130)
KEYS = (0, 1, 63, 64, 65, 128, 200, 513)
PACKED_HEADS = (1, 2, 3, 5, 8, 16, 64)
WINDOWS = [module.Window(*sides) for sides in product((0, 3, 64, 200, UNBOUNDED_WINDOW), repeat=2)]
NO_WINDOW = module.Window(UNBOUNDED_WINDOW, UNBOUNDED_WINDOW)


def config(is_local, tile_n):
    return DecodeConfig("bf16", 64, is_local, tile_n, 2, 1)


def rows_of(cfg, m_block, seqlen_q, packed_heads):
    """The rows of an M tile that exist."""
    return range(m_block * cfg.tile_m, min((m_block + 1) * cfg.tile_m, seqlen_q * packed_heads))


def keys_seen(cfg, window, query, seqlen_q, seqlen_k):
    """The keys that a query sees, as a range: the definition of the masks, bottom-right aligned."""
    if not cfg.is_local:
        return range(seqlen_k)
    diagonal = query + seqlen_k - seqlen_q
    first, last = max(diagonal - window.left, 0), min(diagonal + window.right, seqlen_k - 1)
    return range(first, max(first, last + 1))


def check_blocks(cfg, window, seqlen_q, seqlen_k, packed_heads):
    """Every M tile visits the tiles from its rows' first visible key to their last, and leaves exactly those without
    a mask that all its rows see whole. Returns how many these are."""
    num_full = 0
    for m_block in range(-(-seqlen_q * packed_heads // cfg.tile_m)):
        blocks = module.block_range(cfg, window, m_block, seqlen_q, seqlen_k, packed_heads)
        where = (window, seqlen_q, seqlen_k, packed_heads, m_block)
        queries = sorted({row // packed_heads for row in rows_of(cfg, m_block, seqlen_q, packed_heads)})
        seen = [keys_seen(cfg, window, query, seqlen_q, seqlen_k) for query in queries]
        tiles = [key // cfg.tile_n for keys in seen if keys for key in (keys[0], keys[-1])]
        needed = range(min(tiles), max(tiles) + 1) if tiles else range(0)
        visited = range(blocks.n_block_min, blocks.n_block_max)
        assert list(visited) == list(needed), where
        full = [n for n in visited if all(n * cfg.tile_n in keys and (n + 1) * cfg.tile_n - 1 in keys for keys in seen)]
        inner = range(max(blocks.n_block_full_min, blocks.n_block_min), blocks.n_block_full_max)
        assert full == [n for n in inner if n in visited], where
        num_full += len(full)
    return num_full


@pytest.mark.parametrize("tile_n", TILES_N)
@pytest.mark.parametrize("packed_heads", PACKED_HEADS)
def test_windows_of_packed_heads(packed_heads, tile_n):
    cfg = config(True, tile_n)
    num_full = sum(
        check_blocks(cfg, window, seqlen_q, seqlen_k, packed_heads)
        for window, seqlen_q, seqlen_k in product(WINDOWS, QUERIES, KEYS)
    )
    assert num_full > 0, "the unmasked loop would never run"


@pytest.mark.parametrize("tile_n", TILES_N)
@pytest.mark.parametrize("packed_heads", PACKED_HEADS)
def test_without_a_mask_every_tile_is_visited(packed_heads, tile_n):
    for seqlen_q, seqlen_k in product(QUERIES, KEYS):
        check_blocks(config(False, tile_n), NO_WINDOW, seqlen_q, seqlen_k, packed_heads)


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("seqlen_q", [0, 1, 5])
def test_tiles_without_rows_stay_within_the_keys(seqlen_q, is_local):
    """The grid is made for the rows of the tensor: where seqused_q is less, the last M tiles have none to store."""
    cfg = config(is_local, 64)
    for window, seqlen_k, m_block in product(WINDOWS if is_local else [NO_WINDOW], KEYS, range(4)):
        for part in parts_of(module.block_range(cfg, window, m_block, seqlen_q, seqlen_k, 16), 3):
            if part.n_block_min < part.n_block_max:
                assert part.n_block_min >= 0 and part.n_block_max <= -(-seqlen_k // cfg.tile_n)


@pytest.mark.parametrize("window", [NO_WINDOW, module.Window(100, 0), module.Window(UNBOUNDED_WINDOW, 0)], ids=str)
def test_splits_of_a_window_share_its_tiles(window):
    """A row's keys lie in the parts of its own M tile, each key in one of them."""
    cfg, seqlen_q, seqlen_k, packed_heads = config(True, 64), 9, 700, 16
    for m_block, num_splits in product(range(3), (1, 2, 3, 7, 16)):
        parts = parts_of(module.block_range(cfg, window, m_block, seqlen_q, seqlen_k, packed_heads), num_splits)
        for row in rows_of(cfg, m_block, seqlen_q, packed_heads):
            for key in keys_seen(cfg, window, row // packed_heads, seqlen_q, seqlen_k):
                assert sum(part.n_block_min <= key // 64 < part.n_block_max for part in parts) == 1
