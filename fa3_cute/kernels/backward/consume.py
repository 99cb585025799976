"""Consumer role: dK and dV of the CTA's keys, and their part of dQ."""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP, by_name
from ..common.barriers import open_turnstile
from ..common.layout import element_type, rounded, unhoisted
from ..common.tile_ring import END, read_tile
from .blocks import KeyTile, QueryRange, key_tile_of, queries_of
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .duties import Duty, wait_for_sums
from .finish import finish_all, make_finisher
from .gradients import Gradients, clear_unused_rows, filled, make_gradients
from .outgoing import Outgoing, key_part, key_rows, wait_until_free
from .shares import share_sums
from .visible import KeyMask, RowMask

# Of `turn`, where consumers have no register for the number of tiles of keys too: from here on that number's. Of both
# the last two bits are used; fewer than 2^29 Q tiles pass a tile of keys.
COUNT_BIT = 29


@cute.jit
def consume(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines):
    """Per tile of keys: the Q tiles of all query heads of the group, as they pass (order.py); then dK and dV.

    Runs on: consumer warpgroups.
    Synchronises: reads the tile ring; waits for the full halves of the K, V, Q, dO and dS rings; empties them; fills dS
    and dQ; SUMS, STAGED and FREE, with the watch role.
    """
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    wg_idx = cute.arch.make_warp_uniform(tidx // 128)
    gradients = make_gradients(cfg, params, mmas, smem, pipes, tidx, wg_idx)
    open_turnstile(cfg, wg_idx)
    count = turn = Int32(0)      # of tiles of keys, of Q tiles
    num_keys = Int32(0) if cfg.is_varlen else None   # of tiles with K and V, where not all are
    tile = wait_for_tile(cfg, smem, pipes, count)
    while tile.n_block != END:
        gradients.acc_dK.fill(0.0)
        gradients.acc_dV.fill(0.0)
        if const_expr(not cfg.is_varlen):
            wait_for_keys(cfg, smem, pipes, tile, tidx, count)
        elif tile.seqlen_k > 0:
            wait_for_keys(cfg, smem, pipes, tile, tidx, num_keys)
        turn, num_done = pass_first(gradients, params, tile, turn)
        if const_expr(cfg.finds_places_again):
            turn |= count << COUNT_BIT
        walks = walks_of(cfg)
        for i in cutlass.range_constexpr(len(walks)):
            if const_expr(i == 0 or cfg.finds_bounds_again):
                # again: loops are short of registers
                which = turn >> COUNT_BIT if const_expr(cfg.finds_places_again) else count
                tile = read_tile(smem.sTiles[None, which & 1], key_tile_of(cfg))
                queries = queries_of(cfg, params.window, tile)
                mask = KeyMask.create(cfg, params.window, tile, tidx)
            turn, num_done = walk(gradients, mask, queries, params.group, (turn, num_done), walks[i])
        if const_expr(cfg.finds_places_again):
            count, turn = turn >> COUNT_BIT & 3, turn & 3
        tile = read_tile(smem.sTiles[None, count & 1], key_tile_of(cfg))
        queries = queries_of(cfg, params.window, tile)
        if const_expr(cfg.is_dq_behind):
            if queries.m_block_max > queries.m_block_min:
                if const_expr(not cfg.is_dq_in_turns):
                    gradients.finish_dQ(turn - 1)
                elif gradients.has_turn(turn - 1):
                    gradients.finish_dQ(turn - 1)
        if const_expr(not cfg.is_varlen):
            release_keys(pipes, count)
        elif tile.seqlen_k > 0:
            release_keys(pipes, num_keys)
            num_keys += 1
        leave(gradients, params, tile, read_tile(smem.sDuties[None, count & 1], Duty), turn)
        with cute.arch.elect_one():
            pipes.tiles.consumer_release(filled(count))
        count += 1
        tile = wait_for_tile(cfg, smem, pipes, count)
    wait_until_free(cfg)


@cute.jit
def pass_first(gradients: Gradients, params: BwdParams, tile: KeyTile, turn: Int32) -> tuple[Int32, Int32]:
    """The first Q tile, where it has no dQ of the one before; returns turn behind it, and how many have passed."""
    cfg, num_done = gradients.cfg, Int32(0)
    queries = queries_of(cfg, params.window, tile)
    has_queries = queries.m_block_max > queries.m_block_min
    if const_expr(cfg.is_dq_behind):
        if has_queries:
            mask = mask_of(cfg, params, tile, gradients.tidx)
            gradients.start_head(tile.kv_head * params.group, tile.sequence)
            m_block, _ = queries.passing(0, params.group, tile.is_rising)
            gradients.step_behind(mask, m_block, turn, is_masked=True, has_dq=False, is_first=True)
            turn, num_done = turn + 1, Int32(1)
        else:
            wait_until_free(cfg)
    else:
        wait_until_free(cfg)
    return turn, num_done


def mask_of(cfg, params, tile, tidx):
    """Of a consumer thread."""
    return (RowMask if cfg.is_split else KeyMask).create(cfg, params.window, tile, tidx)


@cute.jit
def leave(gradients: Gradients, params: BwdParams, tile: KeyTile, duty: Duty, turn: Int32):
    """dV and dK, if there are keys, and the duty's dQ, whose first sums come meanwhile, to the places from which they
    are sent."""
    cfg, mmas, wg_idx = gradients.cfg, gradients.mmas, gradients.wg_idx
    out = Outgoing(cfg, gradients.smem, wg_idx, unhoisted(gradients.tidx) % 128)
    wait_for_sums(cfg)
    if const_expr(cfg.shares_tiles):
        accs = (0, gradients.acc_dV), (1, gradients.acc_dK)
        share_sums(params.shares, tile, accs, unhoisted(gradients.tidx))
    finisher = make_finisher(cfg, params, mmas.dq_part, out, duty)
    first, rows = finisher.start(), key_rows(cfg, tile, wg_idx)
    finisher.read(0, first)
    if tile.seqlen_k > 0:
        out.stage(mmas.dkv_part, rounded(gradients.acc_dV, element_type(cfg)), key_part(cfg), 0, params.dv, rows, False)
    finisher.read(1, finisher.after(first))
    if tile.seqlen_k > 0:
        for i in cutlass.range_constexpr(cute.size(gradients.acc_dK)):
            gradients.acc_dK[i] = params.scale * gradients.acc_dK[i]
        gradients.wait_for_dQ_place(turn)
        out.stage(mmas.dkv_part, rounded(gradients.acc_dK, element_type(cfg)), key_part(cfg), 1, params.dk, rows, False)
    finish_all(finisher, tile.seqlen_k > 0)


@cute.jit
def wait_for_tile(cfg: BackwardConfig, smem: BwdSmem, pipes: BwdPipelines, count: Int32) -> KeyTile:
    """The CTA's tile of that number."""
    pipes.tiles.consumer_wait(filled(count))
    return read_tile(smem.sTiles[None, count & 1], key_tile_of(cfg))


@cute.jit
def wait_for_keys(cfg: BackwardConfig, smem: BwdSmem, pipes: BwdPipelines, tile: KeyTile, tidx: Int32, count: Int32):
    """Until K and V are there; rows behind the sequence's last are zeroed, as TMA does behind the tensor's."""
    for pipe in (pipes.v, pipes.k):
        pipe.consumer_wait(pipeline.PipelineState(1, count, Int32(0), count & 1))
    if const_expr(cfg.is_varlen):
        slots = smem.sK[None, None, 0], smem.sV[None, None, 0]
        clear_unused_rows(cfg, slots, tile.seqlen_k - tile.n_block * cfg.tile_n, tidx)


def release_keys(pipes: BwdPipelines, number: Int32):
    """K and V, of that number among those that were loaded."""
    for pipe in (pipes.v, pipes.k):
        pipe.consumer_release(pipeline.PipelineState(1, number, Int32(0), number & 1))


def walks_of(cfg: BackwardConfig) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """One after the other: (kind of QueryRange.of_kind, is_rising of the tiles of keys that have this walk)."""
    if cfg.has_directions:
        return (2, (1,)), (1, (0, 1)), (2, (0,))
    return tuple((kind, (0,)) for kind in range(0 if cfg.is_local else 1, 3))


@cute.jit
def walk(gradients: Gradients, mask: KeyMask, queries: QueryRange, group: Int32, where: tuple[Int32, Int32],
         kind_and_rising: Constexpr[tuple]):
    """The Q tiles of a walk of walks_of, of all heads of the group, in the order of QueryRange.passing.

    where: (turn, heads of the first tile that have passed already); returns what they are after these.
    """
    kind, rising = kind_and_rising
    turn, num_done = where
    begin, end = queries.of_kind(kind)
    m_block, left, direction = end - 1, None, -1
    if const_expr(gradients.cfg.has_directions):
        is_rising = mask.tile.is_rising
        if is_rising == 1:
            m_block = begin
        direction = 2 * is_rising - 1
        if const_expr(len(rising) == 1):
            direction = 2 * rising[0] - 1
            end = end if is_rising == rising[0] else begin
        left = end - begin
    while m_block >= begin if const_expr(not gradients.cfg.has_directions) else left > 0:
        for of_group in cutlass.range(num_done if gradients.cfg.is_dq_behind else 0, group, unroll=1):
            gradients.start_head(mask.tile.kv_head * group + of_group, mask.tile.sequence)
            step(gradients, mask, m_block, turn, kind != 1)
            turn += 1
        if const_expr(gradients.cfg.is_dq_behind):
            num_done = Int32(0)
        m_block += direction
        if const_expr(gradients.cfg.has_directions):
            left -= 1
    return turn, num_done


@cute.jit
def step(gradients: Gradients, mask: KeyMask, m_block: Int32, turn: Int32, is_masked: Constexpr[bool]):
    """One Q tile, as the config has it."""
    if const_expr(not gradients.cfg.is_dq_behind):
        gradients.step(mask, m_block, turn, is_masked)
    elif const_expr(not gradients.cfg.is_dq_in_turns):
        gradients.step_behind(mask, m_block, turn, is_masked, has_dq=True)
    elif gradients.has_turn(turn - 1):
        gradients.step_behind(mask, m_block, turn, is_masked, has_dq=True)
    else:
        gradients.step_behind(mask, m_block, turn, is_masked, has_dq=False)
