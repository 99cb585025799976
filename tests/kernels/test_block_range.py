"""kernels/common/block_range.py against brute force over every (row, key) pair, on Python ints."""

import itertools
from dataclasses import replace

import pytest

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.config import ROWS_PER_WARPGROUP
from fa3_cute.planning.tables import all_forward_configs
from fa3_cute.kernels.common import block_range as module

LENGTHS = (1, 2, 63, 64, 65, 112, 127, 128, 129, 191, 192, 193, 300, 513)
WINDOWS = [module.Window(*sides) for sides in itertools.product((0, 1, 100, 129, 300, UNBOUNDED_WINDOW), repeat=2)]
NO_WINDOW = [module.Window(UNBOUNDED_WINDOW, UNBOUNDED_WINDOW)]
TILES = {(cfg.mask, cfg.tile_m, cfg.tile_n): cfg for cfg in all_forward_configs()}


def keys_seen(cfg, window, row, seqlen_q, seqlen_k):
    """The keys that a row sees, as a range: the definition of the masks, bottom-right aligned."""
    diagonal = row + seqlen_k - seqlen_q
    first, last = 0, seqlen_k - 1
    if cfg.is_causal:
        last = min(last, diagonal)
    if cfg.is_local:
        first, last = max(first, diagonal - window.left), min(last, diagonal + window.right)
    return range(first, max(first, last + 1))


def check(cfg, window, seqlen_q, seqlen_k, m_block):
    """The ranges of a Q tile and of its warpgroups. Returns the number of tiles that the whole Q tile sees."""
    blocks = module.block_range(cfg, window, m_block, seqlen_q, seqlen_k)
    rows = range(m_block * cfg.tile_m, (m_block + 1) * cfg.tile_m)
    for wg_idx in range(cfg.num_consumer_wgs):
        own = module.warpgroup_range(cfg, window, blocks, m_block, wg_idx, seqlen_q, seqlen_k)
        if blocks.n_block_min < blocks.n_block_max:
            assert blocks.n_block_min <= own.n_block_min <= own.n_block_max <= blocks.n_block_max
        own_rows = rows[ROWS_PER_WARPGROUP * wg_idx : ROWS_PER_WARPGROUP * (wg_idx + 1)]
        assert own_rows[0] < seqlen_q or own.n_block_min == own.n_block_max
        visited_and_full = min(own.n_block_full_max, own.n_block_max)
        check_rows(cfg, window, seqlen_q, seqlen_k, own_rows, replace(own, n_block_full_max=visited_and_full))
    return check_rows(cfg, window, seqlen_q, seqlen_k, rows, blocks)


def check_rows(cfg, window, seqlen_q, seqlen_k, rows, blocks):
    """Tiles with a visible key are visited, no other between them; the full range holds fully visible tiles only.

    Returns the number of these.
    """
    where = (window, seqlen_q, seqlen_k, rows)
    # The last Q tile's padding rows see keys like real ones; the kernel never stores them.
    seen = [keys_seen(cfg, window, row, seqlen_q, seqlen_k) for row in rows]
    real = [keys for row, keys in zip(rows, seen, strict=True) if row < seqlen_q and keys]
    anyone = [keys for keys in seen if keys]
    visited = range(blocks.n_block_min, max(blocks.n_block_min, blocks.n_block_max))
    needed = {key // cfg.tile_n for keys in real for key in (keys[0], keys[-1])}
    allowed = {key // cfg.tile_n for keys in anyone for key in (keys[0], keys[-1])}
    assert not needed or (visited[0] <= min(needed) and max(needed) <= visited[-1]), where
    assert not visited or (allowed and min(allowed) <= visited[0] and visited[-1] <= max(allowed)), where
    full = range(max(blocks.n_block_full_min, blocks.n_block_min), blocks.n_block_full_max)
    for n_block in full:
        first, last = n_block * cfg.tile_n, (n_block + 1) * cfg.tile_n - 1
        assert n_block in visited and all(first in keys and last in keys for keys in seen), (*where, n_block)
    return len(full)


@pytest.mark.parametrize("cfg", TILES.values(), ids=["-".join(map(str, key)) for key in TILES])
def test_block_range_against_brute_force(cfg):
    num_full = 0
    for seqlen_q, seqlen_k in itertools.product(LENGTHS[::2] if cfg.is_local else LENGTHS, LENGTHS):
        for window in WINDOWS if cfg.is_local else NO_WINDOW:
            for m_block in range(-(-seqlen_q // cfg.tile_m)):
                num_full += check(cfg, window, seqlen_q, seqlen_k, m_block)
    assert num_full > 0, "the unmasked loop would never run"


@pytest.mark.parametrize("cfg", TILES.values(), ids=["-".join(map(str, key)) for key in TILES])
def test_the_walk_masks_every_tile_that_needs_it(cfg):
    """Below the last tile, which is always masked: those cut on the right, full ones, those cut on the left."""
    windows = WINDOWS if cfg.is_local else NO_WINDOW
    for seqlen_q, seqlen_k, window in itertools.product(LENGTHS[::3], LENGTHS, windows):
        for m_block in range(-(-seqlen_q // cfg.tile_m)):
            blocks = module.block_range(cfg, window, m_block, seqlen_q, seqlen_k)
            assert unmasked_tiles(blocks) == fully_visible_tiles(blocks), (window, seqlen_q, seqlen_k, m_block)


def unmasked_tiles(blocks):
    """Those that the main loop takes without a mask."""
    last = max(blocks.n_block_max - 1, blocks.n_block_min)
    end = last - blocks.num_cut_right(last)
    return set(range(end - blocks.num_full(end), end))


def fully_visible_tiles(blocks):
    """But for the last tile."""
    full = range(blocks.n_block_full_min, blocks.n_block_full_max)
    return set(range(blocks.n_block_min, blocks.n_block_max - 1)) & set(full)


def test_no_visible_key_is_an_empty_range():
    """seqlen_q > seqlen_k, causal: the first rows see nothing."""
    cfg = next(cfg for cfg in all_forward_configs() if cfg.is_causal and cfg.tile_m == 128)
    blocks = module.block_range(cfg, NO_WINDOW[0], 0, 512, 256)
    assert blocks.n_block_max <= blocks.n_block_min


@pytest.mark.parametrize("m_block", [0, 1, 8_000_000])
def test_lengths_near_the_limit_stay_within_int32(m_block):
    """2^30 tokens: no intermediate value leaves int32 (Python ints would not show it, so every operand is watched)."""

    class Watched(int):
        def _watch(name):
            def operate(self, other):
                value = getattr(int, name)(int(self), int(other))
                assert -(2**31) <= value < 2**31, (name, self, other)
                return Watched(value)

            return operate

        for name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__"):
            locals()[name] = _watch(name)

    cfg = next(cfg for cfg in all_forward_configs() if cfg.is_local and cfg.tile_m == 128)
    length = Watched(2**30 - 128)
    for window in (
        module.Window(Watched(UNBOUNDED_WINDOW), Watched(0)),
        module.Window(Watched(5), Watched(UNBOUNDED_WINDOW)),
    ):
        blocks = module.block_range(cfg, window, Watched(m_block), length, length)
        assert blocks.n_block_max > blocks.n_block_min
