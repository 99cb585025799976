"""Schedule role: one warp takes tiles of keys for its CTA and puts them into the tile ring, from which the others read.

A CTA starts with the tile of its own number and then takes the next one that nobody has taken. Taken as late as the
ring allows: in rising order, and none waits long for its CTA, which those of later numbers may do, if deterministic.
"""
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ...planning.backward import BackwardConfig
from .blocks import KeyTile
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .order import heads_per_section, key_tile

END = -1        # n_block of the entry after the last tile
TILE_INTS = len(KeyTile.__dataclass_fields__)
ENTRY_INTS = -(-TILE_INTS // 4) * 4      # whole 16-byte words


@cute.jit
def schedule(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """The CTA's tiles, then END.

    Runs on: warp 2. Synchronises: waits for the empty halves of the tile ring; fills it.
    """
    producer = pipes.tiles.make_producer()
    index, num_tiles = cute.arch.block_idx()[0], params.k_blocks.num_blocks * params.num_heads_k
    while index < num_tiles:
        tile, is_there = find_tile(cfg, params, index)
        if is_there:
            slot = producer.acquire_and_advance()
            write_tile(smem.sTiles[None, slot.index], tile)
            slot.commit()
            producer.acquire()
        if params.sequences.rows_q > 0:
            taken = Int32(0)
            if cute.arch.lane_idx() == 0:
                taken = cute.arch.atomic_add(params.tile_counter.iterator, Int32(1), sem="relaxed", scope="gpu")
            index = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(taken, 0)
        else:                            # no prepare kernel was launched, which makes the counter 0
            index += cute.arch.grid_dim()[0]
    slot = producer.acquire_and_advance()
    write_tile(smem.sTiles[None, slot.index], KeyTile(Int32(END), *[Int32(0)] * (TILE_INTS - 1)))
    slot.commit()


@cute.jit
def find_tile(cfg: BackwardConfig, params: BwdParams, index: Int32) -> tuple[KeyTile, Boolean]:
    """The keys at a place of the global order, and whether there are any. Runs on: whole warps."""
    group, seqlen_q, seqlen_k = params.group, params.sequences.rows_q, params.sequences.rows_k
    if const_expr(cfg.is_varlen):
        head = index // params.k_blocks.num_blocks
        block = index - head * params.k_blocks.num_blocks
        if const_expr(cfg.is_deterministic):
            block = params.k_blocks.num_blocks - 1 - block
        sequence = params.k_blocks.find(block)
        offset_q, seqlen_q, offset_k, seqlen_k = params.sequences.place(sequence)
        n_block = block - params.k_blocks.first(sequence)
        batch = params.sequences.batch_coordinate(sequence)
        first_q_block = params.q_blocks.first(sequence)
        tile = KeyTile(n_block, head, batch, offset_q, seqlen_q, offset_k, seqlen_k, first_q_block, sequence)
    else:
        num_heads = params.num_heads_k * params.sequences.batch_size
        num_blocks = params.k_blocks.num_blocks // params.sequences.batch_size
        section = heads_per_section(num_heads, group, seqlen_q, cfg.head_dim, num_blocks)
        n_block, any_head = key_tile(cfg.is_causal, index, num_blocks, num_heads, section)
        if const_expr(cfg.is_deterministic):
            n_block = num_blocks - 1 - n_block
        batch = any_head // params.num_heads_k
        head, first_q_block = any_head - batch * params.num_heads_k, params.q_blocks.first(batch)
        tile = KeyTile(n_block, head, batch, Int32(0), seqlen_q, Int32(0), seqlen_k, first_q_block, batch)
    return tile, tile.n_block * cfg.tile_n < tile.seqlen_k


@cute.jit
def write_tile(sTile: cute.Tensor, tile: KeyTile):
    """A tile, the same on every lane of the warp, to its slot."""
    if cute.arch.lane_idx() == 0:
        entry = [getattr(tile, name) for name in KeyTile.__dataclass_fields__]
        for i in cutlass.range_constexpr(TILE_INTS):
            sTile[i] = entry[i]
    cute.arch.sync_warp()


@cute.jit
def read_tile(sTile: cute.Tensor) -> KeyTile:
    """The tile in a slot."""
    entry = cute.make_rmem_tensor(ENTRY_INTS, Int32)
    cute.autovec_copy(sTile, entry)
    return KeyTile(*(entry[i] for i in range(TILE_INTS)))
