"""A row of K and one of V that no tile has yet: consumers put them where they belong in a slot before they read it."""
from dataclasses import dataclass

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Int32

from ...planning.rings import WARP
from .barriers import sync_warpgroup
from .cache import Cache
from .copies import piece_size


@dataclass(frozen=True)
class NewRow:
    """What a thread has of it; lane i of the warp that `has_pieces` has the i-th piece of each.

    K, V          a piece of 16 bytes, in registers; anything in other threads
    sK, sV        the rings of slots
    cache         that the row belongs to, in row `within` of `entry`, or of the page of that number
    row           of the tile
    is_here       whether it belongs to the first tile that is consumed, in all threads alike
    has_pieces    whether the thread is of the warp that has them; none is, where the cache has no place for the row
    """
    K: cute.Tensor
    V: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    cache: Cache
    kv_head: Int32
    entry: Int32
    within: Int32
    row: Int32
    is_here: Boolean
    has_pieces: Boolean

    @cute.jit
    def put_key(self, consumer: pipeline.PipelineConsumer, tidx: Int32):
        """To the slot that is consumed next, which stays full. Runs on: one consumer warpgroup, which syncs."""
        if self.is_here:
            self.put(self.K, self.sK[None, None, consumer.wait().index], tidx)

    @cute.jit
    def put_value(self, consumer: pipeline.PipelineConsumer, tidx: Int32):
        """As put_key. Both are then written to the cache: behind the fences, which would wait for that."""
        if self.is_here:
            self.put(self.V, self.sV[None, None, consumer.wait().index], tidx)
            self.store(tidx)

    @cute.jit
    def put(self, piece: cute.Tensor, slot: cute.Tensor, tidx: Int32):
        """A piece to its place in a slot."""
        if self.has_pieces:
            copy_piece(piece, slot[self.row, None], tidx % WARP)
        cute.arch.fence_view_async_shared()
        sync_warpgroup(0)

    @cute.jit
    def store(self, tidx: Int32):
        """Both to the cache."""
        if self.has_pieces:
            copy_piece(self.K, self.cache.mK[self.within, None, self.kv_head, self.entry], tidx % WARP)
            copy_piece(self.V, self.cache.mV[self.within, None, self.kv_head, self.entry], tidx % WARP)


@cute.jit
def copy_piece(piece: cute.Tensor, row: cute.Tensor, index: Int32):
    """To a row that may have fewer pieces."""
    columns = piece_size(piece.element_type)
    if index * columns < cute.size(row):
        cute.autovec_copy(piece, cute.local_tile(row, (columns,), (index,)))
