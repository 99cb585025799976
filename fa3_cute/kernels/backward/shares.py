"""The last tiles of keys of a launch, which CTAs share: which part of one is at a place of the order, and how what
parts have of dK and dV comes together. Which tiles these are, and into how many parts they are cut, is the host's
(planning/sections.py).

Tiles seldom are a whole number for each CTA: of 4096 equal ones 132 CTAs have 31 each, and four have one more, for as
long as which all others wait. So the last `num_shared` tiles are cut by their Q tiles into `num_parts` parts of equal
length, one after the other: a part is of one tile, or the end of one and the start of the next. If a tile has num_parts
pieces, a part has num_shared.

The last part of a tile adds what the others have left in the workspace to its own sums, in their order, and stores dK
and dV: the same bits in every call of as many heads and sequences. A part that has the start of a tile too computes
that first, and so waits for no other part before others can have what it leaves: parts start together and end together.
Whom one waits for has an earlier place in the order.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.cute.nvgpu import CopyG2ROp, MemoryOrder, MemoryScope

from ...planning.backward import BackwardConfig
from ..common.arithmetic import ceil_div, maximum, minimum
from .workspace import add_to_count, first_quad, in_thread_order, quads_of, wait_for_count

STORES = -1      # as `part` of a tile of keys: its dK and dV are stored
QUADS_AT_ONCE = 4       # of a thread's 8, 12 or 16


@dataclass(frozen=True)
class Shares:
    """Of a launch.

    num_shared   tiles, the last ones
    num_parts    into which they are cut; 0 if there are none
    sums         (tile_n * head_dim / warpgroups, warpgroups, dV and dK, parts) f32: what parts leave, in thread order
    is_left      (parts) int32: 1 as soon as it is there
    """
    num_shared: Int32
    num_parts: Int32
    sums: cute.Tensor
    is_left: cute.Tensor

    @staticmethod
    def create(cfg: BackwardConfig, a) -> "Shares":
        """From a kernel's arguments. Counts of turns have room for `is_left`: calls that share tiles have no turns."""
        size = cfg.tile_n * cfg.head_dim // cfg.num_consumer_wgs
        sums = cute.make_tensor(a.shared_sums, cute.make_layout(
            (size, cfg.num_consumer_wgs, 2, a.num_parts),
            stride=(1, size, cfg.num_consumer_wgs * size, 2 * cfg.num_consumer_wgs * size)))
        return Shares(a.num_shared, a.num_parts, sums, cute.make_tensor(a.order, cute.make_layout(a.num_parts)))

    def num_pieces(self) -> Int32:
        """Of a tile."""
        return maximum(self.num_parts, 1)

    def num_places(self, num_tiles: Int32) -> Int32:
        """Of the order, before those that have duties alone."""
        return num_tiles - self.num_shared + self.num_parts

    @cute.jit
    def wait(self, tile):
        """Until all parts whose sums the tile's are added to have left them. Runs on: whole warps."""
        for part in cutlass.range(tile.first_part, tile.end_part, unroll=1):
            wait_for_count(self.is_left[None].iterator + part, Int32(1))

    @cute.jit
    def tell(self, tile):
        """The part's sums are there, of which all threads that this one has heard of have written theirs. Runs on: a
        thread."""
        if tile.part != STORES:
            add_to_count(self.is_left[None].iterator + tile.part, 1)


@dataclass(frozen=True)
class Share:
    """Of a place of the order. With STORES and no other part it is a whole tile."""
    tile: Int32        # among those of the launch; from their number on: a place that has a duty alone
    begin: Int32       # of the tile's pieces
    end: Int32
    part: Int32
    first_part: Int32
    end_part: Int32
    is_last: Boolean   # of the two tiles of a place, or the only one

    def blocks(self, shares: Shares, seqlen_q: Int32, tile_m: int) -> tuple[Int32, Int32]:
        """[begin, end) of the Q tiles that pass."""
        number, pieces = ceil_div(seqlen_q, tile_m), shares.num_pieces()
        return number * self.begin // pieces, number * self.end // pieces

    def has_duty(self, shares: Shares) -> Boolean:
        """Of the places whose last tile this is, the first has the duty that belongs to the place num_behind before the
        tile's: all tiles before this one are in places before it."""
        return self.is_last & (self.begin < maximum(shares.num_shared, 1))


@cute.jit
def share_of(shares: Shares, num_tiles: Int32, index: Int32, is_second: Boolean) -> Share:
    """At a place of the order. Where there are two tiles, the later comes first, then, is_second, the other."""
    tile, begin, end, part = index, Int32(0), shares.num_pieces(), Int32(STORES)
    first_part, end_part, is_last = Int32(0), Int32(0), Boolean(True)
    first, num_places = num_tiles - shares.num_shared, shares.num_places(num_tiles)
    if index >= num_places:
        tile = num_tiles + index - num_places
    elif index >= first:
        number = index - first
        row = number * shares.num_shared // shares.num_parts
        tile, begin = first + row, number * shares.num_shared - row * shares.num_parts
        rest = begin + shares.num_shared - shares.num_parts
        end = minimum(begin + shares.num_shared, shares.num_parts)
        if rest > 0 and not is_second:
            tile, begin, end, part, is_last = tile + 1, Int32(0), rest, number, Boolean(False)
        elif rest < 0:
            part = number
        else:
            first_part, end_part = row * shares.num_parts // shares.num_shared, number
    return Share(tile, begin, end, part, first_part, end_part, is_last)


@cute.jit
def share_sums(shares: Shares, tile, accs: tuple[tuple[int, cute.Tensor], ...], tidx: Int32):
    """dV and dK of a part that another stores -> the workspace; to those of one that stores, what others have left.

    accs: (0 of dV or 1 of dK, accumulator)
    Runs on: a consumer warpgroup, when those others have (Shares.wait).
    """
    if tile.part != STORES:
        for which, acc in accs:
            cute.autovec_copy(quads_of(acc), thread_sums(shares, tile.part, which, acc, tidx))
    for which, acc in accs:
        for part in cutlass.range(tile.first_part, tile.end_part, unroll=1):
            add_sums(acc, thread_sums(shares, part, which, acc, tidx))


def thread_sums(shares: Shares, part: Int32, which: int, acc: cute.Tensor, tidx: Int32) -> cute.Tensor:
    """(4, quads): a thread's, of a part's dV or dK."""
    start = first_quad(shares.sums[None, tidx // 128, which, part].iterator, tidx % 128)
    return in_thread_order(start, 128 * cute.size(acc))[None, None, 0]


@cute.jit
def add_sums(acc: cute.Tensor, sums: cute.Tensor):
    """acc += sums, of which few are in registers at a time."""
    atom = cute.make_copy_atom(CopyG2ROp(), Float32, num_bits_per_copy=128, memory_order=MemoryOrder.RELAXED,
                               memory_scope=MemoryScope.GPU)
    quads, some = quads_of(acc), cute.make_rmem_tensor((4, QUADS_AT_ONCE), Float32)
    for first in cutlass.range_constexpr(0, cute.size(quads, mode=[1]), QUADS_AT_ONCE):
        cute.copy(atom, cute.local_tile(sums, (4, QUADS_AT_ONCE), (0, first // QUADS_AT_ONCE)), some)
        for j in cutlass.range_constexpr(QUADS_AT_ONCE):
            for i in cutlass.range_constexpr(4):
                quads[i, first + j] += some[i, j]
