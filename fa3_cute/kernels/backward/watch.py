"""Watch role: one warp waits until a CTA may finish the Q tiles of its duty (duties.py), and sends what consumers leave
at the end of a tile of keys (outgoing.py)."""
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ...planning.backward import BackwardConfig
from ..common.tile_ring import END, read_tile
from .barriers import BarrierId
from .blocks import KeyTile, key_tile_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .duties import Duty, free_sums, pieces_of_unit, rounds_of
from .outgoing import has_second_half, key_part, key_rows, query_part, query_rows, send, set_free, threads_of
from .reduce import add_in_order
from .workspace import wait_for_count


@cute.jit
def watch(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per place of the order: waits until the tiles of the duty's unit are all added; sends dV and dK of the tile and
    dQ of the duty, as consumers leave them; frees the sums that they have read. Deterministic, it adds to dQ while Q
    tiles pass, and the schedule role frees the sums.

    Runs on: warp 3. Synchronises: reads the tile ring; SUMS, STAGED and FREE, with the consumers.
    """
    tiles, turn = pipes.tiles.make_consumer(), Int32(0) if cfg.is_deterministic else None
    set_free(cfg, 0)
    tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))
    while tile.n_block != END:
        if const_expr(cfg.is_deterministic):
            turn = add_in_order(cfg, params, smem, pipes, tile, turn, 1)
        duty = read_tile(smem.sDuties[None, tiles.wait().index], Duty)
        if duty.num_tiles > 0:
            wait_for_count(params.sums.count(0, duty.unit), pieces_of_unit(cfg, params))
        if const_expr(cfg.shares_tiles):
            params.shares.wait(tile)
        cute.arch.barrier_arrive(barrier_id=BarrierId.SUMS, number_of_threads=threads_of(cfg))
        if tile.seqlen_k > 0:
            send_gradients(cfg, params, smem, tile)
        send_finished(cfg, params, smem, duty, tile.seqlen_k > 0)
        set_free(cfg, 0)
        if const_expr(not cfg.is_deterministic):
            free_sums(cfg, params, duty)
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))


@cute.jit
def send_gradients(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, tile: KeyTile):
    """dV and dK of a tile of keys."""
    all_rows = tuple(key_rows(cfg, tile, w) for w in range(cfg.num_consumer_wgs))
    send(cfg, smem, 0, key_part(cfg), params.dv, all_rows)
    if const_expr(cfg.shares_tiles):     # both are left before dV is in its place
        with cute.arch.elect_one():
            params.shares.tell(tile)
    if const_expr(cfg.is_split and not cfg.is_varlen):
        send_second_half(cfg, params, smem, tile, all_rows)
    elif const_expr(cfg.is_split):
        if has_second_half(cfg, tile):
            send_second_half(cfg, params, smem, tile, all_rows)
        else:
            send(cfg, smem, 1, key_part(cfg), params.dk, all_rows)
    else:
        send(cfg, smem, 1, key_part(cfg), params.dk, all_rows)


def send_second_half(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, tile: KeyTile, first_half: tuple):
    """Of dV, then both of dK: half the keys at a time, at either place."""
    others = tuple(key_rows(cfg, tile, w, 1) for w in range(cfg.num_consumer_wgs))
    send(cfg, smem, 1, key_part(cfg), params.dv, others)
    set_free(cfg, 1)
    send(cfg, smem, 0, key_part(cfg), params.dk, first_half)
    set_free(cfg, 1)
    send(cfg, smem, 1, key_part(cfg), params.dk, others)


@cute.jit
def send_finished(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, duty: Duty, has_keys: Boolean):
    """dQ of a duty, round by round. has_keys: dV and dK come before; else both places are free at the first round, and
    nobody waits for them: a second arrival on FREE would meet consumers that have yet to sync on the one before."""
    place, num_rounds = duty.start(), rounds_of(cfg, duty)
    for i in cutlass.range(0, num_rounds, 2, unroll=1):
        for which in cutlass.range_constexpr(2):
            places = [place] * cfg.num_consumer_wgs
            if const_expr(cfg.is_dq_in_turns):
                places[1] = duty.after(place)
            all_rows = tuple(query_rows(cfg, duty, params.group, at, w) for w, at in enumerate(places))
            if (i + which < num_rounds) & (has_keys | (i + which > 0)):
                set_free(cfg, 1)
            if i + which < num_rounds:
                send(cfg, smem, which, query_part(cfg), params.dq, all_rows)
            place = duty.after(places[-1])
