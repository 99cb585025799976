"""What the backward kernels drop is what the reference drops, on the fragments of each thread. No GPU."""

import numpy as np
import pytest

pytest.importorskip("cutlass")

from fa3_cute.contract.dropout import key_of, num_dropped, word
from fa3_cute.contract.philox import keep_mask
from fa3_cute.kernels.backward import dropped
from fa3_cute.kernels.backward.blocks import KeyTile
from fa3_cute.kernels.backward.visible import KeyMask
from fa3_cute.kernels.common import dropout
from fa3_cute.kernels.common.block_range import Window
from fa3_cute.kernels.common.dropout import RowDropout
from fa3_cute.kernels.common.layout import col_offset
from fa3_cute.kernels.common.tiles import Tile
from fa3_cute.kernels.common.visibility import Visibility
from fa3_cute.planning.one_side import OneSidePass

SEED, OFFSET, P_DROPOUT = 0xFEDCBA9876543210, 0x8000000180000003, 0.3
HEAD, SEQUENCE, LENGTHS = 5, 3, (400, 500)  # lengths beyond the tiles
DROPOUT = frozenset({("has_dropout", True)})


@pytest.fixture(autouse=True)
def registers_are_ints(monkeypatch):
    for module in (dropout, dropped):
        monkeypatch.setattr(module, "Uint32", word)
        monkeypatch.setattr(module, "Uint64", int)


def of_thread(cfg, tidx: int, block: int, other: int):
    """(rows, columns, Dropped) of a thread in a tile: queries or keys of the CTA, and what it has of the other side."""
    state = RowDropout(cfg, *key_of(SEED, OFFSET), num_dropped(P_DROPOUT) * 0x01010101, 1.0, None)
    if cfg.is_of_queries:
        # what the kernel has in place of the sequence (one_side.find_tile)
        tile = Tile(block, HEAD, 1, 0, 0, LENGTHS[0], 0, LENGTHS[1], sequence=77)
        mask = Visibility(cfg, Window(0, 0), tile).of_thread(tidx)
        first = block * cfg.tile_rows + mask.first_row
        found = dropped.of_queries(state, mask, SEQUENCE, other)
    else:
        mask = KeyMask.create(cfg, Window(0, 0), KeyTile(block, 1, 0, 0, LENGTHS[0], 0, LENGTHS[1], 0, SEQUENCE), tidx)
        first = mask.first_key
        found = dropped.of_keys(state, mask, (HEAD, SEQUENCE), other)
    columns = [other * cfg.tile_columns + mask.first_col + col_offset(c) for c in range(cfg.tile_columns // 4)]
    return [first, first + 8], columns, found


@pytest.mark.parametrize("block, other", [(0, 0), (1, 3), (2, 1)])
@pytest.mark.parametrize("side", ["dq", "dk"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_thread_drops_what_the_reference_drops(head_dim, side, block, other):
    (cfg,) = (cfg for cfg in OneSidePass("bf16", head_dim, "full", True, DROPOUT).sides if cfg.side == side)
    count = 0
    for tidx in range(128 * cfg.num_consumer_wgs):
        rows, columns, found = of_thread(cfg, tidx, block, other)
        queries, keys = (rows, columns) if cfg.is_of_queries else (columns, rows)
        kept = keep_mask(P_DROPOUT, SEED, OFFSET, SEQUENCE, HEAD, queries, keys)
        kept = kept if cfg.is_of_queries else kept.T
        expected = [[not found.has(r, c) for c in range(len(columns))] for r in range(2)]
        assert np.array_equal(kept, expected), tidx
        count += kept.sum()
    assert 0.6 < count / (cfg.tile_rows * cfg.tile_columns) < 0.8
