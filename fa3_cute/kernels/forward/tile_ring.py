"""The tile ring: one warp finds the CTA's tiles, the other roles read them from shared memory.

Finding a tile takes integer divisions and, for packed sequences, a search; 384 threads need not repeat it, least of all
the consumers between two tiles. An entry is the fields of a Tile as int32, in their order.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from ..common.tiles import Tile

END = -1                                 # m_block of the entry after the last tile
TILE_INTS = len(Tile.__dataclass_fields__)
ENTRY_INTS = -(-TILE_INTS // 4) * 4      # whole 16-byte words


def end_tile() -> Tile:
    """No tile: the entry after the last one."""
    return Tile(Int32(END), *[Int32(0)] * (TILE_INTS - 1))


@dataclass
class TileWriter:
    """The schedule warp's place in the tile ring."""
    sTiles: cute.Tensor
    producer: pipeline.PipelineProducer

    def wait_for_room(self):
        """Until a slot is free for the next `publish`."""
        self.producer.acquire()

    @cute.jit
    def publish(self, tile: Tile):
        """Append a tile, the same on every lane of the warp; waits for a free slot."""
        slot = self.producer.acquire_and_advance()
        if cute.arch.lane_idx() == 0:
            entry = [getattr(tile, name) for name in Tile.__dataclass_fields__]
            for i in cutlass.range_constexpr(TILE_INTS):
                self.sTiles[i, slot.index] = entry[i]
        cute.arch.sync_warp()
        slot.commit()


@dataclass
class TileReader:
    """A role's place in the tile ring; `tile` is its current tile."""
    sTiles: cute.Tensor
    consumer: pipeline.PipelineConsumer
    tile: Tile

    @staticmethod
    def create(sTiles: cute.Tensor, ring: pipeline.PipelineAsync) -> "TileReader":
        """At the CTA's first tile. Every thread of the role calls this, and `advance`."""
        reader = TileReader(sTiles, ring.make_consumer(), Tile(*[Int32(0)] * TILE_INTS))
        reader.advance()
        return reader

    def has_tile(self):
        """Whether there is a current tile."""
        return self.tile.m_block != END

    def advance(self):
        """Wait for the next entry, copy it to registers and give the slot back."""
        slot = self.consumer.wait_and_advance()
        entry = cute.make_rmem_tensor(ENTRY_INTS, Int32)
        cute.autovec_copy(self.sTiles[None, slot.index], entry)
        self.tile = Tile(*(entry[i] for i in range(TILE_INTS)))
        slot.release()
