"""TMA operands: a descriptor with its coordinate tensor, and one copy's views (PTX ISA, "cp.async.bulk.tensor")."""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int64
from cutlass.cute.nvgpu import cpasync

# L2 policies (PTX ISA, "createpolicy"): of what may be read again soon, and of what is gone from L2 before it is.
EVICT_NORMAL, EVICT_FIRST = 0x1000000000000000, 0x12F0000000000000
# Bytes of K and V that L2 (50 MB) cannot keep until the next call. With the hint, 33 MB that L2 could have kept took
# 12.0 us instead of 9.7, and 100 MB 27.1 instead of 26.2; 134 MB 33.7 instead of 34.3. Decode, H200, 2026-11-22.
EVICT_FIRST_FROM = 100 << 20


@dataclass(frozen=True)
class TmaOperand:
    """A TMA descriptor and the coordinate tensor that it copies from or to."""
    atom: cute.CopyAtom
    tensor: cute.Tensor


def tma_operand(op, tensor: cute.Tensor, ring: cute.ComposedLayout, rows: int | tuple) -> TmaOperand:
    """Copies boxes of (rows, columns) between `tensor` and the slots of a ring with that shared-memory layout.

    rows   (heads, queries) of a tensor whose rows are that (tiles.with_packed_heads)
    """
    slot = cute.select(ring, mode=[0, 1])
    return TmaOperand(*cpasync.make_tiled_tma_atom(op, tensor, slot, (rows, cute.size(slot, mode=[1]))))


def tma_load(tensor: cute.Tensor, ring: cute.ComposedLayout, rows: int | tuple) -> TmaOperand:
    """Global -> shared."""
    return tma_operand(cpasync.CopyBulkTensorTileG2SOp(), tensor, ring, rows)


def tma_store(tensor: cute.Tensor, ring: cute.ComposedLayout, rows: int | tuple) -> TmaOperand:
    """Shared -> global."""
    return tma_operand(cpasync.CopyBulkTensorTileS2GOp(), tensor, ring, rows)


def tma_views(op: TmaOperand, gX: cute.Tensor, sX: cute.Tensor):
    """TMA's view of one operand: smem (box, slot) and gmem (box, tile)."""
    no_multicast = cute.make_layout(1)
    return cpasync.tma_partition(op.atom, 0, no_multicast, cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2))


@cute.jit
def kv_policy(num_bytes: Int64) -> Int64:
    """L2 policy of K and V that are num_bytes together."""
    return Int64(EVICT_FIRST) if num_bytes > EVICT_FIRST_FROM else Int64(EVICT_NORMAL)
