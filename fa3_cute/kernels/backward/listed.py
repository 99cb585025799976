"""Launches of few tiles of keys, and lists of the sequences of some: every lane of the schedule role's warp knows one
sequence, and with it how many places it has in an order that leaves out what is not there, the longest first.

Places of Blocks are as many as there may be, whatever the lengths on the device are: of 256, 512 and 128 keys in tiles
of 128 ten of a head, of which seven are there. A CTA that draws one of the others draws again, for a microsecond of
twenty. And it is the longest tiles that others wait for in the end. So where sums of all units have room at once, the
order is that of the sequences with the most queries first, block by block, of each block one head after the other; then
all duties likewise. Blocks of a sequence and head stay in their order, in which they add if deterministic.
"""
from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP
from ...planning.sections import CTAS
from ..common.arithmetic import ceil_div, maximum, minimum
from .blocks import Blocks, whole_times
from .bundles import BwdParams
from .duties import num_tiles_of


# Places of tiles of keys for each CTA, in the mean, up to which they are few. A CTA then takes its next place late
# (load.py): before there were lists, one that was done with 128 keys took a tile of 512 that another CTA still looked
# for, of the sequences of 256, 512 and 128 at 16 heads, in 1.15 times the time (head_dim 64, BF16, H200, 2026-12-01).
# Of many tiles of few queries the next one would come too late: 10000 sequences of 1 to 40 take 1.17 to 1.27 times as
# long. Of more tiles a list would have all heads side by side, whose queries L2 has no room for.
FEW_TILES = 2


def are_few(params: BwdParams) -> Boolean:
    """The launch's tiles."""
    return num_tiles_of(params) <= FEW_TILES * CTAS


@dataclass(frozen=True)
class ListedBlocks(Blocks):
    """Blocks of keys, of which the schedule role's warp has a list, if is_listed; num_blocks is of the list then.

    before   blocks of sequences that come before the lane's, which is the sequence of its number
    own      and the lane's
    """
    is_listed: Boolean
    before: Int32
    own: Int32

    @cute.jit
    def locate(self, index: Int32, num_heads: Int32, is_reversed: Constexpr[bool]) -> tuple[Int32, Int32, Int32]:
        """As Blocks.locate; of the list, one head after the other of each block, and never is_reversed.

        Runs on: whole warps.
        """
        block, head, sequence = Int32(0), Int32(0), Int32(0)
        if self.is_listed:
            row = whole_times(index, num_heads)
            head = index - row * num_heads
            is_here = Int32(1) if (self.before <= row) & (row < self.before + self.own) else Int32(0)
            lanes = cute.arch.vote_ballot_sync(is_here != 0)
            sequence = cute.arch.popc((lanes & -lanes) - 1)
            block = row - cute.arch.shuffle_sync(self.before, sequence)
        else:
            block, head, sequence = Blocks.locate(self, index, num_heads, is_reversed)
        return block, head, sequence


@cute.jit
def lengths_of_lane(params: BwdParams) -> tuple[Int32, Int32]:
    """(seqlen_q, seqlen_k) of the sequence of the lane's number; 0 past the last."""
    _, seqlen_q, _, seqlen_k = params.sequences.place(cute.arch.lane_idx())
    return seqlen_q, seqlen_k


@cute.jit
def in_listed_order(cfg: BackwardConfig, params: BwdParams, lengths: tuple[Int32, Int32]) -> BwdParams:
    """params of the same launch with places of the list, if it is one of those that have one. lengths: of the lane.

    Runs on: whole warps.
    """
    blocks, num_behind, num_blocks = params.k_blocks, params.num_behind, params.k_blocks.num_blocks
    (seqlen_q, seqlen_k), batch_size = lengths, params.sequences.batch_size
    before, own = Int32(0), Int32(0)
    is_listed = are_few(params) & (batch_size <= WARP) & (num_behind == num_tiles_of(params))
    if is_listed:
        lane, num_blocks = cute.arch.lane_idx(), Int32(0)
        if lane < batch_size:
            own = maximum(ceil_div(seqlen_k, cfg.tile_n), 1)     # one at least, which has the duty
        for i in cutlass.range(batch_size, unroll=1):
            queries, theirs = cute.arch.shuffle_sync(seqlen_q, i), cute.arch.shuffle_sync(own, i)
            num_blocks += theirs
            if (queries > seqlen_q) | ((queries == seqlen_q) & (i < lane)):
                before += theirs
        num_blocks = minimum(num_blocks, blocks.num_blocks)      # which lengths that are not valid may exceed
        num_behind = num_blocks * params.num_heads_k
    listed = ListedBlocks(blocks.block_rows, blocks.cu_seqlens, blocks.rows, blocks.batch_size, num_blocks, is_listed,
                          before, own)
    return replace(params, k_blocks=listed, num_behind=num_behind)
