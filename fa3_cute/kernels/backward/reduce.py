"""Reduce role: one warp adds the warpgroups' parts of dQ to global memory, one bulk reduction each, in FP32 (PTX ISA,
"cp.reduce.async.bulk"). Deterministic, two warps do, in the order in which CTAs take their keys.

Before the first of a tile's are added, the unit whose slot its sums take must be finished; when all are, the tile's
unit has one more: of each warp, where there are two, and of a tile that is shared its pieces.
"""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig
from ..common.arithmetic import minimum
from ..common.tile_ring import END, read_tile
from .blocks import KeyTile, QueryRange, first_key_block, key_tile_of, last_key_block, queries_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .duties import pieces_of, places_of_unit, unit_of
from .gradients import filled
from .workspace import add_to_count, wait_for_count


@cute.jit
def reduce_dq(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per tile of keys: what consumers leave of dQ of the Q tiles that pass, or in order what one warpgroup does.

    Runs on: warp 1. Synchronises: reads the tile ring; waits for the full halves of the dQ ring; empties it as soon as
    it is read.
    """
    consumer = pipes.dq.make_consumer()
    turn = Int32(0) if cfg.is_deterministic or cfg.is_split else None
    tiles = pipes.tiles.make_consumer()
    tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))
    while tile.n_block != END:
        if const_expr(cfg.is_deterministic):
            turn = add_in_order(cfg, params, smem, pipes, tile, turn, 0)
        elif const_expr(cfg.is_split):
            turn = add_split(cfg, params, smem, pipes, tile, turn)
        else:
            consumer = add_all(cfg, params, smem, consumer, tile)
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))


@cute.jit
def add_all(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, consumer: pipeline.PipelineConsumer, tile: KeyTile
            ) -> pipeline.PipelineConsumer:
    """The parts of all warpgroups, as they come; returns where the consumer is behind them."""
    queries = queries_of(cfg, params.window, tile)
    num_passes = queries.num_passes(params.group)
    unit = unit_of(cfg, params, tile.sequence, tile.kv_head)
    if num_passes > 0:
        wait_for_slot(cfg, params, unit)
    for i in cutlass.range(num_passes, unroll=1):
        target = target_of(cfg, params, tile, unit, queries.passing(i, params.group, tile.is_rising))
        for w in cutlass.range_constexpr(cfg.num_dq_wgs):
            part = consumer.wait_and_advance()
            source = smem.sdQ[None, part.index if const_expr(cfg.is_dq_in_turns) else w]
            with cute.arch.elect_one():
                add_part(cfg, target, source, w)
            with cute.arch.elect_one():
                part.release()
    count_as_added(params, tile, unit, pieces_of(cfg, tile))
    return consumer


@cute.jit
def add_split(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines, tile: KeyTile, turn: Int32
              ) -> Int32:
    """The parts that the queries role leaves one after the other (split.py), two of them on their way at a time.

    turn: Q tiles that have passed the CTA before; returns those after these.
    """
    queries, unit = queries_of(cfg, params.window, tile), unit_of(cfg, params, tile.sequence, tile.kv_head)
    num_passes = queries.num_passes(params.group)
    if num_passes > 0:
        wait_for_slot(cfg, params, unit)
    for i in cutlass.range(num_passes, unroll=1):
        target = target_of(cfg, params, tile, unit, queries.passing(i, params.group, tile.is_rising))
        for w in cutlass.range(cfg.num_dq_wgs, unroll=1):
            number = (turn + i) * cfg.num_dq_wgs + w
            pipes.dq.consumer_wait(filled(number))
            with cute.arch.elect_one():
                start_part(cfg, target, smem.sdQ[None, number & 1], w)
                if i + w > 0:
                    cute.arch.cp_async_bulk_wait_group(1, read=True)
                    pipes.dq.consumer_release(filled(number - 1))
    if num_passes > 0:
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            pipes.dq.consumer_release(filled((turn + num_passes) * cfg.num_dq_wgs - 1))
    count_as_added(params, tile, unit, pieces_of(cfg, tile))
    return turn + num_passes


@cute.jit
def add_in_order(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines, tile: KeyTile,
                 turn: Int32, w: Constexpr[int]) -> Int32:
    """The parts of warpgroup w, each when the CTAs of the keys before these have added theirs. Two warps do this, one
    for each warpgroup: on its way to the next CTA a turn waits until what was added has arrived, longer than a
    warpgroup takes to compute another part.

    turn: Q tiles that have passed the CTA before; returns those after these.
    """
    queries, unit = queries_of(cfg, params.window, tile), unit_of(cfg, params, tile.sequence, tile.kv_head)
    num_passes = queries.num_passes(params.group)
    first, step = Int32(0), 1
    if const_expr(cfg.is_dq_in_turns):
        first, step = (turn + w) % 2, 2
    if num_passes > 0:
        wait_for_slot(cfg, params, unit)
    num_free = Int32(0)
    for i in cutlass.range(first, num_passes, step, unroll=1):
        if num_free <= i:
            num_free = wait_for_turn(cfg, params, tile, queries, i, step)
        part = pipeline.PipelineState(cfg.num_consumer_wgs, turn + i, Int32(w), (turn + i) // step % 2)
        pipes.dq.consumer_wait(part)
        passing = queries.passing(i, params.group, tile.is_rising)
        of_part = 0 if const_expr(cfg.is_dq_in_turns) else w
        target = target_of(cfg, params, tile, unit, passing)
        with cute.arch.elect_one():
            add_part(cfg, target, smem.sdQ[None, w], of_part)
            pipes.dq.consumer_release(part)
            pass_on(counter_of(params, tile, passing))
    count_as_added(params, tile, unit, pieces_of(cfg, tile))
    return turn + num_passes


@cute.jit
def target_of(cfg: BackwardConfig, params: BwdParams, tile: KeyTile, unit: Int32, passing: tuple[Int32, Int32]
              ) -> cute.Tensor:
    """The sums of a Q tile that passes."""
    m_block, of_group = passing
    if const_expr(cfg.is_varlen):
        m_block += tile.first_q_block
    return params.sums.parts[None, m_block, of_group, params.sums.slot(unit)]


@cute.jit
def count_as_added(params: BwdParams, tile: KeyTile, unit: Int32, pieces: Int32 | int):
    """Of a tile's pieces so many, once they are."""
    if params.sequences.rows_q > 0:
        if tile.seqlen_k > 0:
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=False)
                add_to_count(params.sums.count(0, unit), pieces)


