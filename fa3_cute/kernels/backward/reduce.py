"""Reduce role: one warp adds the warpgroups' parts of dQ to global memory, one bulk reduction each."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig
from ..common.arithmetic import minimum
from ..common.tile_ring import END, read_tile
from .blocks import KeyTile, QueryRange, first_key_block, key_tile_of, last_key_block, queries_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .duties import pieces_of, places_of_unit, unit_of
from .workspace import add_to_count, wait_for_count


@cute.jit
def reduce_dq(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per Q tile and warpgroup: its part from shared memory, added in FP32 (PTX ISA, "cp.reduce.async.bulk").

    Deterministic: the CTAs add to a block in the order in which they take their keys. A turn is passed on a Q tile
    later, when what was added has long arrived, or before the CTA waits for its own.

    When all of a tile is added, its unit has one more, or its pieces more where tiles are shared; before the first of
    it is, whose slot its sums take must be finished.

    Runs on: warp 1. Synchronises: reads the tile ring; waits for the full halves of the dQ ring; empties it as soon as
    it is read.
    """
    consumer = pipes.dq.make_consumer()
    tiles = pipes.tiles.make_consumer()
    tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))
    while tile.n_block != END:
        queries = queries_of(cfg, params.window, tile)
        num_passes, num_free, num_passed = queries.num_passes(params.group), Int32(0), Int32(0)
        unit = unit_of(cfg, params, tile.sequence, tile.kv_head)
        if num_passes > 0:
            wait_for_slot(cfg, params, unit)
        for i in cutlass.range(num_passes, unroll=1):
            if const_expr(cfg.is_deterministic):
                if num_free <= i:
                    num_passed = pass_turns(params, tile, queries, (num_passed, i), 0)
                    num_free = wait_for_turn(cfg, params, tile, queries, i)
            m_block, of_group = queries.passing(i, params.group, tile.is_rising)
            if const_expr(cfg.is_varlen):
                m_block += tile.first_q_block
            target = params.sums.parts[None, m_block, of_group, params.sums.slot(unit)]
            for w in cutlass.range_constexpr(cfg.num_dq_wgs):
                part = consumer.wait_and_advance()
                slot = part.index if const_expr(cfg.is_dq_in_turns) else w
                add_part(cfg, target, smem.sdQ[None, slot], w)
                with cute.arch.elect_one():
                    part.release()
            if const_expr(cfg.is_deterministic):
                num_passed = pass_turns(params, tile, queries, (num_passed, i), cfg.num_dq_wgs)
        if const_expr(cfg.is_deterministic):
            pass_turns(params, tile, queries, (num_passed, num_passes), 0)
        if params.sequences.rows_q > 0:
            if tile.seqlen_k > 0:
                with cute.arch.elect_one():
                    cute.arch.cp_async_bulk_wait_group(0, read=False)
                    add_to_count(params.sums.count(0, unit), pieces_of(cfg, tile))
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))


@cute.jit
def wait_for_slot(cfg: BackwardConfig, params: BwdParams, unit: Int32):
    """Until the unit that had it before has been finished, and its zeros are visible to what is added."""
    before = unit - params.sums.num_slots
    if before >= 0:
        wait_for_count(params.sums.count(1, before), places_of_unit(cfg, params) * params.group)
        cute.arch.sync_warp()
        cute.arch.fence_proxy("async.global")


def place_of(params: BwdParams, tile: KeyTile, queries: QueryRange, i: Int32) -> tuple[Int32, Int32]:
    """(block, head) of the i-th Q tile that passes."""
    m_block, of_group = queries.passing(i, params.group, tile.is_rising)
    return tile.first_q_block + m_block, tile.kv_head * params.group + of_group


@cute.jit
def add_part(cfg: BackwardConfig, target: cute.Tensor, source: cute.Tensor, w: int):
    """A warpgroup's part of a block of dQ; until it is read."""
    with cute.arch.elect_one():
        primitives.cp_reduce_async_bulk_global_shared_cta(
            (target.iterator + w * cfg.dq_part).llvm_ptr, source.iterator.llvm_ptr, 4 * cfg.dq_part,
            op=primitives.CpReduceOp.ADD, type=primitives.CpReduceType.F32)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def wait_for_turn(cfg: BackwardConfig, params: BwdParams, tile: KeyTile, queries: QueryRange, i: Int32) -> Int32:
    """Until all CTAs of the keys before these have added to the i-th Q tile; for how many of those that pass, from the
    first on, this is known to be so.

    Each lane looks at another tile: a CTA that runs well behind the one before it looks once for 32 of them. The lane
    that adds next, by the async proxy, comes after what all of them have acquired.
    """
    num_free, last = Int32(0), queries.num_passes(params.group) - 1
    while num_free <= i:
        at = minimum(i + cute.arch.lane_idx(), last)
        block, head = place_of(params, tile, queries, at)
        m_block, _ = queries.passing(at, params.group, tile.is_rising)
        first = first_key_block(cfg, params.window, m_block, tile.seqlen_q, tile.seqlen_k)
        num_before = tile.n_block - first
        if const_expr(cfg.has_directions):
            if tile.is_rising == 1:
                num_before = last_key_block(cfg, m_block, tile.seqlen_q, tile.seqlen_k) - tile.n_block
        taken = cute.arch.load(params.order[None, block, head].iterator, Int32, sem="acquire", scope="gpu")
        missing = ~cute.arch.vote_ballot_sync(taken == num_before)
        num_free = i + cute.arch.popc((missing & -missing) - 1)      # the lanes before the first that misses some
    cute.arch.sync_warp()
    cute.arch.fence_proxy("async.global")
    return num_free


@cute.jit
def pass_turns(params: BwdParams, tile: KeyTile, queries: QueryRange, turns: tuple[Int32, Int32],
               num_later: Constexpr[int]) -> Int32:
    """Of the Q tiles [begin, end), of which there is one at most, once all parts but the last num_later are added, not
    only read: what the next CTA adds comes after them. Returns end."""
    begin, end = turns
    if begin < end:
        block, head = place_of(params, tile, queries, begin)
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_wait_group(num_later, read=False)
            cute.arch.fence_acq_rel_gpu()
            cute.arch.atomic_add(params.order[None, block, head].iterator, Int32(1), sem="relaxed", scope="gpu")
    return end
