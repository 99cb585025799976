"""Which K/V tiles a Q tile visits, from n_block_max - 1 down to n_block_min, and which of them need the mask.

Plain arithmetic: the same code runs on Python ints in the tests, against brute force.
"""
from dataclasses import dataclass
from typing import Optional

from cutlass import Int32

from ...planning.config import ROWS_PER_WARPGROUP, FwdConfig, KernelConfig
from .arithmetic import ceil_div, maximum, minimum


@dataclass(frozen=True)
class Window:
    """How far a row sees from its diagonal, in tokens; at most config.UNBOUNDED_WINDOW.

    chunk   of so many keys, counted from the sequence's first: a row sees none outside the one of its diagonal
    """
    left: Int32
    right: Int32
    chunk: Optional[Int32] = None

    @staticmethod
    def create(cfg: KernelConfig, a) -> "Window":
        """From a kernel's arguments."""
        return Window(a.window_size_left, a.window_size_right, a.attention_chunk if cfg.has_chunks else None)

    def chunk_start(self, diagonal: Int32) -> Int32:
        """The first key of a row's chunk; -chunk of diagonals before the first key, which see none."""
        return (maximum(diagonal, -1) + self.chunk) // self.chunk * self.chunk - self.chunk

    def first_key(self, diagonal: Int32) -> Int32:
        """That a row sees."""
        start = diagonal - self.left
        return start if self.chunk is None else maximum(start, self.chunk_start(diagonal))

    def end(self, diagonal: Int32) -> Int32:
        """Of the keys that a row sees."""
        end = diagonal + self.right + 1
        return end if self.chunk is None else minimum(end, self.chunk_start(diagonal) + self.chunk)


@dataclass(frozen=True)
class BlockRange:
    """K/V tiles [n_block_min, n_block_max), empty if no row of the Q tile sees a key.

    Those in [n_block_full_min, n_block_full_max) are visible to every row of the Q tile.
    """
    n_block_min: Int32
    n_block_max: Int32
    n_block_full_min: Int32
    n_block_full_max: Int32

    def num_cut_right(self, n_block: Int32) -> Int32:
        """How many of the tiles from n_block - 1 down end behind what some row sees."""
        return maximum(n_block - maximum(self.n_block_full_max, self.n_block_min), 0)

    def num_full(self, n_block: Int32) -> Int32:
        """How many of the tiles from n_block - 1 down come before the first that starts left of what some row sees."""
        return maximum(n_block - maximum(self.n_block_full_min, self.n_block_min), 0)


def first_key(cfg: KernelConfig, n_block: Int32) -> Int32:
    """The key, counted from the sequence's first, that K/V tile n_block starts with."""
    return n_block * cfg.tile_n


def key_origin(cfg: FwdConfig, window: Window, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> Int32:
    """The first key that some row of Q tile `m_block` of a window sees, counted from the sequence's first."""
    first_query = m_block * cfg.queries_per_tile
    return maximum(window.first_key(first_query - seqlen_q + seqlen_k), 0)


def block_range(cfg: KernelConfig, window: Window, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32,
                packed_heads: Int32 = 1, tile_m: int | None = None) -> BlockRange:
    """K/V tiles that hold a key visible to some row of Q tile `m_block`, lengths in tokens.

    If cfg.packs_heads, packed_heads consecutive rows are heads of one query. tile_m: of the Q tile, if not cfg's.
    """
    tile_m = tile_m or cfg.tile_m
    n_block_min, n_block_full_min = 0, 0
    n_block_max, n_block_full_max = ceil_div(seqlen_k, cfg.tile_n), seqlen_k // cfg.tile_n
    if cfg.mask != "full":
        # Bottom-right aligned: row i has its diagonal at key i + seqlen_k - seqlen_q.
        first_diagonal = m_block * tile_m - seqlen_q + seqlen_k
        last_diagonal = first_diagonal + tile_m - 1
        if cfg.packs_heads:
            first_query = m_block * tile_m // packed_heads
            last_query = minimum((m_block * tile_m + tile_m - 1) // packed_heads, seqlen_q - 1)
            first_diagonal, last_diagonal = (query - seqlen_q + seqlen_k for query in (first_query, last_query))
        first_end, last_end = (window.end(row) if cfg.is_local else row + 1 for row in (first_diagonal, last_diagonal))
        n_block_max = minimum(n_block_max, ceil_div(maximum(last_end, 0), cfg.tile_n))
        n_block_full_max = minimum(n_block_full_max, maximum(first_end, 0) // cfg.tile_n)
        if cfg.is_local:
            n_block_min = maximum(window.first_key(first_diagonal), 0) // cfg.tile_n
            n_block_full_min = ceil_div(maximum(window.first_key(last_diagonal), 0), cfg.tile_n)
    return BlockRange(n_block_min, n_block_max, n_block_full_min, n_block_full_max)


def warpgroup_range(cfg: KernelConfig, window: Window, blocks: BlockRange, m_block: Int32, wg_idx: Int32,
                    seqlen_q: Int32, seqlen_k: Int32) -> BlockRange:
    """The part of a Q tile's range `blocks` that rows of its warpgroup `wg_idx` see; empty if none is below seqlen_q.

    n_block_max <= blocks.n_block_max unless `blocks` is empty, and blocks.n_block_min <= n_block_min <= n_block_max.
    """
    part = m_block * cfg.num_consumer_wgs + wg_idx
    own = block_range(cfg, window, part, seqlen_q, seqlen_k, tile_m=ROWS_PER_WARPGROUP)
    has_rows = maximum(minimum(seqlen_q - part * ROWS_PER_WARPGROUP, 1), 0)
    most = maximum(minimum(own.n_block_max, blocks.n_block_max) - blocks.n_block_min, 0)
    n_block_max = blocks.n_block_min + most * has_rows
    n_block_min = minimum(maximum(own.n_block_min, blocks.n_block_min), n_block_max)
    return BlockRange(n_block_min, n_block_max, own.n_block_full_min, own.n_block_full_max)


def split_range(blocks: BlockRange, split: Int32, num_splits: Int32) -> BlockRange:
    """The part of one of num_splits CTAs: contiguous, of equal length but for one tile; empty if tiles are fewer."""
    num_blocks = maximum(blocks.n_block_max - blocks.n_block_min, 0)
    each, rest = divmod(num_blocks, num_splits)
    return part_of(blocks, split, each, rest)


def part_of(blocks: BlockRange, split: Int32, each: Int32, rest: Int32) -> BlockRange:
    """Part `split` where parts have `each` tiles and the first `rest` of them one more."""
    first = blocks.n_block_min + split * each + minimum(split, rest)
    end = first + each + minimum(maximum(rest - split, 0), 1)
    return BlockRange(first, end, blocks.n_block_full_min, blocks.n_block_full_max)
