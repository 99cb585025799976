"""Splits of a ragged batch: from the lengths on the device, how many clusters work on each item, and which one is ours.

    tiles of an item            K/V tiles that its rows see, at most
    clusters of an item         max(1, tiles * slots / all tiles), rounded down: its share of the clusters that run at
                                once, or of as many as there are items if these are more (but at most most_slots)

Pieces are then less than twice as long as the mean one, whether one sequence is a hundred times as long as the others
or all are alike; all alike and as many as slots, none is split. Items of several clusters come first in the order of
the grid, the longest pieces before the others; clusters behind the last item have nothing to do.

Every warp reads all lengths, 32 sequences at a time, and finds its place in running sums. That is the start of every
CTA, before the first load of K: a batch of 32 takes its short way.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from ...planning.config import DecodeConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.block_range import BlockRange, part_of
from ..common.ragged import RaggedBatch

Divisor = cute.FastDivmodDivisorV2
LANES = 32
ROUND_UP = 1 + 2.0 ** -16     # shares that are whole numbers stay so; all together they gain less than one cluster
LEAST_TILES = 4        # per CTA of an item that several clusters share: their merge costs as much as two or three tiles


@dataclass(frozen=True)
class RaggedGrid:
    """How the work of a launch is dealt out.

    num_slots, most_slots   clusters that run at once, and as many as shares are made of at most
    share_of_tile   of a cluster, at most: so that parts do not become too short; 0: there are no shares
    least_clusters, most_clusters   of an item
    most_tiles      that an item's rows can see
    split_tiles     K/V tiles of a cluster if it is not 0; then shares do not count
    rows            of the scratch; an item of more rows is not split
    """
    num_slots: Int32
    most_slots: Int32
    share_of_tile: Float32
    least_clusters: Int32
    most_clusters: Int32
    most_tiles: Int32
    split_tiles: Int32
    rows: Int32

    @staticmethod
    def create(a) -> "RaggedGrid":
        """From a kernel's arguments."""
        share = Float32(a.has_shares) / Float32(LEAST_TILES * a.cluster_size)
        return RaggedGrid(a.num_slots, a.most_slots, share, a.least_clusters, a.most_clusters, a.most_tiles,
                          a.split_tiles, a.partial_rows)

    @cute.jit
    def part(self, tiles: BlockRange, split: Int32, num_splits: Int32) -> BlockRange:
        """The K/V tiles of one of num_splits CTAs."""
        num_blocks = maximum(tiles.n_block_max - tiles.n_block_min, 0)
        each = num_blocks
        if num_splits > 1:
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
    packed_heads: Divisor
    num_groups: Int32

    @cute.jit
    def sequence(self, number: Int32) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32]:
        """offset_q, seqlen_q, offset_k, seqlen_k of a sequence, its items, and the K/V tiles that one of them sees."""
        place = self.batch.place(number)
        num_m_blocks = ceil_div(place[1] * self.packed_heads.divisor, self.cfg.tile_m)
        tiles = minimum(ceil_div(place[3], self.cfg.tile_n), self.grid.most_tiles)
        return (*place, num_m_blocks * self.num_groups, tiles)

    @cute.jit
    def clusters(self, seqlen_q: Int32, tiles: Int32, share: Float32) -> Int32:
        """How many work on each item of a sequence; share: of a tile."""
        count = Int32(Float32(tiles) * share)
        if self.grid.split_tiles > 0:
            count = ceil_div(tiles, self.grid.split_tiles)
        count = maximum(minimum(count, self.grid.most_clusters), self.grid.least_clusters)
        if seqlen_q * self.packed_heads.divisor > self.grid.rows:
            count = Int32(1)
        return count

    @cute.jit
    def find(self, index: Int32) -> Place:
        """The place of cluster `index`: among the items of several clusters, then among the others."""
        lane, size = cute.arch.lane_idx(), self.batch.batch_size
        ones = self.sequence(lane)
        num_items, total = all_sum(ones[4]), all_sum(ones[4] * ones[5])
        for first in cutlass.range(LANES, size, LANES, unroll=1):
            more = self.sequence(first + lane)
            num_items, total = num_items + all_sum(more[4]), total + all_sum(more[4] * more[5])
        slots = maximum(self.grid.num_slots, minimum(num_items, self.grid.most_slots))
        share = Float32(slots) * cute.arch.rcp_approx(Float32(total)) * ROUND_UP
        share = minimum(share, self.grid.share_of_tile)
        each = self.clusters(ones[1], ones[5], share)
        num_split = all_sum(ones[4] * each if each > 1 else Int32(0))
        for first in cutlass.range(LANES, size, LANES, unroll=1):
            more = self.sequence(first + lane)
            each_more = self.clusters(more[1], more[5], share)
            num_split += all_sum(more[4] * each_more if each_more > 1 else Int32(0))

        found = tuple(Int32(0) for _ in range(10))
        before_split, before_others = Int32(0), num_split
        for first in cutlass.range(0, size, LANES, unroll=1):
            if first > 0:
                ones = self.sequence(first + lane)
                each = self.clusters(ones[1], ones[5], share)
            count = ones[4] * each
            of_split = count if each > 1 else Int32(0)
            through_split, through_others = inclusive_sums(of_split, count - of_split)
            through_split, through_others = before_split + through_split, before_others + through_others
            before, through = before_others, through_others
            if index < num_split:
                before, through = before_split, through_split
            owner = cute.arch.popc(cute.arch.vote_ballot_sync(through <= index))
            if index >= before and owner < LANES:
                found = self.part_of_sequence(index, first, owner, ones, each, through)
            before_split = cute.arch.shuffle_sync(through_split, LANES - 1)
            before_others = cute.arch.shuffle_sync(through_others, LANES - 1)
        return Place(*found)

    @cute.jit
    def part_of_sequence(self, index: Int32, first: Int32, owner: Int32, ones: tuple, each: Int32, through: Int32):
        """The fields of the place that lies with the sequence of lane `owner`."""
        of_owner = lambda value: cute.arch.shuffle_sync(value, owner)
        offset_q, seqlen_q, offset_k, seqlen_k = (of_owner(value) for value in ones[:4])
        num_items, num_clusters = of_owner(ones[4]), of_owner(each)
        within = index - (of_owner(through) - num_items * num_clusters)
        item, cluster = within, Int32(0)
        if num_clusters > 1:
            item = within // num_clusters
            cluster = within - item * num_clusters
        group, m_block = item, Int32(0)
        if num_items > self.num_groups:
            m_blocks = ceil_div(seqlen_q * self.packed_heads.divisor, self.cfg.tile_m)
            group = item // m_blocks
            m_block = item - group * m_blocks
        return (first + owner, group, m_block, cluster, num_clusters, index - cluster, offset_q, seqlen_q, offset_k,
                seqlen_k)


def all_sum(value: Int32) -> Int32:
    """Of a warp."""
    return cute.arch.warp_redux_sync(value, "add")


@cute.jit
def inclusive_sums(a: Int32, b: Int32) -> tuple[Int32, Int32]:
    """The sums of the values of this lane and those below it."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(5):
        below_a, below_b = cute.arch.shuffle_sync_up(a, 1 << i), cute.arch.shuffle_sync_up(b, 1 << i)
        a, b = a + (below_a if lane >= 1 << i else 0), b + (below_b if lane >= 1 << i else 0)
    return a, b
