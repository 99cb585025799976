"""Split-KV: which part of which tile a CTA of the decode kernel works on, and where its partial result goes.

A work item is one M tile: 64 rows of (query, head) pairs, heads fastest, whose heads share a KV head. num_splits CTAs
work on it, each on an equal part of the K/V tiles that the item's rows see. Consecutive splits form a cluster.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from ...planning.config import DecodeConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.block_range import BlockRange
from ..common.tiles import Tile

Divisor = cute.FastDivmodDivisorV2


@dataclass(frozen=True)
class SplitGrid:
    """Extents of the work of a launch. Divisors divide by multiplication: each CTA starts with these divisions.

    num_rows             of a group of heads: seqlen_q * packed_heads
    packed_heads         query heads that share an M tile
    num_m_blocks         M tiles of a group
    num_groups           num_heads / packed_heads
    groups_per_kv_head   groups that read the same K and V
    """
    num_rows: Int32
    packed_heads: Divisor
    num_m_blocks: Divisor
    num_groups: Divisor
    groups_per_kv_head: Divisor
    num_splits: Divisor
    cluster_size: Divisor
    num_items: Int32

    @staticmethod
    def create(tile_m: int, batch_size: Int32, seqlen_q: Int32, num_heads: Int32, qhead_per_kvhead: Int32,
               packed_heads: Int32, num_splits: Int32, cluster_size: Int32) -> "SplitGrid":
        """On the host."""
        num_rows, num_groups = seqlen_q * packed_heads, num_heads // packed_heads
        num_m_blocks = ceil_div(num_rows, tile_m)
        divisors = (Divisor(n) for n in (packed_heads, num_m_blocks, num_groups, qhead_per_kvhead // packed_heads,
                                         num_splits, cluster_size))
        return SplitGrid(num_rows, *divisors, num_m_blocks * num_groups * batch_size)


@dataclass(frozen=True)
class SplitScratch:
    """What CTAs hand to the one that merges.

    O          (items, num_splits / cluster_size, rows, dim_v) f32, normalised; rows is the most that an item has.
               Ragged batches: clusters of items that are split follow one another, an item is its first one
    LSE        (items, num_splits / cluster_size, rows) f32
    arrivals   (items * cluster_size,) int32: CTAs of a rank that have delivered; 0 between launches
    """
    O: cute.Tensor
    LSE: cute.Tensor
    arrivals: cute.Tensor


@dataclass(frozen=True)
class SplitWork:
    """The work of one CTA.

    tile           its M tile; tile.head is the first of the packed heads
    blocks         its part of the K/V tiles, may be empty
    item           index of the work item, or where its partial results start
    num_clusters   that work on the item
    cluster, rank  which of the item's clusters it belongs to, and its place in there
    num_rows       rows of the tile that exist, at most tile_m
    num_own_rows   those among them that this CTA merges: rank, rank + cluster_size, ...
    """
    tile: Tile
    blocks: BlockRange
    item: Int32
    num_clusters: Int32
    cluster: Int32
    rank: Int32
    num_rows: Int32
    num_own_rows: Int32


def rows_of(cfg: DecodeConfig, grid: SplitGrid, tile: Tile, rank: Int32) -> tuple[Int32, Int32]:
    """(num_rows, num_own_rows) of a CTA's work."""
    num_rows = minimum(maximum(tile.seqlen_q * grid.packed_heads.divisor - tile.m_block * cfg.tile_m, 0), cfg.tile_m)
    return num_rows, (num_rows + grid.cluster_size.divisor - 1 - rank) // grid.cluster_size


def place_of(grid: SplitGrid, index: Int32):
    """(item, split, m_block, group, batch) of CTA `index`."""
    item, split = divmod(index, grid.num_splits)
    batch_and_group, m_block = divmod(item, grid.num_m_blocks)
    batch, group = divmod(batch_and_group, grid.num_groups)
    return item, split, m_block, group, batch
