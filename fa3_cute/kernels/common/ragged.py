"""A ragged batch: sequences of their own lengths, each of whose Q, K and V lie where arrays on the device say.

Queries are packed or dense; keys are packed, rows of a cache, or pages. Nothing of that is a choice at compile time:
an array that is not there is a null pointer. What the arrays say is clamped to what there is, so that a length beyond
the capacity, or a negative one, reads nothing that is not there. A sequence with padding on its left is one that begins
where the padding ends: its queries are aligned with its last key, so that nothing else changes.

Two launches may share a batch, decode and forward: each serves the sequences with as many queries as suit it, and to
the other one's it sees no queries. Packed rows behind the last sequence can be filled: they are one more sequence, of
queries that see no key.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ...planning.config import KernelConfig
from .arithmetic import maximum, minimum
from .sequences import Sequences, is_present

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class RaggedBatch:
    """What a kernel serves of a ragged batch; used as Sequences is.

    arrays         rows_k is the capacity of a sequence's keys, or the rows of packed ones
    kv_batch_idx   [batch_size] int32: a sequence's entry of K and V or row of the page table; null: its own index
    batch_size     sequences, and padding as one more
    least_queries, most_queries   of the sequences that this kernel serves
    leftpad_k      [batch_size] int32: first rows of a sequence's keys that do not exist; None unless cfg.has_leftpad
    num_new        keys that the kernel appends to each sequence's used ones; None where it appends nothing
    """
    arrays: Sequences
    kv_batch_idx: cute.Tensor
    batch_size: Int32
    least_queries: Int32
    most_queries: Int32
    leftpad_k: Optional[cute.Tensor] = None
    num_new: Optional[Int32] = None

    @staticmethod
    def create(cfg: KernelConfig, a, least_queries: Int32, most_queries: Int32) -> "RaggedBatch":
        """From a kernel's arguments."""
        kv_batch_idx = cute.make_tensor(a.kv_batch_idx, cute.make_layout(a.batch_size))
        leftpad_k = cute.make_tensor(a.leftpad_k, cute.make_layout(a.batch_size)) if cfg.has_leftpad else None
        return RaggedBatch(Sequences.create(a), kv_batch_idx, a.batch_size + a.has_padding, least_queries, most_queries,
                           leftpad_k)

    def is_packed(self) -> Boolean:
        """Whether the queries are packed."""
        return self.arrays.is_packed()

    def batch_coordinate(self, sequence: Int32) -> Int32:
        """Where a sequence is along the batch dimension of Q, O and LSE."""
        return self.arrays.batch_coordinate(sequence)

    def number(self, sequence: Int32) -> Int32:
        """A sequence's index in arrays of the caller's; of padding that of the last one, for it has none."""
        return minimum(sequence, self.arrays.batch_size - 1)

    @cute.jit
    def key_batch(self, number: Int32) -> Int32:
        """Where a sequence is along the batch dimension of K and V, or which row of the page table is its own."""
        batch = number
        if is_present(self.arrays.cu_seqlens_k):
            batch = Int32(0)
        if is_present(self.kv_batch_idx):
            batch = self.kv_batch_idx[number]
        return batch

    @cute.jit
    def place(self, sequence: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """(offset_q, seqlen_q, offset_k, seqlen_k) in tokens; no queries of what this kernel does not serve. Padding
        has -1 keys: not even a sink.

        All loads come before the first use of one: they are in flight together.
        """
        arrays = self.arrays
        first_q, end_q, first_k, end_k = Int32(0), Int32(0), Int32(0), Int32(0)
        used_q, used_k, pad = Int32(UNLIMITED), Int32(UNLIMITED), Int32(0)
        if sequence < arrays.batch_size:
            end_q, end_k = arrays.rows_q, arrays.rows_k
            if is_present(arrays.cu_seqlens_q):
                first_q, end_q = arrays.cu_seqlens_q[sequence], arrays.cu_seqlens_q[sequence + 1]
            if is_present(arrays.cu_seqlens_k):
                first_k, end_k = arrays.cu_seqlens_k[sequence], arrays.cu_seqlens_k[sequence + 1]
            if is_present(arrays.seqused_q):
                used_q = arrays.seqused_q[sequence]
            if is_present(arrays.seqused_k):
                used_k = arrays.seqused_k[sequence]
                if const_expr(self.num_new is not None):
                    used_k = maximum(used_k, 0) + self.num_new
            if const_expr(self.leftpad_k is not None):
                pad = self.leftpad_k[sequence]
        elif sequence < self.batch_size:
            first_q, end_q, end_k = arrays.cu_seqlens_q[arrays.batch_size], arrays.rows_q, Int32(-1)
        seqlen_q = maximum(minimum(end_q - first_q, used_q), 0)
        if seqlen_q < self.least_queries or seqlen_q > self.most_queries:
            seqlen_q = Int32(0)
        seqlen_k = maximum(minimum(end_k - first_k, used_k), 0)
        if const_expr(self.leftpad_k is not None):
            pad = minimum(maximum(pad, 0), seqlen_k)
            first_k, seqlen_k = first_k + pad, seqlen_k - pad
        return first_q, seqlen_q, first_k, Int32(-1) if end_k < 0 else seqlen_k
