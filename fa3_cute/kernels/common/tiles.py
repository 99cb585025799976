"""One tile of O, and the rows of its sequence in a tensor.

If the forward kernel packs heads (cfg.packs_heads), a tile's rows are (heads, queries), heads fastest.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from ...planning.config import FwdConfig, KernelConfig


@dataclass(frozen=True)
class Tile:
    """One tile of O and where its sequence lies, in tokens."""
    m_block: Int32
    head: Int32        # the first of those that are packed
    kv_head: Int32
    batch: Int32       # batch coordinate in the tensors; 0 if they are packed
    offset_q: Int32    # first row of the sequence in Q and O, 0 unless packed
    seqlen_q: Int32
    offset_k: Int32    # of its keys in K and V
    seqlen_k: Int32
    sequence: Int32    # index of the sequence in the batch


@dataclass(frozen=True)
class Place:
    """Where one thread's scores of one K/V tile belong; layout.py has the distances of the others from the first.

    first_row, first_key   of its first score: row of the Q tile, key of the sequence
    diagonals              keys on the diagonal of its two rows
    """
    tile: Tile
    first_row: Int32
    first_key: Int32
    diagonals: tuple[Int32, Int32]


def rows_from(cfg: KernelConfig, offset, mX: cute.Tensor) -> cute.Tensor:
    """A sequence's (row, column) view: of packed tensors, from its first row on.

    TMA bounds the view by the tensor's end, not the sequence's: a last tile may bring rows of the next sequence.
    """
    if not (cfg.is_varlen or cfg.packs_heads):
        return mX
    row = (0, offset) if isinstance(mX.shape[0], tuple) else offset
    return cute.domain_offset((row, 0), mX)


def with_packed_heads(cfg: FwdConfig, mX: cute.Tensor) -> cute.Tensor:
    """(row, column, head, batch) of Q or O as ((packed_heads, query), column, group of heads, batch), if heads are."""
    if not cfg.packs_heads:
        return mX
    (seqlen, columns, heads, batches), (row, column, head, batch) = mX.shape, mX.stride
    return cute.make_tensor(mX.iterator, cute.make_layout(
        ((cfg.packed_heads, seqlen), columns, heads // cfg.packed_heads, batches),
        stride=((head, row), column, head * cfg.packed_heads, batch)))


def group_of(cfg: FwdConfig, tile: Tile) -> Int32:
    """The tile's place along the dimension of heads of `with_packed_heads`."""
    return tile.head // cfg.packed_heads if cfg.packs_heads else tile.head


def query_and_head(cfg: FwdConfig, tile: Tile, row: Int32) -> tuple[Int32, Int32]:
    """Whose row of Q this row of the sequence's M tiles is."""
    if not cfg.packs_heads:
        return row, tile.head
    return row // cfg.packed_heads, tile.head + row % cfg.packed_heads
