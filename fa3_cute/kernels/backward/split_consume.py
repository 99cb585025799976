"""Consumers of a kernel whose warpgroups have roles (split.py): a tile of keys from its K and V to its gradients."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.rings import WARPS_PER_WARPGROUP
from ...planning.split import REGISTERS
from ..common.layout import element_type, rounded, unhoisted
from ..common.tile_ring import END, end_of, read_tile
from .blocks import KeyTile, QueryRange, key_tile_of, queries_of
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .consume import pass_first, release_keys, wait_for_tile, walk, walks_of
from .duties import Duty, wait_for_sums
from .finish import finish_all, make_finisher
from .gradients import filled
from .outgoing import Outgoing, has_second_half, key_part, key_rows, wait_until_free
from .shares import share_sums
from .split import BLOCKS_OF_DV, PRODUCTS, QUERIES, SCORES, Columns, make_columns, pass_queries
from .visible import RowMask

MOST_AT_LAUNCH = sum(REGISTERS) // len(REGISTERS)     # registers of a thread before setmaxnreg


@cute.jit
def consume_split(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines):
    """Each warpgroup its role. Runs on: consumer warpgroups."""
    wg_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx() // WARPS_PER_WARPGROUP - 1)
    if wg_idx == SCORES:
        consume_as(cfg, params, mmas, smem, pipes, SCORES)
    elif wg_idx == PRODUCTS:
        consume_as(cfg, params, mmas, smem, pipes, PRODUCTS)
    else:
        consume_as(cfg, params, mmas, smem, pipes, QUERIES)


@cute.jit
def consume_as(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines,
               role: Constexpr[int]):
    """Per tile of keys: the Q tiles of all query heads of the group, as they pass (order.py); then dK and dV.

    Runs on: one consumer warpgroup.
    Synchronises: reads the tile ring; waits for the full halves of the K, V and Q rings, and of those of dO, P and dS
    that the role reads; empties them; fills P, dS or dQ; SUMS, STAGED and FREE, with the watch role.
    """
    registers = REGISTERS[1 + role]
    if const_expr(registers < MOST_AT_LAUNCH):
        cute.arch.setmaxregister_decrease(registers)
    else:
        cute.arch.setmaxregister_increase(registers)
    columns = make_columns(cfg, params, mmas, smem, pipes, role)
    count = turn = Int32(0)      # of tiles of keys, of Q tiles
    num_keys = Int32(0) if cfg.is_varlen else None   # of tiles with K and V, where not all are
    tile = wait_for_tile(cfg, smem, pipes, count)
    while tile.n_block != END:
        if const_expr(not cfg.is_varlen):
            columns.wait_for_keys(tile.seqlen_k, count)
        elif tile.seqlen_k > 0:
            columns.wait_for_keys(tile.seqlen_k - tile.n_block * cfg.tile_n, num_keys)
        turn = pass_all(columns, params, tile, turn, count)
        if const_expr(not cfg.is_varlen):
            release_keys(pipes, count)
        elif read_tile(smem.sTiles[None, count & 1], key_tile_of(cfg)).seqlen_k > 0:
            release_keys(pipes, num_keys)
            num_keys += 1
        leave(columns, params, smem, count, turn)
        with cute.arch.elect_one():
            pipes.tiles.consumer_release(filled(count))
        count += 1
        tile = wait_for_tile(cfg, smem, pipes, count)
    wait_until_free(cfg)


@cute.jit
def pass_all(columns: Columns, params: BwdParams, tile: KeyTile, turn: Int32, count: Int32) -> Int32:
    """The Q tiles that pass a tile of keys, of which the CTA had `count` before; returns turn behind them."""
    cfg, queries = columns.cfg, queries_of(columns.cfg, params.window, tile)
    num_passes = queries.num_passes(params.group)
    columns.acc_dK.fill(0.0)
    for acc in columns.accs_dV:
        acc.fill(0.0)
    if const_expr(columns.role == SCORES):
        turn, num_done = pass_first(columns, params, tile, turn)
        for a_walk in walks_of(cfg):     # bounds are found again for each: there are no registers to keep them
            tile, queries = end_of(key_tile_of(cfg)), QueryRange(*[Int32(0)] * 4)
            if num_passes > 1:           # else all have passed
                tile = read_tile(columns.smem.sTiles[None, count & 1], key_tile_of(cfg))
                queries = queries_of(cfg, params.window, tile)
            mask = RowMask.create(cfg, params.window, tile, columns.tidx)
            turn, num_done = walk(columns, mask, queries, params.group, (turn, num_done), a_walk)
    else:
        wait_until_free(cfg)
        first = Int32(0)
        if const_expr(columns.role == PRODUCTS):
            if num_passes > 0:
                columns.pass_products(turn, used_rows(columns, params, tile, Int32(0)), False)
            first = Int32(1)
        for i in cutlass.range(first, num_passes, unroll=1):
            if const_expr(columns.role == PRODUCTS):
                columns.pass_products(turn + i, used_rows(columns, params, tile, i), True)
            else:
                pass_queries(columns, turn + i, i > 0)
        turn += num_passes
    if num_passes > 0:
        if const_expr(columns.role == QUERIES):
            columns.commit_dQ(cfg.num_dq_wgs * turn - 1)
        else:
            columns.finish(turn - 1)
    return turn


def used_rows(columns: Columns, params: BwdParams, tile: KeyTile, i: Int32) -> Int32:
    """Of the i-th Q tile that passes those that are the sequence's."""
    m_block, _ = queries_of(columns.cfg, params.window, tile).passing(i, params.group, tile.is_rising)
    return tile.seqlen_q - m_block * columns.cfg.tile_m


