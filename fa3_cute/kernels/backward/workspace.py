"""The workspace's parts as tensors, and thread order: how 128 threads leave accumulators in memory for others that hold
the same elements, 4 floats at a time. Element 4 j + i of thread t lies at 512 j + 4 t + i.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64

from .blocks import Blocks

QUAD = 4


def per_block(pointer: cute.Pointer, size: int, blocks: Blocks, num_heads: Int32) -> cute.Tensor:
    """(size, blocks, num_heads): so many neighbours of each block of rows and head."""
    of_block = cute.assume(Int64(size), divby=size)      # for 16-byte accesses
    return cute.make_tensor(pointer, cute.make_layout(
        (size, blocks.num_blocks, num_heads), stride=(1, of_block, of_block * blocks.num_blocks)))


@dataclass(frozen=True)
class Sums:
    """dQ in FP32, of as many units (planning/sections.py) as are under way: unit u has the slot u % num_slots, when the
    unit num_slots before it is finished.

    parts       (tile_m * head_dim, Q blocks of a head, query heads of a KV head, slots) f32
    progress    (2, units) int32: tiles of keys that are added, by each warp that adds, or pieces of them (shares.py);
                duties that are done, for each query head
    num_slots   of units
    """
    parts: cute.Tensor
    progress: cute.Tensor
    num_slots: Int32

    @staticmethod
    def create(cfg, a) -> "Sums":
        """From a kernel's arguments."""
        size, group = cfg.tile_m * cfg.head_dim, a.num_heads // a.num_heads_k
        of_block = cute.assume(Int64(size), divby=size)      # for 16-byte accesses
        strides = 1, of_block, of_block * a.blocks_per_unit, of_block * a.blocks_per_unit * group
        parts = cute.make_tensor(a.dq_sum, cute.make_layout((size, a.blocks_per_unit, group, a.num_sum_slots),
                                                            stride=strides))
        progress = cute.make_tensor(a.progress, cute.make_layout((2, a.num_units)))
        return Sums(parts, progress, a.num_sum_slots)

    def slot(self, unit: Int32) -> Int32:
        """Of a unit."""
        return unit - unit // self.num_slots * self.num_slots

    def num_units(self) -> Int32:
        """Of the launch."""
        return self.progress.shape[1]

    def count(self, which: int, unit: Int32) -> cute.Pointer:
        """Where it stands how many tiles of keys are added (0), or duties done (1)."""
        return self.progress[None, unit].iterator + which


@cute.jit
def clear_block(block: cute.Tensor, thread: Int32, threads: Constexpr[int]):
    """Zeros in the place of a block's sums. Runs on: so many threads."""
    zeros = cute.make_rmem_tensor(QUAD, Float32)
    zeros.fill(0.0)
    layout = cute.make_layout((QUAD, cute.size(block) // threads // QUAD), stride=(1, threads * QUAD))
    quads = cute.make_tensor(first_quad(block.iterator, thread), layout)
    for j in cutlass.range(cute.size(quads, mode=[1]), unroll=8):
        cute.autovec_copy(zeros, quads[None, j])


@cute.jit
def wait_for_count(counter: cute.Pointer, wanted: Int32):
    """Until a count of Sums.progress is that, and what was counted is visible. Runs on: whole warps."""
    count = Int32(-1)
    while count != wanted:
        count = cute.arch.load(counter, Int32, sem="acquire", scope="gpu")


def add_to_count(counter: cute.Pointer, number: Int32 | int):
    """So many more, behind what this thread has seen or done. Runs on: a thread."""
    cute.arch.fence_acq_rel_gpu()
    cute.arch.atomic_add(counter, Int32(number), sem="relaxed", scope="gpu")


def quads_of(acc: cute.Tensor) -> cute.Tensor:
    """An accumulator as (4, quads)."""
    return cute.make_tensor(acc.iterator, cute.make_layout((QUAD, cute.size(acc) // QUAD)))


def in_thread_order(start: cute.Pointer, size: int, slots: int = 1) -> cute.Tensor:
    """(4, quads, slot): what a thread has, from its first float on, of slots of so many floats side by side."""
    return cute.make_tensor(start, cute.make_layout((QUAD, size // 128 // QUAD, slots), stride=(1, 128 * QUAD, size)))


def first_quad(start: cute.Pointer, thread: Int32) -> cute.Pointer:
    """Where one of the threads has its first in a slot of global memory. Shared memory's addresses are plain sums: with
    an assumption the compiler makes other code of the kernels' loops, not less."""
    return start + cute.assume(QUAD * thread, divby=QUAD)