@cute.jit
def wait_for_slot(cfg: BackwardConfig, params: BwdParams, unit: Int32):
    """Until the unit that had it before has been finished, and its zeros are visible to what is added."""
    before = unit - params.sums.num_slots
    if before >= 0:
        wait_for_count(params.sums.count(1, before), places_of_unit(cfg, params) * params.group)
        cute.arch.sync_warp()
        cute.arch.fence_proxy("async.global")


def counter_of(params: BwdParams, tile: KeyTile, passing: tuple[Int32, Int32]) -> cute.Pointer:
    """Where it stands how many parts CTAs have added to a Q tile that passes."""
    m_block, of_group = passing
    block, head = tile.first_q_block + m_block, tile.kv_head * params.group + of_group
    return params.order[None, block, head].iterator


def add_part(cfg: BackwardConfig, target: cute.Tensor, source: cute.Tensor, w: int):
    """A warpgroup's part of a block of dQ; until it is read. Runs on: a thread."""
    start_part(cfg, target, source, w)
    cute.arch.cp_async_bulk_wait_group(0, read=True)


def start_part(cfg: BackwardConfig, target: cute.Tensor, source: cute.Tensor, w: Int32 | int):
    """The same, left on its way."""
    primitives.cp_reduce_async_bulk_global_shared_cta(
        (target.iterator + w * cfg.dq_part).llvm_ptr, source.iterator.llvm_ptr, 4 * cfg.dq_part,
        op=primitives.CpReduceOp.ADD, type=primitives.CpReduceType.F32)
    cute.arch.cp_async_bulk_commit_group()


@cute.jit
def wait_for_turn(cfg: BackwardConfig, params: BwdParams, tile: KeyTile, queries: QueryRange, i: Int32,
                  step: Constexpr[int]) -> Int32:
    """Until all CTAs of the keys before these have added to the i-th Q tile; for how many of those that pass, from the
    first on, this is known to be so, of every step-th.

    Each lane looks at another tile: a CTA that runs well behind the one before it looks once for 32 of them. The lane
    that adds next, by the async proxy, comes after what all of them have acquired.
    """
    num_free, last = Int32(0), queries.num_passes(params.group) - 1
    while num_free <= i:
        at = minimum(i + step * cute.arch.lane_idx(), last)
        passing = queries.passing(at, params.group, tile.is_rising)
        first = first_key_block(cfg, params.window, passing[0], tile.seqlen_q, tile.seqlen_k)
        num_before = tile.n_block - first
        if const_expr(cfg.has_directions):
            if tile.is_rising == 1:
                num_before = last_key_block(cfg, passing[0], tile.seqlen_q, tile.seqlen_k) - tile.n_block
        added = cute.arch.load(counter_of(params, tile, passing), Int32, sem="acquire", scope="gpu")
        missing = ~cute.arch.vote_ballot_sync(added >= cfg.num_dq_wgs * num_before)
        # the lanes before the first that misses some
        num_free = i + step * cute.arch.popc((missing & -missing) - 1)
    cute.arch.sync_warp()
    cute.arch.fence_proxy("async.global")
    return num_free


@cute.jit
def pass_on(counter: cute.Pointer):
    """To the next CTA, once what this thread has sent is added, not only read. Runs on: a thread."""
    cute.arch.cp_async_bulk_wait_group(0, read=False)
    cute.arch.red(counter, Int32(1), op="add", dtype="s32", sem="release", scope="gpu")
