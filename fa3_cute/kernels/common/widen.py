"""K and V in FP8 for queries of 16 bit: tiles become 16 bit on their way from ring to ring.

E4M3 numbers are FP16 and BF16 numbers, NaN too: nothing is rounded. What is under way from memory stays FP8.
"""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float8E4M3FN, Int32

from ...planning.config import KernelConfig
from ...planning.rings import WARP
from ...planning.stored_keys import NUM_WIDEN_WARPS
from .copies import PIECE_BYTES
from .layout import SwizzledRow


class WideRing(pipeline.PipelineAsync):
    """Ring that the widening warps fill, for consumers that know PipelineTmaAsync's: one lane of a warp gives a slot
    back, as there."""

    @staticmethod
    def create(**facts) -> "WideRing":
        """Of PipelineAsync.create's arguments."""
        ring = pipeline.PipelineAsync.create(**facts)
        return WideRing(ring.sync_object_full, ring.sync_object_empty, ring.num_stages, ring.producer_mask,
                        ring.consumer_mask)

    def consumer_release(self, state, *, loc=None, ip=None) -> None:
        """One arrival per warp."""
        with cute.arch.elect_one(loc=loc, ip=ip):
            super().consumer_release(state, loc=loc, ip=ip)


@cute.jit
def widen(cfg: KernelConfig, stored: cute.Tensor, wide: cute.Tensor, thread: Int32):
    """A warp's share of a tile, (tile_n, columns), from FP8 to the element type of `wide`.

    A lane has a row of each 32, and of it the warp's pieces: 8 lanes then read, and write, 8 different groups of banks.
    Runs on: the warps that widen K or V, each by itself.
    """
    lane, first_byte = thread % WARP, thread // WARP * PIECE_BYTES
    source, target = SwizzledRow.create(stored, lane, first_byte), SwizzledRow.create(wide, lane, 2 * first_byte)
    places = [(row, byte) for row in range(0, cfg.tile_n, WARP)
              for byte in range(0, cute.size(stored, mode=[1]), NUM_WIDEN_WARPS * PIECE_BYTES)]
    read = [cute.make_rmem_tensor(PIECE_BYTES, Float8E4M3FN) for _ in places]
    for i in cutlass.range_constexpr(len(places)):
        row, byte = places[i]
        pointer = source.pointer(Float8E4M3FN, byte, row)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(PIECE_BYTES)), read[i])
    for i in cutlass.range_constexpr(len(places)):
        row, byte = places[i]
        converted = cute.make_rmem_tensor(PIECE_BYTES, wide.element_type)
        converted.store(read[i].load().to(wide.element_type))
        halves = cute.make_layout(PIECE_BYTES // 2)
        for half in cutlass.range_constexpr(2):
            pointer = target.pointer(wide.element_type, 2 * byte + half * PIECE_BYTES, row)
            part = cute.make_tensor(converted.iterator + half * PIECE_BYTES // 2, halves)
            cute.autovec_copy(part, cute.make_tensor(pointer, halves))
