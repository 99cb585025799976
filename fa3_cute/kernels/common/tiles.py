"""The tile ring: one warp finds the CTA's tiles, the other roles read them from shared memory.

Finding a tile takes integer divisions and, for packed sequences, a search; 384 threads need not repeat it, least of all
the consumers between two tiles.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from ...planning.config import FwdConfig

END = -1   # m_block of the entry after the last tile


@dataclass(frozen=True)
class Tile:
    """One tile of O and where its sequence lies, in tokens. As a ring entry: these int32, in this order."""
    m_block: Int32
    head: Int32
    kv_head: Int32
    batch: Int32       # batch coordinate in the tensors; 0 if they are packed
    offset_q: Int32    # first row of the sequence in Q and O, 0 unless packed
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32
    sequence: Int32    # index of the sequence in the batch

    @staticmethod
    def end() -> "Tile":
        """No tile: the entry after the last one."""
        return Tile(Int32(END), *[Int32(0)] * (len(Tile.__dataclass_fields__) - 1))

    def entry(self) -> tuple[Int32, ...]:
        """The values in the order of a ring entry."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


TILE_INTS = len(Tile.__dataclass_fields__)
ENTRY_INTS = -(-TILE_INTS // 4) * 4     # whole 16-byte words


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
            entry = tile.entry()
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


def rows_from(cfg: FwdConfig, offset, mX: cute.Tensor) -> cute.Tensor:
    """A sequence's (row, head_dim) view: of packed tensors, from its first row on.

    TMA bounds the view by the tensor's end, not the sequence's: a last tile may bring rows of the next sequence.
    """
    return cute.domain_offset((offset, 0), mX) if cfg.is_varlen else mX
