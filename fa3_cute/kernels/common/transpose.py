"""V^T in shared memory: FP8 WGMMA takes operands whose K dimension is contiguous, and PV's K dimension is the keys.

A block is 32 keys x 16 columns of V. ldmatrix.trans moves 16-bit units, here pairs of columns; PRMT separates even from
odd columns, pairing up two keys; stmatrix writes rows of V^T. What comes out is ordered for its readers:

    keys      4 q + i of each 16 holds key 2 q + 8 (i / 2) + i % 2, which is how a thread holds P (layout.as_operand_a)
    columns   of each 16, the even ones, then the odd ones: stmatrix then writes 8 neighbouring rows, without bank
              conflicts (layout.as_quads puts O in order)
"""
import cutlass.cute as cute
from cutlass import Float8E4M3FN, Int32
from cutlass.experimental import primitives

from .layout import SwizzledRow

BLOCK_KEYS, BLOCK_COLUMNS = 32, 16
EVEN_BYTES, ODD_BYTES = 0x6420, 0x7531       # of two registers: what PRMT selects


def rows_of_lane(slot_V: cute.Tensor, slot_Vt: cute.Tensor, lane: Int32, first_key: Int32 | int = 0,
                 first_column: Int32 | int = 0) -> tuple[SwizzledRow, SwizzledRow]:
    """What a lane addresses in V (tile_n, head_dim) and in V^T (head_dim, tile_n), from one key and column on."""
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
