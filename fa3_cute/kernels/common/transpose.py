"""V^T in shared memory: FP8 WGMMA takes operands whose K dimension is contiguous, and PV's K dimension is the keys.

A block is 32 keys x 16 columns of V. ldmatrix.trans moves 16-bit units, here pairs of columns; PRMT separates even from
odd columns, pairing up two keys; stmatrix writes rows of V^T. What comes out is ordered for its readers:

    keys      4 q + i of each 16 holds key 2 q + 8 (i / 2) + i % 2, which is how a thread holds P (layout.as_operand_a)
    columns   of each 16, the even ones, then the odd ones: stmatrix then writes 8 neighbouring rows, without bank
              conflicts (layout.as_quads puts O in order)
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float8E4M3FN, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.config import KernelConfig
from .barriers import sync_warpgroup
from .layout import SwizzledRow

BLOCK_KEYS, BLOCK_COLUMNS = 32, 16
EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531       # of two registers: what PRMT selects


def rows_of_lane(slot_V: cute.Tensor, slot_Vt: cute.Tensor, lane: Int32, first_key: Int32 | int = 0,
                 first_column: Int32 | int = 0) -> tuple[SwizzledRow, SwizzledRow]:
    """What a lane addresses in V (tile_n, dim_v) and in V^T (dim_v, tile_n), from one key and column on."""
    return (SwizzledRow.create(slot_V, first_key + lane, first_column),
            SwizzledRow.create(slot_Vt, first_column + lane % 16, first_key ^ (lane // 16 * 16)))


def read_block(V: SwizzledRow, key: int, column: int) -> list[Int32]:
    """A block's registers, in the order in which write_block takes them."""
    x = primitives.ldmatrix(V.pointer(Float8E4M3FN, column, key).llvm_ptr, 4, primitives.MMALayout.COL)
    pick = lambda first, second, which: primitives.prmt(x[first], which, primitives.PermuteMode.DEFAULT, hi=x[second])
    return [pick(0, 1, EVEN_BYTES), pick(0, 1, ODD_BYTES), pick(2, 3, EVEN_BYTES), pick(2, 3, ODD_BYTES)]


def write_block(Vt: SwizzledRow, key: int, column: int, registers: list[Int32]) -> None:
    """What read_block has read, to its place in V^T."""
    primitives.stmatrix(Vt.pointer(Float8E4M3FN, key, column).llvm_ptr, registers, primitives.MMALayout.ROW)


@dataclass(frozen=True)
class Share:
    """What a warp transposes of a tile: columns of blocks, taken in turn, if they can be shared out, else some keys.

    places   (key, column) of its blocks, counted from first_key and first_column
    """
    first_key: Int32 | int
    first_column: Int32 | int
    places: list[tuple[int, int]]

    @staticmethod
    def of(cfg: KernelConfig, thread: Int32, num_warps: int) -> "Share":
        """Of the warp of thread `thread` among so many."""
        keys, first_key, first_column, column_step = cfg.tile_n, 0, 0, BLOCK_COLUMNS
        if cfg.dim_v % (num_warps * BLOCK_COLUMNS) == 0:
            column_step = num_warps * BLOCK_COLUMNS      # no bit of which is in first_column, as SwizzledRow wants
            first_column = thread // 32 * BLOCK_COLUMNS
        else:
            keys //= num_warps
            first_key = thread // 32 * keys
        return Share(first_key, first_column, [(key, column) for key in range(0, keys, BLOCK_KEYS)
                                               for column in range(0, cfg.dim_v, column_step)])


@cute.jit
def transpose_in_place(cfg: KernelConfig, slot_V: cute.Tensor, slot_Vt: cute.Tensor, tidx: Int32):
    """A V slot becomes a V^T slot: every warp reads its share before any writes.

    Runs on: the consumer warpgroup. Synchronises: its four warps, twice.
    """
    share = Share.of(cfg, tidx, num_warps=4)
    V, Vt = rows_of_lane(slot_V, slot_Vt, tidx % 32, share.first_key, share.first_column)
    blocks = [read_block(V, key, column) for key, column in share.places]
    sync_warpgroup(0)
    for i in cutlass.range_constexpr(len(share.places)):
        write_block(Vt, *share.places[i], blocks[i])
    cute.arch.fence_view_async_shared()
    sync_warpgroup(0)


@cute.jit
def clear_share(cfg: KernelConfig, slot_V: cute.Tensor, num_used: Int32, thread: Int32, num_warps: Constexpr[int],
                is_before: Constexpr[bool] = False):
    """Zero the rows of a warp's share of a V tile from num_used on (copies.clear_unused_rows says why), or before it.

    Each lane zeroes what it addresses for ldmatrix: no warp waits for another.
    """
    share = Share.of(cfg, thread, num_warps)
    V, _ = rows_of_lane(slot_V, slot_V, thread % 32, share.first_key, share.first_column)
    zeros = cute.make_rmem_tensor(4, Int32)
    zeros.fill(0)
    for i in cutlass.range_constexpr(len(share.places)):
        key, column = share.places[i]
        row = share.first_key + key + thread % 32
        if (row < num_used) if const_expr(is_before) else (row >= num_used):
            cute.autovec_copy(zeros, cute.make_tensor(V.pointer(Int32, column, key), cute.make_layout(4)))
    cute.arch.sync_warp()
