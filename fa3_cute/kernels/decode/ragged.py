"""Splits of a ragged batch: from the lengths on the device, how many clusters work on each item, and which one is ours.

    tiles of an item            K/V tiles that its rows see, at most
    clusters of an item         its share of num_extras, tiles * num_extras / all tiles, rounded down. Few items:
                                besides one that it has anyway, and num_extras are what else runs at once. Many: one if
                                that is less than two, and num_extras are up to twice what runs at once

So pieces are at most about twice as long as the mean one, whether one sequence is a hundred times as long as the others
or all are alike; all alike and many, none is split, and all that are few run at once.

A part of the grid is a cluster for the first M tile of each sequence and group of heads: its place is a division, and
it needs the other lengths only if its own is long enough to be shared. The other part has, sequence by sequence, all
other clusters, found by running sums over 32 sequences at a time; the last of them may have nothing to do. Of many
items some of it comes first, for its pieces are the longest; else it comes last, so that idle ones do not take the
places of others. All this is the start of every CTA, before its first load of K.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.block_range import BlockRange, part_of
from ..common.ragged import RaggedBatch

Divisor = cute.FastDivmodDivisorV2
LANES = 32
ROUND_UP = 1 + 2.0 ** -16     # shares that are whole numbers stay so; all together they gain less than one cluster
LEAST_TILES = 8        # of each CTA of a cluster that comes to help: a merge of clusters costs as much as 2 or 3 tiles


@dataclass(frozen=True)
class RaggedGrid:
    """How the work of a launch is dealt out.

    num_extras      as above
    first_base      where in the grid the clusters of first M tiles begin
    has_base        1: those of first M tiles work also on what is shared; 0: they do not
    share_of_tile   of a cluster, at most: so that parts do not become too short; 0: there are no shares
    least_clusters, most_clusters   of an item
    most_tiles      that an item's rows can see
    split_tiles     K/V tiles of a cluster if it is not 0; then shares do not count
    rows            of the scratch; an item of more rows is not split
    """
    num_extras: Int32
    first_base: Int32
    has_base: Int32
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
        return RaggedGrid(a.num_extras, a.first_base, a.has_base, share, a.least_clusters, a.most_clusters,
                          a.most_tiles, a.split_tiles, a.partial_rows)

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
    first          where there are several, the place of the item's partial results
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
    """Finds the place of a cluster. A warp looks at one sequence per lane, or all lanes at the same one."""
    cfg: Constexpr
    batch: RaggedBatch
    grid: RaggedGrid
    packed_heads: Divisor
    num_groups: Divisor

    @cute.jit
    def sequence(self, number: Int32) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32]:
        """offset_q, seqlen_q, offset_k, seqlen_k of a sequence, its M tiles, and the K/V tiles that one sees."""
        place = self.batch.place(number)
        num_m_blocks = ceil_div(place[1] * self.packed_heads.divisor, self.cfg.tile_m)
        return (*place, num_m_blocks, minimum(ceil_div(place[3], self.cfg.tile_n), self.grid.most_tiles))

    @cute.jit
    def clusters(self, seqlen_q: Int32, tiles: Int32, share: Float32) -> Int32:
        """How many work on each item of a sequence; share: of a tile."""
        count = Int32(Float32(tiles) * share) + self.grid.has_base
        if self.grid.split_tiles > 0:
            count = ceil_div(tiles, self.grid.split_tiles)
        count = maximum(minimum(count, self.grid.most_clusters), self.grid.least_clusters)
        if minimum(seqlen_q * self.packed_heads.divisor, self.cfg.tile_m) > self.grid.rows:
            count = Int32(1)
        return count

    def has_base(self, each: Int32) -> Int32:
        """1 if a cluster of a first M tile has a part of it that is worked on by so many, else 0."""
        return maximum(self.grid.has_base, maximum(2 - each, 0))

    @cute.jit
    def find(self, index: Int32) -> Place:
        """The place of cluster `index`."""
        size, num_groups = self.batch.batch_size, self.num_groups.divisor
        base = index - self.grid.first_base
        is_further = base < 0 or base >= size * num_groups
        sequence, group = divmod(maximum(base, 0), self.num_groups)
        own = self.sequence(sequence)
        num_clusters, m_block, cluster, first = minimum(own[4], 1), Int32(0), Int32(0), Int32(0)
        if is_further or self.clusters(own[1], own[5], self.grid.share_of_tile) > 1:
            ones = self.sequence(cute.arch.lane_idx())
            share = self.share(ones)
            if is_further:
                further = index if base < 0 else index - size * num_groups
                sequence, group, m_block, cluster = self.further(further, ones, share)
                own = self.sequence(sequence)
            each = self.clusters(own[1], own[5], share)
            num_clusters = minimum(own[4], 1) * each
            if not is_further and self.has_base(each) == 0:
                num_clusters = Int32(0)
            if num_clusters > 1:
                first = self.partials_before(sequence, ones, share) + (m_block * num_groups + group) * num_clusters
        return Place(sequence, group, m_block, cluster, num_clusters, first, *own[:4])

    @cute.jit
    def share(self, ones: tuple) -> Float32:
        """Of a tile; ones are the first 32 sequences."""
        total = all_sum(ones[4] * ones[5])
        for start in cutlass.range(LANES, self.batch.batch_size, LANES, unroll=1):
            more = self.sequence(start + cute.arch.lane_idx())
            total += all_sum(more[4] * more[5])
        all_tiles = Float32(total) * Float32(self.num_groups.divisor)
        share = Float32(self.grid.num_extras) * cute.arch.rcp_approx(all_tiles) * ROUND_UP
        return minimum(share, self.grid.share_of_tile)

    @cute.jit
    def further(self, index: Int32, ones: tuple, share: Float32) -> tuple[Int32, Int32, Int32, Int32]:
        """(sequence, group, m_block, cluster) of one that is not that of a first M tile; a sequence past the last if
        there are not so many."""
        size, num_groups, lane = self.batch.batch_size, self.num_groups.divisor, cute.arch.lane_idx()
        sequence, group, m_block, cluster, before = size, Int32(0), Int32(0), Int32(0), Int32(0)
        for start in cutlass.range(0, size, LANES, unroll=1):
            if start > 0:
                ones = self.sequence(start + lane)
            each = self.clusters(ones[1], ones[5], share)
            per_group = maximum(ones[4] * each - self.has_base(each), 0)
            through = before + inclusive_sum(per_group * num_groups)
            owner = cute.arch.popc(cute.arch.vote_ballot_sync(through <= index))
            if index >= before and owner < LANES:
                of_owner = lambda value: cute.arch.shuffle_sync(value, owner)
                within = index - of_owner(through - per_group * num_groups)
                num_clusters = of_owner(each)
                sequence, per_group = start + owner, of_owner(per_group)
                group = within // per_group
                part = within - group * per_group + self.has_base(num_clusters)
                m_block = part // num_clusters
                cluster = part - m_block * num_clusters
            before = cute.arch.shuffle_sync(through, LANES - 1)
        return sequence, group, m_block, cluster

    @cute.jit
    def partials_before(self, sequence: Int32, ones: tuple, share: Float32) -> Int32:
        """Partial results of the sequences before this one."""
        lane, total = cute.arch.lane_idx(), Int32(0)
        for start in cutlass.range(0, sequence, LANES, unroll=1):
            if start > 0:
                ones = self.sequence(start + lane)
            each = self.clusters(ones[1], ones[5], share)
            total += all_sum(ones[4] * each if each > 1 and start + lane < sequence else Int32(0))
        return total * self.num_groups.divisor


def all_sum(value: Int32) -> Int32:
    """Of a warp."""
    return cute.arch.warp_redux_sync(value, "add")


@cute.jit
def inclusive_sum(value: Int32) -> Int32:
    """The sum of the values of this lane and those below it."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << i)
        value = value + (below if lane >= 1 << i else 0)
    return value
