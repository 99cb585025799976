"""kernels/scheduler.py on Python ints: every tile exactly once, longest first, and the work of the CTAs balanced."""
import itertools

import pytest

scheduler = pytest.importorskip("fa3_cute.kernels.scheduler")

NUM_SMS = 132
SHAPES = [(1, 1, 1), (1, 3, 50), (7, 1, 1), (7, 16, 3), (32, 16, 4), (128, 16, 1), (5, 33, 2)]


def walk(is_causal, grid, num_ctas):
    """The tiles of each CTA, as the roles walk them."""
    for cta in range(num_ctas):
        tiles = []
        for grid_round in itertools.count():
            index = scheduler.tile_index(is_causal, grid_round, cta, num_ctas)
            if index >= grid.num_tiles():
                break
            tiles.append(scheduler.tile_coordinates(is_causal, grid, index))
        yield tiles


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_exactly_once(is_causal, shape):
    """Over all CTAs, for grids below and above the number of SMs."""
    grid = scheduler.TileGrid(*shape)
    tiles = [tile for tiles in walk(is_causal, grid, min(grid.num_tiles(), NUM_SMS)) for tile in tiles]
    everything = itertools.product(range(shape[0]), range(shape[1]), range(shape[2]))
    assert sorted((t.m_block, t.head, t.batch) for t in tiles) == sorted(everything)


def test_causal_runs_longest_first():
    """A CTA's tiles never get longer."""
    for tiles in walk(True, scheduler.TileGrid(32, 16, 4), NUM_SMS):
        assert all(a.m_block >= b.m_block for a, b in itertools.pairwise(tiles))


@pytest.mark.parametrize("num_m_blocks, batch, least", [(4, 32, 0.96), (8, 16, 0.96), (32, 4, 0.99), (128, 1, 0.99)])
def test_causal_balance(num_m_blocks, batch, least):
    """Mean over maximum of the CTAs' work; a square tile in row m costs m + 1 steps and about one for its ends."""
    grid = scheduler.TileGrid(num_m_blocks, 16, batch)
    work = [sum(tile.m_block + 2 for tile in tiles) for tiles in walk(True, grid, NUM_SMS)]
    assert sum(work) / len(work) / max(work) >= least
