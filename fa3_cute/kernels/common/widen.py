"""K and V in FP8 for queries of 16 bit: each tile becomes 16 bit in shared memory, on its way from its ring to WGMMA.

E4M3 numbers are FP16 and BF16 numbers, NaN too: nothing is rounded. The tiles of 16 bit are one of K and one of V; the
rings, which hold what is under way, stay FP8.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float8E4M3FN, Int32

from ...planning.config import KernelConfig
from ...planning.rings import WARP, WARPS_PER_WARPGROUP
from .barriers import sync_warpgroup
from .copies import PIECE_BYTES
from .layout import SwizzledRow, element_type


@dataclass(frozen=True)
class Widening:
    """K and V as they are stored, (tile_n, columns, slot), and a tile of each for WGMMA, (tile_n, columns, 1)."""
    cfg: Constexpr
    stored_K: cute.Tensor
    stored_V: cute.Tensor
    wide_K: cute.Tensor
    wide_V: cute.Tensor

    def widen_K(self, slot: Int32):
        """A K slot, for the next QK."""
        widen(self.cfg, self.stored_K[None, None, slot], self.wide_K[None, None, 0])

    def widen_V(self, slot: Int32):
        """A V slot, for the next PV."""
        widen(self.cfg, self.stored_V[None, None, slot], self.wide_V[None, None, 0])


@cute.jit
def widen(cfg: KernelConfig, stored: cute.Tensor, wide: cute.Tensor):
    """An FP8 tile -> a tile of cfg.dtype, both (tile_n, columns), over the one that WGMMA has read.

    A lane has a row of each 32, and of it the warp's pieces: 8 lanes then read, and write, 8 different groups of banks.
    Runs on: the consumer warpgroup. Synchronises: its four warps, twice.
    """
    tidx = cute.arch.thread_idx()[0]
    warp, lane = tidx // WARP, tidx % WARP
    source = SwizzledRow.create(stored, lane, warp * PIECE_BYTES)
    target = SwizzledRow.create(wide, lane, warp * 2 * PIECE_BYTES)
    places = [(row, piece) for row in range(0, cfg.tile_n, WARP)
              for piece in range(0, cute.size(stored, mode=[1]), WARPS_PER_WARPGROUP * PIECE_BYTES)]
    read = [cute.make_rmem_tensor(PIECE_BYTES, Float8E4M3FN) for _ in places]
    for i in cutlass.range_constexpr(len(places)):
        row, piece = places[i]
        pointer = source.pointer(Float8E4M3FN, piece, row)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(PIECE_BYTES)), read[i])
    sync_warpgroup(0)
    for i in cutlass.range_constexpr(len(places)):
        row, piece = places[i]
        converted = cute.make_rmem_tensor(PIECE_BYTES, element_type(cfg))
        converted.store(read[i].load().to(element_type(cfg)))
        for half in cutlass.range_constexpr(2):
            pointer = target.pointer(element_type(cfg), 2 * piece + half * PIECE_BYTES, row)
            part = cute.make_tensor(converted.iterator + half * 8, cute.make_layout(8))
            cute.autovec_copy(part, cute.make_tensor(pointer, cute.make_layout(8)))
    cute.arch.fence_view_async_shared()
    sync_warpgroup(0)
