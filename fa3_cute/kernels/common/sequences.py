"""Where the sequences of a batch lie and how long they are, read from device memory (cu_seqlens_*, seqused_*)."""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Int32


@dataclass(frozen=True)
class Sequences:
    """The arrays that describe a batch; any of them may be a null pointer.

    cu_seqlens_*  [batch_size + 1] int32: sequence i has the rows cu_seqlens[i] .. cu_seqlens[i + 1] of packed tensors
    seqused_*     [batch_size] int32: how many of its rows are used
    rows_*        rows of a sequence of dense tensors
    """
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_q: cute.Tensor
    seqused_k: cute.Tensor
    batch_size: Int32
    rows_q: Int32
    rows_k: Int32

    @staticmethod
    def create(a) -> "Sequences":
        """From a kernel's arguments."""
        arrays = (cute.make_tensor(array, cute.make_layout(a.batch_size + 1))
                  for array in (a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k))
        return Sequences(*arrays, a.batch_size, a.seqlen_q, a.seqlen_k)

    def is_packed(self) -> Boolean:
        """Whether the tensors are packed (no batch dimension)."""
        return is_present(self.cu_seqlens_q)

    @cute.jit
    def batch_coordinate(self, sequence: Int32) -> Int32:
        """Where a sequence is along the tensors' batch dimension."""
        return Int32(0) if self.is_packed() else sequence

    @cute.jit
    def place(self, sequence: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """(offset_q, seqlen_q, offset_k, seqlen_k) in tokens; all 0 for a sequence past the last."""
        offset_q, seqlen_q, offset_k, seqlen_k = Int32(0), Int32(0), Int32(0), Int32(0)
        if sequence < self.batch_size:
            offset_q, seqlen_q = rows_of(self.cu_seqlens_q, self.seqused_q, self.rows_q, sequence)
            offset_k, seqlen_k = rows_of(self.cu_seqlens_k, self.seqused_k, self.rows_k, sequence)
        return offset_q, seqlen_q, offset_k, seqlen_k


@dataclass(frozen=True)
class UsedLengths:
    """How many rows of each entry of a dense batch are used: seqused_* [batch_size] int32, may be null pointers."""
    q: cute.Tensor
    k: cute.Tensor

    @staticmethod
    def create(a) -> "UsedLengths":
        """From a kernel's arguments."""
        return UsedLengths(*(cute.make_tensor(array, cute.make_layout(a.batch_size))
                             for array in (a.seqused_q, a.seqused_k)))

    def of(self, batch: Int32, rows_q: Int32, rows_k: Int32) -> tuple[Int32, Int32]:
        """(seqlen_q, seqlen_k) of an entry whose tensors have so many rows."""
        return used_rows(self.q, rows_q, batch), used_rows(self.k, rows_k, batch)


def is_present(array: cute.Tensor) -> Boolean:
    """Whether an optional array was given."""
    return array.iterator.toint() != 0


@cute.jit
def rows_of(cu_seqlens: cute.Tensor, seqused: cute.Tensor, rows: Int32, sequence: Int32) -> tuple[Int32, Int32]:
    """(first row, used rows) of one sequence."""
    offset, length = Int32(0), rows
    if is_present(cu_seqlens):
        offset = cu_seqlens[sequence]
        length = cu_seqlens[sequence + 1] - offset
    return offset, used_rows(seqused, length, sequence)


@cute.jit
def used_rows(seqused: cute.Tensor, rows: Int32, sequence: Int32) -> Int32:
    """How many of a sequence's rows are used: all of them unless the optional array says otherwise."""
    used = rows
    if is_present(seqused):
        used = seqused[sequence]
    return used
