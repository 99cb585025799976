"""The workspace's parts as tensors, and thread order: how 128 threads leave accumulators in memory for others that hold
the same elements, 4 floats at a time. Element 4 j + i of thread t lies at 512 j + 4 t + i.
"""
import cutlass.cute as cute
from cutlass import Int32, Int64

from .blocks import Blocks

QUAD = 4


def per_block(pointer: cute.Pointer, size: int, blocks: Blocks, num_heads: Int32) -> cute.Tensor:
    """(size, blocks, num_heads): so many neighbours of each block of rows and head."""
    of_block = cute.assume(Int64(size), divby=size)      # for 16-byte accesses
    return cute.make_tensor(pointer, cute.make_layout(
        (size, blocks.num_blocks, num_heads), stride=(1, of_block, of_block * blocks.num_blocks)))


def quads_of(acc: cute.Tensor) -> cute.Tensor:
    """An accumulator as (4, quads)."""
    return cute.make_tensor(acc.iterator, cute.make_layout((QUAD, cute.size(acc) // QUAD)))


def in_thread_order(start: cute.Pointer, size: int, slots: int = 1) -> cute.Tensor:
    """(4, quads, slot): what a thread has, from its first float on, of slots of so many floats side by side."""
    return cute.make_tensor(start, cute.make_layout((QUAD, size // 128 // QUAD, slots), stride=(1, 128 * QUAD, size)))


def first_quad(start: cute.Pointer, thread: Int32) -> cute.Pointer:
    """Where one of 128 threads has its first in a slot of global memory. Shared memory's addresses are plain sums: with
    an assumption the compiler makes other code of the kernels' loops, not less."""
    return start + cute.assume(QUAD * thread, divby=QUAD)
