"""A row of K and one of V that no tile has yet: consumers put them where they belong in a slot before they read it."""
from dataclasses import dataclass

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Int32

from ...planning.rings import WARP
from .barriers import sync_warpgroup
from .copies import piece_size


@dataclass(frozen=True)
class NewRow:
    """What a thread has of it; lane i of the warp that `has_pieces` has the i-th piece of each.

    K, V         a piece of 16 bytes, in registers; anything in other threads
    sK, sV       the rings of slots
    row          of the tile
    is_here      whether it belongs to the first tile that is consumed, in all threads alike
    has_pieces   whether the thread is of the warp that has them; none is, where the row has no place in the cache
    """
    K: cute.Tensor
    V: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    row: Int32
    is_here: Boolean
    has_pieces: Boolean

    @cute.jit
    def put(self, piece: cute.Tensor, ring: cute.Tensor, consumer: pipeline.PipelineConsumer, tidx: Int32):
        """K or V, to the slot that is consumed next, which stays full. Runs on: one consumer warpgroup, which syncs."""
        if self.is_here:
            slot = consumer.wait()
            columns, lane = piece_size(piece.element_type), tidx % WARP
            if self.has_pieces and lane * columns < cute.size(ring, mode=[1]):
                row = ring[self.row, None, slot.index]
                cute.autovec_copy(piece, cute.local_tile(row, (columns,), (lane,)))
            cute.arch.fence_view_async_shared()
            sync_warpgroup(0)
