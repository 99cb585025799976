"""The tile ring: one warp finds the CTA's tiles, the other roles read them from shared memory.

Finding a tile takes integer divisions and, for packed sequences, a search; 384 threads need not repeat it, least of all
the consumers between two tiles.
"""
from dataclasses import dataclass

import cutlass.cute as cute
import cutlass.pipeline as pipeline

from ..common.tile_ring import END, end_of, read_tile, write_tile
from ..common.tiles import Tile


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
        write_tile(self.sTiles[None, slot.index], tile)
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
        reader = TileReader(sTiles, ring.make_consumer(), end_of(Tile))
        reader.advance()
        return reader

    def has_tile(self):
        """Whether there is a current tile."""
        return self.tile.m_block != END

    def advance(self):
        """Wait for the next entry, copy it to registers and give the slot back."""
        slot = self.consumer.wait_and_advance()
        self.tile = read_tile(self.sTiles[None, slot.index], Tile)
        slot.release()
