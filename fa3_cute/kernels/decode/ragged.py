"""Splits of a ragged batch: from the lengths on the device, how many clusters work on each item, and which one is ours.

    tiles of an item            K/V tiles that its rows see
    clusters of an item         max(1, tiles * slots / all tiles), rounded down: its share of the clusters that run at
                                once, or of as many as there are items if these are more (but at most most_slots)

Pieces are then less than twice as long as the mean one, whether one sequence is a hundred times as long as the others
or all are alike; all alike and as many as slots, none is split. Items of several clusters come first in the order of
the grid, the longest pieces before the others; clusters behind the last item have nothing to do.

Every warp reads all lengths, 32 sequences at a time, and finds its place in running sums.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64

from ...planning.config import DecodeConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.block_range import BlockRange, Window, block_range, part_of
from ..common.ragged import RaggedBatch

Divisor = cute.FastDivmodDivisorV2
LANES = 32
LEAST_TILES = 4        # per CTA of an item that several clusters share: their merge costs as much as two or three tiles


@dataclass(frozen=True)
class RaggedGrid:
    """How the work of a launch is dealt out.

    num_slots       clusters that run at once
    most_slots      that shares are made of, at most
    most_clusters   of an item, at most
    clusters_of_item   of every one if it is not 0; then shares do not count
    split_tiles     K/V tiles of a cluster if it is not 0; then shares do not count
    rows            of the scratch; an item of more rows is not split
    """
    num_slots: Int32
    most_slots: Int32
    most_clusters: Int32
    clusters_of_item: Int32
    split_tiles: Int32
    rows: Int32

    @staticmethod
    def create(a) -> "RaggedGrid":
        """From a kernel's arguments."""
        return RaggedGrid(a.num_slots, a.most_slots, a.most_clusters, a.clusters_of_item, a.split_tiles, a.partial_rows)


    @cute.jit
    def part(self, tiles: BlockRange, split: Int32, num_splits: Int32) -> BlockRange:
        """The K/V tiles of one of num_splits CTAs."""
        num_blocks = maximum(tiles.n_block_max - tiles.n_block_min, 0)
        each = num_blocks // num_splits
        blocks = part_of(tiles, split, each, num_blocks - each * num_splits)
        first, end = blocks.n_block_min, blocks.n_block_max
        if self.split_tiles > 0:
            first = tiles.n_block_min + split * self.split_tiles
            end = minimum(first + self.split_tiles, tiles.n_block_max)
        return BlockRange(first, end, tiles.n_block_full_min, tiles.n_block_full_max)


@dataclass(frozen=True)
class Place:
    """What a cluster works on: part `cluster` of num_clusters of the item (sequence, group, m_block).

    num_clusters   0: nothing
    first          the item's first cluster; where there are several, the place of their partial results
    """
    sequence: Int32
    group: Int32
    m_block: Int32
    cluster: Int32
    num_clusters: Int32
    first: Int32


@dataclass(frozen=True)
class Items:
    """The items of one sequence per lane.

    count      M tiles times groups of heads
    tiles      K/V tiles that the last of its M tiles sees
    """
    num_m_blocks: Int32
    count: Int32
    rows: Int32
    tiles: Int32


@dataclass(frozen=True)
class Dealer:
    """Finds the place of a cluster."""
    cfg: Constexpr
    batch: RaggedBatch
    grid: RaggedGrid
    window: Window
    packed_heads: Divisor
    num_groups: Int32
    cluster_size: Int32

    @cute.jit
    def items(self, sequence: Int32) -> Items:
        """Of a sequence, none past the last."""
        cfg = self.cfg
        _, seqlen_q, _, seqlen_k = self.batch.place(sequence)
        rows = seqlen_q * self.packed_heads.divisor
        num_m_blocks = ceil_div(rows, cfg.tile_m)
        blocks = block_range(cfg, self.window, maximum(num_m_blocks - 1, 0), seqlen_q, seqlen_k, self.packed_heads)
        tiles = maximum(blocks.n_block_max - blocks.n_block_min, 0)
        return Items(num_m_blocks, num_m_blocks * self.num_groups, rows, tiles)

    @cute.jit
    def clusters(self, items: Items, slots: Int32, all_tiles: Int64) -> Int32:
        """How many work on each of a sequence's items."""
        count = Int32(Int64(items.tiles) * slots // maximum(all_tiles, Int64(1)))
        count = minimum(count, items.tiles // (LEAST_TILES * self.cluster_size))
        if self.grid.split_tiles > 0:
            count = ceil_div(items.tiles, self.grid.split_tiles)
        count = maximum(minimum(count, self.grid.most_clusters), 1)
        if self.grid.clusters_of_item > 0:
            count = self.grid.clusters_of_item
        if items.rows > self.grid.rows:
            count = Int32(1)
        return count

    @cute.jit
    def totals(self) -> tuple[Int32, Int64]:
        """(items, K/V tiles of all items)."""
        count, tiles = Int32(0), Int64(0)
        for first in cutlass.range(0, self.batch.batch_size, LANES, unroll=1):
            items = self.items(first + cute.arch.lane_idx())
            count += items.count
            tiles += Int64(items.count) * items.tiles
        for i in cutlass.range_constexpr(5):
            count += cute.arch.shuffle_sync_bfly(count, 1 << i)
            tiles += cute.arch.shuffle_sync_bfly(tiles, 1 << i)
        return count, tiles

    @cute.jit
    def find(self, index: Int32) -> Place:
        """The place of cluster `index`: among the items of several clusters, then among the others."""
        num_items, all_tiles = self.totals()
        slots = maximum(self.grid.num_slots, minimum(num_items, self.grid.most_slots))
        sequence, group, m_block, cluster, num_clusters, partial = (Int32(0) for _ in range(6))
        before = Int32(0)
        for others in cutlass.range_constexpr(2):
            for first in cutlass.range(0, self.batch.batch_size, LANES, unroll=1):
                items = self.items(first + cute.arch.lane_idx())
                each = self.clusters(items, slots, all_tiles)
                count = items.count * each
                if (each > 1) != (others == 0):
                    count = Int32(0)
                through = before + inclusive_sum(count)
                if index >= before and index < cute.arch.shuffle_sync(through, LANES - 1):
                    owner = cute.arch.popc(cute.arch.vote_ballot_sync(through <= index))
                    of_owner = lambda value: cute.arch.shuffle_sync(value, owner)
                    within = index - of_owner(through - count)
                    num_clusters, num_m_blocks = of_owner(each), of_owner(items.num_m_blocks)
                    item = within // num_clusters
                    cluster = within - item * num_clusters
                    group = item // num_m_blocks
                    m_block = item - group * num_m_blocks
                    sequence, partial = first + owner, index - cluster
                before = cute.arch.shuffle_sync(through, LANES - 1)
        return Place(sequence, group, m_block, cluster, num_clusters, partial)


@cute.jit
def inclusive_sum(value: Int32) -> Int32:
    """The sum of the values of this lane and those below it."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << i)
        value = value + (below if lane >= 1 << i else 0)
    return value
