"""Rows moved by ordinary loads and stores, where TMA cannot: they lie anywhere, or end early."""
import math

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Constexpr, Int32

from ...planning.config import KernelConfig
from .barriers import sync_warpgroup

PIECE_BYTES = 16           # what `row_copy` moves at once


def piece_size(element) -> int:
    """Elements of a piece."""
    return 8 * PIECE_BYTES // element.width


def threads_per_row(columns: int, element) -> int:
    """Threads that share a row in `row_copy`: a divisor of its pieces."""
    return math.gcd(8, columns // piece_size(element))


def row_copy(columns: int, element, thread: Int32, num_threads: int):
    """How `num_threads` threads walk a (rows, columns) tensor in 16-byte pieces, some rows per step.

    Returns one thread's copy, whose partitions are (piece, step, column), its row of a step, and the rows of a step.
    """
    per_row = threads_per_row(columns, element)
    threads = cute.make_ordered_layout((num_threads // per_row, per_row), order=(1, 0))
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element, num_bits_per_copy=8 * PIECE_BYTES)
    copy = cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, piece_size(element))))
    return copy.get_slice(thread), thread // per_row, num_threads // per_row


def index_of_piece(columns: int, element, thread: Int32, column: int) -> Int32:
    """Where in its row of so many columns the thread's piece in one column of `row_copy` is, in pieces."""
    per_row = threads_per_row(columns, element)
    return column * per_row + thread % per_row


def row_piece(row: cute.Tensor, columns: int, thread: Int32, column: int) -> cute.Tensor:
    """The thread's piece in one column of `row_copy`, of a row that lies anywhere."""
    index = index_of_piece(columns, row.element_type, thread, column)
    return cute.local_tile(row, (piece_size(row.element_type),), (index,))


def is_in_row(extent: Int32, columns: int, element, thread: Int32, column: int) -> Boolean:
    """Whether a row of so many elements has the thread's piece of a tile's row of `columns`."""
    return index_of_piece(columns, element, thread, column) * piece_size(element) < extent


@cute.jit
def clear_rows(cfg: KernelConfig, slot: cute.Tensor, first: Int32, end: Int32 | int, thread: Int32,
               num_threads: Constexpr[int]):
    """Zero the rows [first, end) of a slot, by ordinary stores of `num_threads` threads."""
    copy, first_row, rows_per_step = row_copy(cute.size(slot, mode=[1]), slot.element_type, thread, num_threads)
    tXsX = copy.partition_D(slot)
    zeros = cute.make_rmem_tensor_like(tXsX[None, 0, 0], slot.element_type)
    cute.recast_tensor(zeros, Int32).fill(0)
    for step in cutlass.range(first // rows_per_step, -(-end // rows_per_step), unroll=1):
        row = step * rows_per_step + first_row
        if row >= first and row < end:
            for c in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
                cute.autovec_copy(zeros, tXsX[None, step, c])


@cute.jit
def clear_unused_rows(cfg: KernelConfig, sV: cute.Tensor, v_consumer: pipeline.PipelineConsumer, first: Int32,
                      end: Int32 | int, tidx: Int32):
    """Zero the rows [first, end) of the V slot that is consumed next.

    They belong to another sequence or to none, and may hold NaN, which P = 0 would not silence. TMA fills with zeros
    past the end of the tensor only. Each warpgroup does it for itself, so that none waits for another: they write the
    same zeros. K needs no such care: masking selects, it does not multiply.
    """
    v = v_consumer.wait()
    clear_rows(cfg, sV[None, None, v.index], first, end, tidx % 128, num_threads=128)
    cute.arch.fence_view_async_shared()
    sync_warpgroup(tidx // 128)
