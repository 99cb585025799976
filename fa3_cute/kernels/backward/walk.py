"""In which order Q tiles pass the consumers of dK or dV alone: one query head of the group after the other."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32

from .blocks import QueryRange
from .visible import KeyMask


@cute.jit
def walk_heads(consumer, mask: KeyMask, queries: QueryRange, group: Int32):
    """The steps of a consumer, whose keys the mask is of: those that some row does not see whole are masked."""
    tile, cfg = mask.tile, mask.cfg
    for i in cutlass.range(group, unroll=1):
        consumer.start_head(mask, tile.kv_head * group + i, tile.sequence)
        for kind in cutlass.range_constexpr(2, -1 if cfg.is_local else 0, -1):
            begin, end = queries.of_kind(kind)
            for m_block in cutlass.range(begin, end, unroll=1):
                consumer.step(mask, m_block, tile.seqlen_q - m_block * cfg.tile_m, is_masked=kind != 1)
