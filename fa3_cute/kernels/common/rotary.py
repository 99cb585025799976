"""Rotary positions: pairs of a row's numbers are turned by the angles of a position, in FP32.

A thread turns a piece of 16 bytes. The other half of a pair that is not in it it reads as well, and waits for no other
thread.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from .copies import PIECE_BYTES, piece_size
from .layout import ELEMENT_TYPES


@dataclass(frozen=True)
class Rotary:
    """mCos, mSin (positions, rotary_dim / 2); query_step: positions from a query to the next, 0 or 1."""
    mCos: cute.Tensor
    mSin: cute.Tensor
    rotary_dim: Int32
    query_step: Int32

    @staticmethod
    def create(a, table_dtype: str) -> "Rotary":
        """From the kernel's arguments, on the host."""
        element = ELEMENT_TYPES[table_dtype]
        stride = cute.assume(a.rotary_row_stride, divby=8 * PIECE_BYTES // element.width)
        layout = cute.make_layout((a.rotary_positions, a.rotary_dim // 2), stride=(stride, 1))
        mCos, mSin = (cute.make_tensor(cute.recast_ptr(pointer, dtype=element), layout)
                      for pointer in (a.rotary_cos, a.rotary_sin))
        return Rotary(mCos, mSin, a.rotary_dim, a.query_step)


@cute.jit
def turn_piece(pairs: Constexpr[str], source: cute.Tensor, own: cute.Tensor, turned: cute.Tensor, rotary: Rotary,
               position: Int32, piece: Int32):
    """A piece of a row below rotary_dim, turned; own: its numbers, as they are. pairs: "halves" or "neighbours"."""
    if const_expr(pairs == "halves"):
        turn_halves(source, own, turned, rotary, position, piece)
    else:
        turn_neighbours(own, turned, rotary, position, piece)


@cute.jit
def turn_halves(source: cute.Tensor, own: cute.Tensor, turned: cute.Tensor, rotary: Rotary, position: Int32,
                piece: Int32):
    """Pairs (i, i + rotary_dim / 2), of which the piece has one side."""
    columns: Constexpr[int] = piece_size(source.element_type)
    half = rotary.rotary_dim // (2 * columns)          # pieces
    is_second = piece >= half
    column = piece - half if is_second else piece
    other = cute.make_rmem_tensor(columns, source.element_type)
    partner = column if is_second else column + half
    cute.autovec_copy(cute.local_tile(source, (columns,), (partner,)), other)
    cos, sin = (angles(table, position, column, columns) for table in (rotary.mCos, rotary.mSin))
    sign = Float32(1.0) if is_second else Float32(-1.0)
    for i in cutlass.range_constexpr(columns):
        turned[i] = own[i].to(Float32) * cos[i] + sign * (other[i].to(Float32) * sin[i])


@cute.jit
def turn_neighbours(own: cute.Tensor, turned: cute.Tensor, rotary: Rotary, position: Int32, piece: Int32):
    """Pairs (2i, 2i + 1), all in the piece."""
    count: Constexpr[int] = cute.size(own) // 2
    cos, sin = (angles(table, position, piece, count) for table in (rotary.mCos, rotary.mSin))
    for i in cutlass.range_constexpr(count):
        a, b = own[2 * i].to(Float32), own[2 * i + 1].to(Float32)
        turned[2 * i] = a * cos[i] - b * sin[i]
        turned[2 * i + 1] = a * sin[i] + b * cos[i]


@cute.jit
def angles(table: cute.Tensor, position: Int32, index: Int32, count: Constexpr[int]) -> cute.Tensor:
    """Numbers index * count to (index + 1) * count - 1 of a row of a table, in FP32."""
    read = cute.make_rmem_tensor(count, table.element_type)
    cute.autovec_copy(cute.local_tile(table[position, None], (count,), (index,)), read)
    wide = cute.make_rmem_tensor(count, Float32)
    wide.store(read.load().to(Float32))
    return wide


@cute.jit
def read_turned(pairs: Constexpr[str], source: cute.Tensor, rotary: Rotary, position: Int32, piece: Int32
                ) -> cute.Tensor:
    """A piece of a row at a position, rounded to the row's type; behind rotary_dim, and without `pairs`, as it is."""
    columns: Constexpr[int] = piece_size(source.element_type)
    own = cute.make_rmem_tensor(columns, source.element_type)
    cute.autovec_copy(cute.local_tile(source, (columns,), (piece,)), own)
    if const_expr(pairs != ""):
        if piece * columns < rotary.rotary_dim:
            turned = cute.make_rmem_tensor(columns, Float32)
            turn_piece(pairs, source, own, turned, rotary, position, piece)
            for i in cutlass.range_constexpr(columns):
                own[i] = turned[i].to(own.element_type)
    return own
