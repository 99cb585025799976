"""Which rows a CTA's number in the order of a launch (order.py) stands for."""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import GradientFields
from ..common.order import block_and_head
from ..common.sequences import Sequences
from .blocks import Blocks, KeyTile


@dataclass(frozen=True)
class Place:
    """A block of rows of one side of a sequence, which may all lie behind its last; fields as in KeyTile."""
    block: Int32
    head: Int32
    batch: Int32
    offset_q: Int32
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32
    sequence: Int32

    def keys(self, q_blocks: Blocks) -> KeyTile:
        """The block, if it is of keys."""
        return KeyTile(self.block, self.head, self.batch, self.offset_q, self.seqlen_q, self.offset_k, self.seqlen_k,
                       q_blocks.first(self.sequence), self.sequence)


@cute.jit
def find_place(cfg: GradientFields, sequences: Sequences, blocks: Blocks, num_heads: Int32,
               section: Int32, index: Int32, in_sections: Constexpr[bool], is_reversed: Constexpr[bool]) -> Place:
    """At a place of the order. Runs on: whole warps.

    num_heads     of the side that `blocks` are of
    section       heads whose blocks run side by side, if in_sections and lengths are not on the device
    is_reversed   the last blocks come first
    """
    seqlen_q, seqlen_k, offset_q, offset_k = sequences.rows_q, sequences.rows_k, Int32(0), Int32(0)
    if const_expr(cfg.is_varlen):
        block, head, sequence = blocks.locate(index, num_heads, is_reversed)
        offset_q, seqlen_q, offset_k, seqlen_k = sequences.place(sequence)
        batch = sequences.batch_coordinate(sequence)
    else:
        all_heads = num_heads * sequences.batch_size
        num_blocks = blocks.num_blocks // sequences.batch_size
        block, any_head = block_and_head(in_sections, is_reversed, index, num_blocks, all_heads, section)
        sequence = any_head // num_heads
        batch, head = sequence, any_head - sequence * num_heads
    return Place(block, head, batch, offset_q, seqlen_q, offset_k, seqlen_k, sequence)
