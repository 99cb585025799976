"""Schedule role: one warp takes places of the order for its CTA and puts what is there, a tile of keys and a duty, into
the tile ring, from which the others read.

A CTA takes the next place that nobody has taken when it has loaded the last Q tile of the one before: a tile that is
taken starts at once. One that waited for its CTA would hold up all that come after it in the order, if deterministic,
and leave CTAs idle at the end of a launch. So where CTAs have few tiles (load.py) it takes the next one later still,
and behind a place that has a duty alone when that duty can be done.

Of small launches the first place is on the way to everything else. It is taken, found and its K, V and Q are loaded
while the prepare kernel runs, which has waited for all kernels before it, and zeroes counts before it lets this one
start.

Duties wait for tiles before them in the order, and deterministic tiles do. So the first place is taken too: whom one
waits for is then with a CTA that runs, however few of the grid's CTAs run at a time, in whatever order they came.

Deterministic, it also frees the sums that the duty before has read.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Int32, const_expr

from ...planning.backward import TILE_SLOTS, BackwardConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div, minimum
from ..common.tile_ring import end_of, read_tile, write_tile
from .barriers import BarrierId
from .blocks import KeyTile, key_tile_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .duties import (NOTHING, Duty, find_duty, free_sums, no_duty, num_tiles_of, pieces_of_unit, places_of_unit,
                     unit_of)
from .listed import in_listed_order, lengths_of_lane
from .order import rises, rises_in_order
from .place import find_place
from .shares import STORES, Share, share_of
from .workspace import wait_for_count


@cute.jit
def schedule(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines, first: "First"):
    """What the CTA does, then END. first: what `ask_first` returned, where there are queries.

    Runs on: warp 2. Synchronises: waits for the empty halves of the tile ring, and for the load role; behind a place
    that has a duty alone for the counts of its unit; fills the ring.
    """
    producer = pipes.tiles.make_producer()
    if const_expr(cfg.is_deterministic):
        for i in cutlass.range_constexpr(TILE_SLOTS):
            write_tile(smem.sDuties[None, i], no_duty())
    order = in_listed_order(cfg, params, first.lengths) if const_expr(cfg.is_varlen) else params
    num_places, has_queries = num_places_of(cfg, order), params.sequences.rows_q > 0
    index, is_second = cute.arch.block_idx()[0], Boolean(False)
    if has_queries:
        index = cute.arch.shuffle_sync(first.place, 0)
    if const_expr(cfg.is_varlen):
        if index == 0:
            count_left_out(cfg, params, order)
    while index < num_places:
        slot = producer.acquire()
        share = share_at(cfg, order, index, is_second)
        tile, is_there = find_tile(cfg, order, share)
        write_tile(smem.sTiles[None, slot.index], tile)
        duty = duty_of(cfg, order, share, has_queries)
        write_tile(smem.sDuties[None, slot.index], duty)
        if is_there or duty.num_tiles > 0:
            slot.commit()
            producer.advance()
            if const_expr(cfg.is_deterministic):
                free_sums_before(cfg, params, smem, producer)
            cute.arch.barrier(barrier_id=BarrierId.LOADED, number_of_threads=2 * WARP)
            if not is_there:             # until it can be done, others may do the next
                wait_for_count(params.sums.count(0, duty.unit), pieces_of_unit(cfg, params))
        elif duty.unit != NOTHING:       # of rows that are not there: done
            count(params.sums.count(1, duty.unit), duty.num_heads)
        if const_expr(cfg.shares_tiles):
            is_second = not share.is_last
        if is_second:
            pass
        elif has_queries:
            index = take(params)
        else:                            # no prepare kernel was launched, which makes the counter 0
            index += cute.arch.grid_dim()[0]
    slot = producer.acquire_and_advance()
    write_tile(smem.sTiles[None, slot.index], end_of(key_tile_of(cfg)))
    slot.commit()
    if const_expr(cfg.is_deterministic):
        free_sums_before(cfg, params, smem, producer)


@cute.jit
def free_sums_before(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, producer: pipeline.PipelineProducer):
    """Those of the duty before the one that was given last, as soon as all roles are done with it. Here, since the
    watch role adds to dQ by then: nobody in the CTA waits for this role before all of the new tile is loaded.

    producer: where the ring's next entry comes, and the one before the last was.
    """
    free_sums(cfg, params, read_tile(smem.sDuties[None, producer.acquire().index], Duty))


@cute.jit
def num_places_of(cfg: BackwardConfig, params: BwdParams) -> Int32:
    """In the order."""
    num_places = num_tiles_of(params)
    if const_expr(cfg.shares_tiles):
        num_places = params.shares.num_places(num_places)
    return num_places + params.num_behind * params.tail_split


@cute.jit
def share_at(cfg: BackwardConfig, params: BwdParams, index: Int32, is_second: Boolean) -> Share:
    """Which tile is at a place of the order, or which of two parts."""
    if const_expr(cfg.shares_tiles):
        return share_of(params.shares, num_tiles_of(params), index, is_second)
    else:
        return Share(index, 0, 1, STORES, 0, 0, True)


def take(params: BwdParams) -> Int32:
    """How many places were taken before, in the whole grid. Runs on: whole warps."""
    return cute.arch.shuffle_sync(ask_for_place(params), 0)


@cute.jit
def ask_for_place(params: BwdParams) -> Int32:
    """The same, in lane 0, which nobody has waited for. Runs on: whole warps."""
    taken = Int32(0)
    if cute.arch.lane_idx() == 0:
        taken = cute.arch.atomic_add(params.tile_counter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return taken


@dataclass(frozen=True)
class First:
    """What the role asks for before the CTA's barriers are made, and has when they are.

    place     as ask_for_place
    lengths   listed.py; None where they are on the host
    """
    place: Int32
    lengths: Optional[tuple[Int32, Int32]]


def nothing_yet(cfg: BackwardConfig) -> First:
    """Of the other roles."""
    return First(Int32(0), (Int32(0), Int32(0)) if cfg.is_varlen else None)


@cute.jit
def ask_first(cfg: BackwardConfig, params: BwdParams) -> First:
    """Runs on: whole warps."""
    return First(ask_for_place(params), lengths_of_lane(params) if const_expr(cfg.is_varlen) else None)


@cute.jit
def count(counter: cute.Pointer, number: Int32):
    """What has nothing to be seen. Runs on: whole warps."""
    if cute.arch.lane_idx() == 0:
        cute.arch.atomic_add(counter, number, sem="relaxed", scope="gpu")


@cute.jit
def count_left_out(cfg: BackwardConfig, params: BwdParams, order: BwdParams):
    """Of each unit the places that the launch has, and its order has not. Runs on: whole warps."""
    number = cfg.num_reducers * (params.k_blocks.num_blocks - order.k_blocks.num_blocks)
    if number > 0:
        for unit in cutlass.range(cute.arch.lane_idx(), params.sums.num_units(), WARP, unroll=1):
            cute.arch.atomic_add(params.sums.count(0, unit), number, sem="relaxed", scope="gpu")


@cute.jit
def find_tile(cfg: BackwardConfig, params: BwdParams, share: Share) -> tuple[KeyTile, Boolean]:
    """The keys at a place of the order, and whether there are any; those that are not there count as added.

    Runs on: whole warps.
    """
    index, num_tiles = share.tile, num_tiles_of(params)
    at = find_place(cfg, params.sequences, params.k_blocks, params.num_heads_k, params.section,
                    minimum(index, num_tiles - 1), in_sections=cfg.is_causal or cfg.is_deterministic, is_reversed=False)
    n_block, more = at.block, ()
    if const_expr(cfg.has_directions):
        is_rising = params.is_rising
        if const_expr(not cfg.is_deterministic):
            is_rising = rises(index, params.section * places_of_unit(cfg, params))
        else:
            if const_expr(not cfg.is_varlen):
                is_rising *= rises_in_order(minimum(index, num_tiles - 1),
                                            params.section * places_of_unit(cfg, params), num_tiles)
            if is_rising == 1:           # the last keys first
                num_blocks = ceil_div(at.seqlen_k, cfg.tile_n)
                if n_block < num_blocks:     # else behind the last key
                    n_block = num_blocks - 1 - n_block
        more = (is_rising,)
    seqlen_q, seqlen_k = at.seqlen_q, at.seqlen_k
    if n_block * cfg.tile_n >= seqlen_k and index < num_tiles and params.sequences.rows_q > 0:
        num_pieces = cfg.num_reducers * (share.end - share.begin)
        count(params.sums.count(0, unit_of(cfg, params, at.sequence, at.head)), Int32(num_pieces))
    is_there = index < num_tiles and n_block * cfg.tile_n < seqlen_k
    if not is_there:                     # of no keys and no queries: what is loaded, if anything, is not used
        n_block, seqlen_q, seqlen_k = Int32(0), Int32(0), Int32(0)
    if const_expr(cfg.shares_tiles):
        begin, end = share.blocks(params.shares, seqlen_q, cfg.tile_m)
        more = begin, end, share.end - share.begin, share.part, share.first_part, share.end_part
    places = n_block, at.head, at.batch, at.offset_q, seqlen_q, at.offset_k, seqlen_k
    tile = key_tile_of(cfg)(*places, params.q_blocks.first(at.sequence), at.sequence, *more)
    return tile, is_there


@cute.jit
def duty_of(cfg: BackwardConfig, params: BwdParams, share: Share, has_queries: Boolean) -> Duty:
    """Of a place of the order. Runs on: whole warps."""
    duty, has_duty = no_duty(), has_queries and share.tile >= params.num_behind
    if const_expr(cfg.shares_tiles):
        has_duty = has_duty and share.has_duty(params.shares)
    if has_duty:
        duty = find_duty(cfg, params, share.tile)
    return duty
