"""Duties: which Q tiles of dQ a CTA finishes besides its keys.

dQ is a sum over tiles of keys, which many CTAs add to. Who takes the place in the order (order.py) that lies some
sections behind that of other keys (planning/sections.py) finishes some of their unit's Q tiles: those of its duty are
scaled, rounded and stored. A sequence has as many duties as blocks of keys, block b the Q tiles b, b + step, .. All
tiles of the unit were taken before such a place, and are done or with CTAs that run: a CTA waits for places before its
own alone. The order goes on behind its last tile, for the duties of the last ones.

So sums stay in L2, but for deterministic calls, of which more are under way: they are read when the unit's last tile
has been added, and what has read them writes the zeros that a later unit finds there. Were dQ finished by a kernel of
its own, sums of all heads would go to memory and back, once for zeros, once for each section that adds to them.
"""
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div, maximum
from .barriers import BarrierId
from .bundles import BwdParams
from .outgoing import threads_of
from .place import find_place
from .workspace import add_to_count, clear_block


@dataclass(frozen=True)
class Duty:
    """Q tiles first, first + step, ... of some query heads of a unit."""
    num_tiles: Int32    # of all these heads
    first: Int32        # of the sequence
    step: Int32
    first_head: Int32   # of the group
    num_heads: Int32
    kv_head: Int32
    batch: Int32        # as in KeyTile
    offset: Int32       # of the sequence's queries, in tokens
    seqlen: Int32
    first_block: Int32  # of the sequence, in the unit
    slot: Int32         # of the unit's sums
    unit: Int32         # NOTHING: a place before the first duty

    def start(self) -> tuple[Int32, Int32, Int32]:
        """(0, Q tile, head of the group): a place of the walk over its tiles."""
        return Int32(0), self.first, self.first_head

    @cute.jit
    def after(self, place: tuple[Int32, Int32, Int32]) -> tuple[Int32, Int32, Int32]:
        """The next one: all heads of a Q tile, then the next Q tile."""
        i, m_block, head = place
        head += 1
        if head == self.first_head + self.num_heads:
            head = self.first_head
            m_block += self.step
        return i + 1, m_block, head


NOTHING = -1


def no_duty() -> Duty:
    """Of a place without one."""
    return Duty(*[Int32(0)] * 11, Int32(NOTHING))


@cute.jit
def unit_of(cfg: BackwardConfig, params: BwdParams, sequence: Int32, kv_head: Int32) -> Int32:
    """Which unit adds to the same sums."""
    if const_expr(cfg.is_varlen):
        return kv_head
    else:
        return sequence * params.num_heads_k + kv_head


@cute.jit
def places_of_unit(cfg: BackwardConfig, params: BwdParams) -> Int32:
    """In the order: its blocks of keys, of whatever length."""
    if const_expr(cfg.is_varlen):
        return params.k_blocks.num_blocks
    else:
        return params.k_blocks.num_blocks // params.sequences.batch_size


@cute.jit
def pieces_of_unit(cfg: BackwardConfig, params: BwdParams) -> Int32:
    """What a unit's count of added tiles comes to: its places, of each warp that adds, or pieces of them where tiles
    have parts."""
    places = cfg.num_reducers * places_of_unit(cfg, params)
    if const_expr(cfg.shares_tiles):
        places *= params.shares.num_pieces()
    return places


def pieces_of(cfg: BackwardConfig, tile) -> Int32 | int:
    """What a tile, or a part of one, adds to that count."""
    return tile.num_pieces if cfg.shares_tiles else 1


@cute.jit
def num_tiles_of(params: BwdParams) -> Int32:
    """Tiles of keys."""
    return params.k_blocks.num_blocks * params.num_heads_k


@cute.jit
def find_duty(cfg: BackwardConfig, params: BwdParams, place: Int32) -> Duty:
    """Of a place of the order from num_behind on: what belongs to the keys num_behind places before it. Behind the last
    keys a duty may be that of tail_split places, some query heads each, so that many CTAs share the last ones.

    Runs on: whole warps.
    """
    num_tiles, first_head, num_heads = num_tiles_of(params), Int32(0), params.group
    index = place - params.num_behind
    if place >= num_tiles:
        row, num_heads = (place - num_tiles) // params.tail_split, params.group // params.tail_split
        index = num_tiles - params.num_behind + row
        first_head = (place - num_tiles - row * params.tail_split) * num_heads
    at = find_place(cfg, params.sequences, params.k_blocks, params.num_heads_k, params.section, index,
                    in_sections=cfg.is_causal or cfg.is_deterministic, is_reversed=False)
    step, first_block = maximum(ceil_div(at.seqlen_k, cfg.tile_n), 1), Int32(0)
    if const_expr(cfg.is_varlen):
        first_block = params.q_blocks.first(at.sequence)
    unit, num_tiles = unit_of(cfg, params, at.sequence, at.head), Int32(0)
    if at.block < step and at.block * cfg.tile_m < at.seqlen_q:
        num_tiles = ceil_div(ceil_div(at.seqlen_q, cfg.tile_m) - at.block, step) * num_heads
    return Duty(num_tiles, at.block, step, first_head, num_heads, at.head, at.batch, at.offset_q, at.seqlen_q,
                first_block, params.sums.slot(unit), unit)


@cute.jit
def free_sums(cfg: BackwardConfig, params: BwdParams, duty: Duty):
    """Clears the sums that a duty has read and counts it, if a later unit has their slot. Runs on: a warp."""
    if duty.unit != NOTHING and duty.unit + params.sums.num_slots < params.sums.num_units():
        clear(cfg, params, duty)
        with cute.arch.elect_one():
            add_to_count(params.sums.count(1, duty.unit), duty.num_heads)


@cute.jit
def clear(cfg: BackwardConfig, params: BwdParams, duty: Duty):
    """Zeros in the place of sums that are read. Runs on: a warp."""
    i, m_block, of_group = duty.start()
    while i < duty.num_tiles:
        block = params.sums.parts[None, duty.first_block + m_block, of_group, duty.slot]
        clear_block(block, cute.arch.lane_idx(), WARP)
        i, m_block, of_group = duty.after((i, m_block, of_group))
    cute.arch.sync_warp()


def rounds_of(cfg: BackwardConfig, duty: Duty) -> Int32:
    """In which the consumers finish a duty."""
    return ceil_div(duty.num_tiles, cfg.num_consumer_wgs // cfg.num_dq_wgs)


def wait_for_sums(cfg: BackwardConfig):
    """Until they are whole, and every warpgroup has read all dS. Runs on: consumers."""
    cute.arch.barrier(barrier_id=BarrierId.SUMS, number_of_threads=threads_of(cfg))
