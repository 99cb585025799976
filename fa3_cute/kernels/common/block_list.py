"""Block lists: the K/V tiles that a Q tile visits, where lists in memory say so and no range (contract/block_mask.py).

Partial blocks come first, which carry masks, then the full ones, which carry none. Load warp, transpose warps and
consumers walk the same list; numbers of blocks are read a block ahead, and kept within the sequence.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Int32, Int64

from ...contract.arguments import BLOCK_ARGUMENTS
from ...planning.config import FwdConfig
from .arithmetic import ceil_div, maximum, minimum
from .block_range import first_key
from .keys_values import KeyValueSource
from .tiles import Tile


@dataclass(frozen=True)
class BlockLists:
    """Of a call: BLOCK_ARGUMENTS, of which the first four are addresses; strides are in rows of the lists."""
    partial_count: Int64
    partial_index: Int64
    full_count: Int64
    full_index: Int64
    batch_stride: Int64
    head_stride: Int64
    row_length: Int64
    tiles_per_row: Int64

    @staticmethod
    def create(a) -> "BlockLists":
        """From a kernel's arguments, on the host."""
        return BlockLists(*(getattr(a, name) for name, _ in BLOCK_ARGUMENTS))

    @cute.jit
    def of(self, cfg: Constexpr[FwdConfig], tile: Tile) -> "BlockList":
        """The list of a Q tile; the same on every lane."""
        row = (Int64(tile.sequence) * self.batch_stride + Int64(tile.head) * self.head_stride
               + Int64(tile.m_block // Int32(self.tiles_per_row)))
        most = Int32(self.row_length)
        num_partial, num_full = (cute.arch.make_warp_uniform(minimum(maximum(int_at(counts + 4 * row), 0), most))
                                 for counts in (self.partial_count, self.full_count))
        start = row * self.row_length * 4
        last = ceil_div(tile.seqlen_k, cfg.tile_n) - 1
        return BlockList(num_partial, num_partial + num_full, self.partial_index + start,
                         self.full_index + start - 4 * Int64(num_partial), last)


@dataclass(frozen=True)
class BlockList:
    """Of a Q tile.

    num_partial, num_blocks   partial blocks, and all
    partial, full   addresses of the number of block 0, if block 0 were a partial one or a full one
    last            the sequence's last block
    """
    num_partial: Int32
    num_blocks: Int32
    partial: Int64
    full: Int64
    last: Int32

    def block(self, i: Int32) -> Int32:
        """Number of the i-th block that is visited; behind the last one that of the last, and of none anything."""
        i = maximum(minimum(i, self.num_blocks - 1), 0)
        start = cutlass.select_(i < self.num_partial, self.partial, self.full)
        return maximum(minimum(int_at(start + 4 * Int64(i)), self.last), 0)


def int_at(address: Int64) -> Int32:
    """An int32 in global memory."""
    ptr = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(ptr, cute.make_layout(1))[0]


@cute.jit
def load_listed(cfg: FwdConfig, k: KeyValueSource, v: KeyValueSource, blocks: BlockList, first: Int32,
                k_producer: pipeline.PipelineProducer, v_producer: pipeline.PipelineProducer):
    """After K of block `first` the pairs (K[i], V[i - 1]), then V of the last (`keys_values.load_after_first`). Returns
    the producers that it advanced."""
    n_block, following = first, blocks.block(Int32(1))
    for i in cutlass.range(1, blocks.num_blocks, unroll=1):
        k.copy(k_producer.acquire_and_advance(), first_key(cfg, following), ())
        v.copy(v_producer.acquire_and_advance(), first_key(cfg, n_block), ())
        n_block, following = following, blocks.block(i + 1)
    v.copy(v_producer.acquire_and_advance(), first_key(cfg, n_block), ())
    return k_producer, v_producer
