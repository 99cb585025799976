"""One tile of O, and the rows of its sequence in a tensor."""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from ...planning.config import KernelConfig


@dataclass(frozen=True)
class Tile:
    """One tile of O and where its sequence lies, in tokens."""
    m_block: Int32
    head: Int32
    kv_head: Int32
    batch: Int32       # batch coordinate in the tensors; 0 if they are packed
    offset_q: Int32    # first row of the sequence in Q and O, 0 unless packed
    seqlen_q: Int32
    offset_k: Int32
    seqlen_k: Int32
    sequence: Int32    # index of the sequence in the batch


def rows_from(cfg: KernelConfig, offset, mX: cute.Tensor) -> cute.Tensor:
    """A sequence's (row, column) view: of packed tensors, from its first row on.

    TMA bounds the view by the tensor's end, not the sequence's: a last tile may bring rows of the next sequence.
    """
    return cute.domain_offset((offset, 0), mX) if cfg.is_varlen else mX
