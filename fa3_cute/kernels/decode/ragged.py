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
from cutlass import Constexpr, Float32, Int32, Int64

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
    tile_shift      log2 of the K/V tiles that are a unit of shares
    rows            of the scratch; an item of more rows is not split
    """
    num_slots: Int32
    most_slots: Int32
    most_clusters: Int32
    clusters_of_item: Int32
    split_tiles: Int32
    tile_shift: Int32
    rows: Int32

    @staticmethod
    def create(a) -> "RaggedGrid":
        """From a kernel's arguments."""
        return RaggedGrid(a.num_slots, a.most_slots, a.most_clusters, a.clusters_of_item, a.split_tiles,
                          a.tile_shift, a.partial_rows)


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
    offset_q ..    as RaggedBatch.place
    """
    sequence: Int32
    group: Int32
    m_block: Int32
    cluster: Int32
    num_clusters: Int32
    first: Int32
    offset_q: Int32
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32


@dataclass(frozen=True)
class Dealer:
    """Finds the place of a cluster. Methods of one sequence per lane: a warp looks at 32 at a time."""
    cfg: Constexpr
    batch: RaggedBatch
    grid: RaggedGrid
    window: Window
    packed_heads: Divisor
    num_groups: Int32
    cluster_size: Int32

    @cute.jit
    def sequence(self, number: Int32) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32]:
        """offset_q, seqlen_q, offset_k, seqlen_k of a sequence, its M tiles, and the K/V tiles that the last one sees."""
        place = self.batch.place(number)
        _, seqlen_q, _, seqlen_k = place
        num_m_blocks = ceil_div(seqlen_q * self.packed_heads.divisor, self.cfg.tile_m)
        blocks = block_range(self.cfg, self.window, maximum(num_m_blocks - 1, 0), seqlen_q, seqlen_k, self.packed_heads)
        return (*place, num_m_blocks, maximum(blocks.n_block_max - blocks.n_block_min, 0))

    def weight(self, tiles: Int32) -> Int32:
        """What an item of so many K/V tiles counts: they, in units that no sum is too large of."""
        return (tiles + (1 << self.grid.tile_shift) - 1) >> self.grid.tile_shift

    @cute.jit
    def clusters(self, seqlen_q: Int32, tiles: Int32, slots: Int32, total: Int32) -> Int32:
        """How many work on each item of a sequence; total: the weight of all items."""
        share = Int64(self.weight(tiles)) * slots
        count = Int32(Float32(share) * cute.arch.rcp_approx(Float32(total)))        # or one more, or one less
        if Int64(count) * total > share:
            count -= 1
        if Int64(count + 1) * total <= share:
            count += 1
        count = minimum(count, tiles // (LEAST_TILES * self.cluster_size))
        if self.grid.split_tiles > 0:
            count = ceil_div(tiles, self.grid.split_tiles)
        count = maximum(minimum(count, self.grid.most_clusters), 1)
        if self.grid.clusters_of_item > 0:
            count = self.grid.clusters_of_item
        if seqlen_q * self.packed_heads.divisor > self.grid.rows:
            count = Int32(1)
        return count

    @cute.jit
    def find(self, index: Int32) -> Place:
        """The place of cluster `index`: among the items of several clusters, then among the others."""
        lane, size = cute.arch.lane_idx(), self.batch.batch_size
        first_ones = self.sequence(lane)
        num_items, total = self.sums(first_ones)
        for first in cutlass.range(LANES, size, LANES, unroll=1):
            more, weight = self.sums(self.sequence(first + lane))
            num_items, total = num_items + more, total + weight
        slots = maximum(self.grid.num_slots, minimum(num_items, self.grid.most_slots))
        total = maximum(total, 1)
        num_split = self.split_clusters(first_ones, slots, total)
        for first in cutlass.range(LANES, size, LANES, unroll=1):
            num_split += self.split_clusters(self.sequence(first + lane), slots, total)

        found = tuple(Int32(0) for _ in range(10))
        before_split, before_others = Int32(0), num_split
        for first in cutlass.range(0, size, LANES, unroll=1):
            ones = first_ones
            if first > 0:
                ones = self.sequence(first + lane)
            offset_q, seqlen_q, offset_k, seqlen_k, num_m_blocks, tiles = ones
            each = self.clusters(seqlen_q, tiles, slots, total)
            count = num_m_blocks * self.num_groups * each
            of_split = count if each > 1 else Int32(0)
            through_split, through_others = inclusive_sums(of_split, count - of_split)
            through_split, through_others = before_split + through_split, before_others + through_others
            end_split = cute.arch.shuffle_sync(through_split, LANES - 1)
            end_others = cute.arch.shuffle_sync(through_others, LANES - 1)
            is_split = index < num_split
            before, end, through = before_others, end_others, through_others
            if is_split:
                before, end, through = before_split, end_split, through_split
            if index >= before and index < end:
                owner = cute.arch.popc(cute.arch.vote_ballot_sync(through <= index))
                of_owner = lambda value: cute.arch.shuffle_sync(value, owner)
                within, num_clusters = index - of_owner(through - count), of_owner(each)
                m_blocks = of_owner(num_m_blocks)
                item = within // num_clusters
                cluster = within - item * num_clusters
                group = item // m_blocks
                found = (first + owner, group, item - group * m_blocks, cluster, num_clusters, index - cluster,
                         *(of_owner(value) for value in (offset_q, seqlen_q, offset_k, seqlen_k)))
            before_split, before_others = end_split, end_others
        return Place(*found)

    @cute.jit
    def sums(self, ones: tuple) -> tuple[Int32, Int32]:
        """(items, their weight) of 32 sequences."""
        num_items = ones[4] * self.num_groups
        weight = num_items * self.weight(ones[5])
        return cute.arch.warp_redux_sync(num_items, "add"), cute.arch.warp_redux_sync(weight, "add")

    @cute.jit
    def split_clusters(self, ones: tuple, slots: Int32, total: Int32) -> Int32:
        """Clusters of those among 32 sequences whose items have several."""
        each = self.clusters(ones[1], ones[5], slots, total)
        count = ones[4] * self.num_groups * each
        return cute.arch.warp_redux_sync(count if each > 1 else Int32(0), "add")


@cute.jit
def inclusive_sums(a: Int32, b: Int32) -> tuple[Int32, Int32]:
    """The sums of the values of this lane and those below it."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(5):
        below_a, below_b = cute.arch.shuffle_sync_up(a, 1 << i), cute.arch.shuffle_sync_up(b, 1 << i)
        a, b = a + (below_a if lane >= 1 << i else 0), b + (below_b if lane >= 1 << i else 0)
    return a, b
