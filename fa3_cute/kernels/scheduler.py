"""Which tiles a CTA works on, and in what order: a persistent grid with a static, balanced assignment.

A tile is (m_block, head, batch). Full attention walks m_block fastest, so that the CTAs running at one time share K and
V in L2. Causal tiles differ in length: they run longest first, heads fastest, and every other round of the grid runs
backwards. Along a round the length falls almost linearly with the CTA's place, so a forward and a backward round add up
to the same work for every CTA. Mean over maximum of the CTAs' work, counted in K/V tiles (132 CTAs, 16 heads, 16k
tokens in all): 97 % at 512 and 1k tokens, 99.8 % at 4k and 16k (94 % without turning back). No counter, no memory, no
atomics, and the same assignment every time.

`tile_coordinates` and `tile_index` are plain arithmetic: the same code runs on Python ints in the tests.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Int32


@dataclass(frozen=True)
class TileGrid:
    """Extents of the tile space."""
    num_m_blocks: Int32
    num_heads: Int32
    batch_size: Int32

    def num_tiles(self) -> Int32:
        """Tiles of the whole problem."""
        return self.num_m_blocks * self.num_heads * self.batch_size


@dataclass(frozen=True)
class Tile:
    """One tile of O."""
    m_block: Int32
    head: Int32
    batch: Int32


def tile_coordinates(is_causal: bool, grid: TileGrid, index: Int32) -> Tile:
    """The tile at a place of the global order."""
    if is_causal:
        heads_of_batch = grid.num_heads * grid.batch_size
        row = index // heads_of_batch
        m_block, any_head = grid.num_m_blocks - 1 - row, index - row * heads_of_batch
    else:
        any_head = index // grid.num_m_blocks
        m_block = index - any_head * grid.num_m_blocks
    batch = any_head // grid.num_heads
    return Tile(m_block, any_head - batch * grid.num_heads, batch)


def tile_index(is_causal: bool, grid_round: Int32, cta: Int32, num_ctas: Int32) -> Int32:
    """The place in the global order that a CTA takes in one round of the grid."""
    if is_causal:
        is_backward = grid_round % 2
        cta = cta + is_backward * (num_ctas - 1 - 2 * cta)
    return grid_round * num_ctas + cta


@dataclass
class TileScheduler:
    """Walks one CTA through its tiles. Every role makes its own; all of them agree."""
    is_causal: Constexpr
    grid: TileGrid
    grid_round: Int32

    @staticmethod
    def create(is_causal: bool, grid: TileGrid) -> "TileScheduler":
        """Before the first tile."""
        return TileScheduler(is_causal, grid, Int32(0))

    def index(self) -> Int32:
        """Place of the current tile in the global order."""
        cta, num_ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        return tile_index(self.is_causal, self.grid_round, cta, num_ctas)

    def has_tile(self):
        """Whether the current tile exists. If a round misses a CTA, there is no later round."""
        return self.index() < self.grid.num_tiles()

    def tile(self) -> Tile:
        """The current tile."""
        return tile_coordinates(self.is_causal, self.grid, self.index())

    def advance(self):
        """To the next round."""
        self.grid_round = self.grid_round + 1
