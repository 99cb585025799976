"""Schedule role: one warp takes tiles of keys for its CTA and puts them into the tile ring, from which the others read.

A CTA starts with the tile of its own number and then takes the next one that nobody has taken, when it has loaded the
last Q tile of the one before: a tile that is taken starts at once. One that waited for its CTA would hold up all that
come after it in the order, if deterministic, and leave CTAs idle at the end of a launch.

Deterministic, a tile waits for those before it in the order. So the first one is taken too: whom a tile waits for is
then with a CTA that runs, however few of the grid's CTAs run at a time, in whatever order they came.
"""
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div
from ..common.tile_ring import end_of, write_tile
from .barriers import BarrierId
from .blocks import KeyTile, key_tile_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .order import MIN_TILES, heads_apart, heads_in_waves, heads_per_section, rises, rows_in_l2
from .place import find_place


@cute.jit
def schedule(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """The CTA's tiles, then END.

    Runs on: warp 2. Synchronises: waits for the empty halves of the tile ring, and for the load role; fills it.
    """
    producer = pipes.tiles.make_producer()
    index, num_given = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    num_tiles = params.k_blocks.num_blocks * params.num_heads_k
    if const_expr(cfg.is_deterministic):
        if params.sequences.rows_q > 0:
            index, num_given = take(params), Int32(0)
    while index < num_tiles:
        tile, is_there = find_tile(cfg, params, index)
        if is_there:
            slot = producer.acquire_and_advance()
            write_tile(smem.sTiles[None, slot.index], tile)
            slot.commit()
            cute.arch.barrier(barrier_id=BarrierId.LOADED, number_of_threads=2 * WARP)
        if params.sequences.rows_q > 0:
            index = num_given + take(params)
        else:                            # no prepare kernel was launched, which makes the counter 0
            index += cute.arch.grid_dim()[0]
    slot = producer.acquire_and_advance()
    write_tile(smem.sTiles[None, slot.index], end_of(key_tile_of(cfg)))
    slot.commit()


@cute.jit
def take(params: BwdParams) -> Int32:
    """How many tiles were taken before, in the whole grid. Runs on: whole warps."""
    taken = Int32(0)
    if cute.arch.lane_idx() == 0:
        taken = cute.arch.atomic_add(params.tile_counter.iterator, Int32(1), sem="relaxed", scope="gpu")
    return cute.arch.shuffle_sync(taken, 0)


@cute.jit
def find_tile(cfg: BackwardConfig, params: BwdParams, index: Int32) -> tuple[KeyTile, Boolean]:
    """The keys at a place of the global order, and whether there are any. Runs on: whole warps."""
    section, is_rising = None, Int32(0)
    if const_expr(not cfg.is_varlen):
        section, is_rising = section_of(cfg, params, index)
    at = find_place(cfg, params.sequences, params.k_blocks, (params.num_heads_k, params.group), index,
                    in_sections=cfg.is_causal or cfg.is_deterministic, is_reversed=False, section=section)
    n_block = at.block
    if const_expr(cfg.has_directions and cfg.is_deterministic):
        if is_rising == 1:               # the last keys first
            n_block = params.k_blocks.num_blocks // params.sequences.batch_size - 1 - n_block
    places = n_block, at.head, at.batch, at.offset_q, at.seqlen_q, at.offset_k, at.seqlen_k
    direction = (is_rising,) if const_expr(cfg.has_directions) else ()
    tile = key_tile_of(cfg)(*places, params.q_blocks.first(at.sequence), at.sequence, *direction)
    return tile, tile.n_block * cfg.tile_n < tile.seqlen_k


@cute.jit
def section_of(cfg: BackwardConfig, params: BwdParams, index: Int32) -> tuple[Int32, Int32]:
    """Of a dense batch: (heads of a section, whether the first queries pass first the tile at this place).

    Deterministic, neither depends on the number of CTAs: dq has the same bits on a part of a GPU.
    """
    heads, num_ctas = params.num_heads_k * params.sequences.batch_size, cute.arch.grid_dim()[0]
    num_blocks, rows_q = params.k_blocks.num_blocks // params.sequences.batch_size, params.sequences.rows_q
    is_rising = Int32(0)
    if const_expr(not cfg.is_deterministic):
        section = heads_in_waves(heads, num_blocks, num_ctas)
        if const_expr(cfg.has_directions):
            is_rising = rises(index, section * num_blocks, num_ctas)
    else:
        section = heads_in_waves(heads, num_blocks, MIN_TILES)
        if const_expr(cfg.has_directions):
            is_rising = Int32(1)
        if const_expr(cfg.mask != "full"):
            if not cfg.has_directions or section * params.group * rows_q > rows_in_l2(cfg.head_dim):
                least = heads_apart(params.group, ceil_div(rows_q, cfg.tile_m), MIN_TILES, cfg.is_causal)
                section = heads_per_section(heads, params.group, rows_q, cfg.head_dim, num_blocks, least)
                is_rising = Int32(0)
    return section, is_rising