@cute.jit
def leave(columns: Columns, params: BwdParams, smem: BwdSmem, count: Int32, turn: Int32):
    """dV, dK and the duty's dQ, to the places from which they are sent: half the keys of dV and of dK at a time. What
    the tile and the duty are is read where registers are free for it."""
    cfg, role, element = columns.cfg, columns.role, element_type(columns.cfg)
    thread = unhoisted(columns.tidx)
    out = Outgoing(cfg, smem, Int32(role), thread)
    wait_for_sums(cfg)
    gradients = [(0, block, acc) for block, acc in zip(BLOCKS_OF_DV[role], columns.accs_dV)]
    gradients += [(1, role, columns.acc_dK)]
    if const_expr(cfg.shares_tiles):
        tile = read_tile(smem.sTiles[None, count & 1], key_tile_of(cfg))
        for which, block, acc in gradients:
            share_sums(params.shares, tile, ((which, acc),), 128 * block + thread)
    for i in cutlass.range_constexpr(cute.size(columns.acc_dK)):
        columns.acc_dK[i] = params.scale * columns.acc_dK[i]
    parts = [(which, block, [rounded(half_of(acc, half), element) for half in range(2)])
             for which, block, acc in gradients]
    of_dv, of_dk = ([(block, halves) for which, block, halves in parts if which == gradient] for gradient in range(2))
    duty = read_tile(smem.sDuties[None, count & 1], Duty)
    finisher = make_finisher(cfg, params, columns.mmas.dq_part, out, duty)
    first = finisher.start()
    finisher.read(0, first)
    tile = read_tile(smem.sTiles[None, count & 1], key_tile_of(cfg))
    if tile.seqlen_k > 0:
        stage_half(columns, out, params.dv, of_dv, tile, 0, 0)
        columns.wait_for_dQ_places(turn)
        if const_expr(not cfg.is_varlen):
            stage_half(columns, out, params.dv, of_dv, tile, 1, 1)
        elif has_second_half(cfg, tile):
            stage_half(columns, out, params.dv, of_dv, tile, 1, 1)
        else:
            stage_half(columns, out, params.dk, of_dk, tile, 0, 1)
    if has_second_half(cfg, tile):
        for half in cutlass.range_constexpr(2):
            wait_until_free(cfg)
            stage_half(columns, out, params.dk, of_dk, tile, half, half)
    finisher.read(1, finisher.after(first))
    finish_all(finisher, tile.seqlen_k > 0)


@cute.jit
def stage_half(columns: Columns, out: Outgoing, gradient, blocks: Constexpr[list], tile: KeyTile,
               half: Constexpr[int], place: Constexpr[int]):
    """Half the keys of a role's blocks of a gradient, to a place."""
    cfg, mma = columns.cfg, columns.mmas.dkv_part
    for block, halves in blocks:
        out.write(mma, halves[half], key_part(cfg), place, block, True)
    out.tell(place)
    for block, _ in blocks:
        out.store_rest(key_part(cfg), place, gradient, key_rows(cfg, tile, block, half), block)


def half_of(acc: cute.Tensor, half: int) -> cute.Tensor:
    """The first or the last columns of an accumulator."""
    size = cute.size(acc) // 2
    return cute.make_tensor(acc.iterator + half * size, cute.make_layout(((2, 2, size // 4), 1, 1)))
