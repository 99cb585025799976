"""Entries of a tile ring: the fields of a tile, a dataclass of Int32, as int32 in their order. The warp that schedules
writes them, the other roles of the CTA read them.
"""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

END = -1                                 # the first field of the entry after the last tile


def entry_ints(kind: type) -> int:
    """Of an entry, whole 16-byte words."""
    return -(-len(kind.__dataclass_fields__) // 4) * 4


def end_of(kind: type):
    """No tile: the entry after the last one."""
    return kind(Int32(END), *[Int32(0)] * (len(kind.__dataclass_fields__) - 1))


@cute.jit
def write_tile(sTile: cute.Tensor, tile):
    """A tile, the same on every lane of the warp, to its slot."""
    if cute.arch.lane_idx() == 0:
        entry = [getattr(tile, name) for name in type(tile).__dataclass_fields__]
        for i in cutlass.range_constexpr(len(entry)):
            sTile[i] = entry[i]
    cute.arch.sync_warp()


@cute.jit
def read_tile(sTile: cute.Tensor, kind: Constexpr[type]):
    """The tile in a slot."""
    entry = cute.make_rmem_tensor(entry_ints(kind), Int32)
    cute.autovec_copy(sTile, entry)
    return kind(*(entry[i] for i in range(len(kind.__dataclass_fields__))))
