"""kernels/block_range.py and the mask's row limits against brute force over every (row, key) pair, on Python ints."""
import itertools

import pytest

from fa3_cute.heuristics import all_forward_configs

block_range = pytest.importorskip("fa3_cute.kernels.block_range").block_range

LENGTHS = (1, 2, 63, 64, 65, 112, 127, 128, 129, 191, 192, 193, 300, 513)
TILES = sorted({(cfg.is_causal, cfg.tile_m, cfg.tile_n): cfg for cfg in all_forward_configs()}.items())


def sees(is_causal, i, j, seqlen_q, seqlen_k):
    """The definition of api.md: bottom-right aligned."""
    return j < seqlen_k and (not is_causal or j <= i + seqlen_k - seqlen_q)


@pytest.mark.parametrize("cfg", [cfg for _, cfg in TILES], ids=[str(key) for key, _ in TILES])
def test_block_range_against_brute_force(cfg):
    """Visited tiles are exactly those with a visible key; tiles below n_block_full_max are visible to every row."""
    for seqlen_q, seqlen_k in itertools.product(LENGTHS, LENGTHS):
        for m_block in range(-(-seqlen_q // cfg.tile_m)):
            rows = range(m_block * cfg.tile_m, min((m_block + 1) * cfg.tile_m, seqlen_q))
            blocks = block_range(cfg, m_block, seqlen_q, seqlen_k)
            for n_block in range(-(-seqlen_k // cfg.tile_n) + 1):
                keys = (n_block * cfg.tile_n, (n_block + 1) * cfg.tile_n - 1)
                # Visibility is monotonic: the last row sees most keys, a row's first key is its most visible one.
                any_visible = sees(cfg.is_causal, rows[-1], keys[0], seqlen_q, seqlen_k)
                all_visible = sees(cfg.is_causal, rows[0], keys[1], seqlen_q, seqlen_k)
                where = (seqlen_q, seqlen_k, m_block, n_block)
                visited = blocks.n_block_min <= n_block < blocks.n_block_max
                # A ragged last Q tile may visit a tile that only its padding rows see.
                assert visited or not any_visible, where
                assert any_visible or not visited or rows[-1] == seqlen_q - 1, where
                assert all_visible or n_block >= blocks.n_block_full_max, where


def test_no_visible_key_is_an_empty_range():
    """seqlen_q > seqlen_k, causal: the first rows see nothing."""
    cfg = next(cfg for cfg in all_forward_configs() if cfg.is_causal and cfg.tile_m == 128)
    blocks = block_range(cfg, 0, 512, 256)
    assert blocks.n_block_max <= blocks.n_block_min
