"""Where queries and new rows come from, and where they belong."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.sequences import is_present

Divisor = cute.FastDivmodDivisorV2
WARP = 32


@dataclass(frozen=True)
class Rows:
    """Lengths and offsets of the sequences; arrays are int32 [batch_size] or [batch_size + 1], null if absent.

    seqlen_q, seqlen_knew   rows of a sequence, or of all packed ones
    seqlen_k                the capacity of a sequence, or the rows of packed keys
    """
    cu_seqlens_q: cute.Tensor
    cu_seqlens_k: cute.Tensor
    seqused_q: cute.Tensor
    seqused_k: cute.Tensor
    cu_seqlens_k_new: cute.Tensor
    seqlens_rotary: cute.Tensor
    batch_size: Int32
    seqlen_q: Divisor
    seqlen_k: Int32
    seqlen_knew: Divisor
    has_new: Boolean
    num_positions: Int32

    @staticmethod
    def create(a) -> "Rows":
        """From the kernel's arguments, on the host."""
        arrays = (cute.make_tensor(array, cute.make_layout(a.batch_size + 1))
                  for array in (a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q, a.seqused_k, a.cu_seqlens_k_new,
                                a.seqlens_rotary))
        return Rows(*arrays, a.batch_size, Divisor(maximum(a.seqlen_q, 1)), a.seqlen_k,
                    Divisor(maximum(a.seqlen_knew, 1)), a.num_new > 0, a.rotary_positions)

    @cute.jit
    def query(self, token: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """(sequence, query of it, row of q, batch coordinate of q); a negative query of packed rows that no sequence
        has."""
        sequence, row = divmod(token, self.seqlen_q)
        place, batch = row, sequence
        if is_present(self.cu_seqlens_q):
            sequence, row = find_sequence(self.cu_seqlens_q, self.batch_size, token)
            place, batch = token, Int32(0)
        return sequence, row, place, batch

    @cute.jit
    def new_row(self, token: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """`query` of new rows."""
        sequence, row = divmod(token, self.seqlen_knew)
        place, batch = row, sequence
        if is_present(self.cu_seqlens_k_new):
            sequence, row = find_sequence(self.cu_seqlens_k_new, self.batch_size, token)
            place, batch = token, Int32(0)
        return sequence, row, place, batch

    @cute.jit
    def num_queries(self, sequence: Int32) -> Int32:
        """That are used."""
        count = Int32(self.seqlen_q.divisor)
        if is_present(self.cu_seqlens_q):
            count = self.cu_seqlens_q[sequence + 1] - self.cu_seqlens_q[sequence]
        if is_present(self.seqused_q):
            count = minimum(count, self.seqused_q[sequence])
        return maximum(count, 0)

    @cute.jit
    def num_new(self, sequence: Int32) -> Int32:
        """Rows to append."""
        count = Int32(self.seqlen_knew.divisor)
        if is_present(self.cu_seqlens_k_new):
            count = self.cu_seqlens_k_new[sequence + 1] - self.cu_seqlens_k_new[sequence]
        return maximum(count, 0)

    @cute.jit
    def old_length(self, sequence: Int32) -> Int32:
        """Keys that are there before, whatever the arrays say."""
        length = self.seqlen_k
        if is_present(self.cu_seqlens_k):
            length = self.cu_seqlens_k[sequence + 1] - self.cu_seqlens_k[sequence]
        if is_present(self.seqused_k):
            length = minimum(length, self.seqused_k[sequence])
        return maximum(length, 0)

    @cute.jit
    def key_start(self, sequence: Int32, old: Int32) -> Int32:
        """The position of the first new key."""
        start = old
        if is_present(self.seqlens_rotary):
            start = self.seqlens_rotary[sequence]
        return start

    @cute.jit
    def query_start(self, sequence: Int32) -> Int32:
        """The position of the first query."""
        old = self.old_length(sequence)
        return self.key_start(sequence, old if self.has_new else old - self.num_queries(sequence))

    def position(self, position: Int32) -> Int32:
        """As the tables have it."""
        return minimum(maximum(position, 0), self.num_positions - 1)


@cute.jit
def find_sequence(offsets: cute.Tensor, batch_size: Int32, token: Int32) -> tuple[Int32, Int32]:
    """(sequence, row of it) of a packed row; row -1 if no sequence has it. Runs on: whole warps.

    The sequence is the number of ends that are at or before the row. Lanes look at 32 ends that share the sequences
    evenly, then at those between two of them: of up to 1,024 sequences two reads, one after the other.
    """
    lane, step = cute.arch.lane_idx(), ceil_div(batch_size, WARP)
    end = minimum((lane + 1) * step, batch_size)
    found = count_ends(offsets, end, token, (lane + 1) * step <= batch_size) * step
    last = minimum(found + step, batch_size)
    for first in cutlass.range(found, last, WARP, unroll=1):
        sequence = first + lane
        is_inside = sequence < last
        found += count_ends(offsets, minimum(sequence + 1, batch_size), token, is_inside)
    row = Int32(-1)
    if found < batch_size:
        row = token - offsets[found]
    return minimum(found, batch_size - 1), row


@cute.jit
def count_ends(offsets: cute.Tensor, end: Int32, token: Int32, counts: Boolean) -> Int32:
    """Of the lanes that count: how many have an end at or before the row."""
    is_before = Int32(1) if counts and offsets[end] <= token else Int32(0)
    return cute.arch.popc(cute.arch.vote_ballot_sync(is_before != 0))
