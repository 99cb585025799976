"""Launches of few sequences: every lane of the schedule role's warp knows one, and with it how many places it has in an
order that leaves out what is not there, the longest sequences first.

Places of Blocks are as many as there may be, whatever the lengths on the device are: of 256, 512 and 128 keys in tiles
of 128 ten of a head, of which seven are there. A CTA that draws one of the others draws again, for a microsecond of
twenty. And it is the longest tiles that others wait for in the end. So where all tiles of a launch are under way at
once, the order may be any: tiles of the most queries first, one head after the other, then all duties likewise.
"""
from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div, maximum
from .blocks import Blocks, whole_times
from .bundles import BwdParams


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
        """As Blocks.locate; of the list, one head after the other of each block. Runs on: whole warps."""
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
    is_listed = (batch_size <= WARP) & (num_behind == num_blocks * params.num_heads_k)
    if is_listed:
        lane, num_blocks = cute.arch.lane_idx(), Int32(0)
        if lane < batch_size:
            own = maximum(ceil_div(seqlen_k, cfg.tile_n), 1)     # one at least, which has the duty
        for i in cutlass.range(batch_size, unroll=1):
            queries, theirs = cute.arch.shuffle_sync(seqlen_q, i), cute.arch.shuffle_sync(own, i)
            num_blocks += theirs
            if (queries > seqlen_q) | ((queries == seqlen_q) & (i < lane)):
                before += theirs
        num_behind = num_blocks * params.num_heads_k
    listed = ListedBlocks(blocks.block_rows, blocks.cu_seqlens, blocks.rows, blocks.batch_size, num_blocks, is_listed,
                          before, own)
    return replace(params, k_blocks=listed, num_behind=num_behind)
