"""Transpose role of FP8: V tiles as TMA brings them -> V^T tiles as the PV GEMM reads them.

The forward kernel has warps for it, which go from ring to ring. In the decode kernel, which mostly waits for memory,
the consumers do it within the V ring.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.config import FIRST_TRANSPOSE_WARP, NUM_TRANSPOSE_WARPS, DecodeConfig, FwdConfig
from ..common.barriers import sync_warpgroup
from ..common.block_range import block_range
from ..common.layout import unhoisted
from .bundles import FwdParams, FwdPipelines, FwdSmem
from ..common.tiles import TileReader
from ..common.transpose import BLOCK_COLUMNS, BLOCK_KEYS, read_block, rows_of_lane, write_block


@cute.jit
def transpose(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Every V tile of every tile of O, in the order of the V ring.

    Runs on: the transpose warps. Synchronises: reads the tile ring; waits for the full half of the V ring and the empty
    half of the V^T ring; empties the first, fills the second.
    """
    thread = cute.arch.thread_idx()[0] - 32 * FIRST_TRANSPOSE_WARP
    v_consumer, vt_producer = pipes.v.make_consumer(), pipes.vt.make_producer()
    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        tile = reader.tile
        blocks = block_range(cfg, params.window, tile.m_block, tile.seqlen_q, tile.seqlen_k)
        num_used = tile.seqlen_k - (blocks.n_block_max - 1) * cfg.tile_n
        for i in cutlass.range(blocks.n_block_max - blocks.n_block_min, unroll=1):
            v = v_consumer.wait_and_advance()
            slot_V = smem.sV[None, None, v.index]
            if const_expr(cfg.is_varlen):
                if i == 0 and num_used < cfg.tile_n:
                    clear_share(cfg, slot_V, num_used, unhoisted(thread))
            vt = vt_producer.acquire_and_advance()
            transpose_tile(cfg, slot_V, smem.sVt[None, None, vt.index], unhoisted(thread))
            cute.arch.fence_view_async_shared()      # ordinary stores before the async proxy's reads
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                vt.commit()
            v.release()
        reader.advance()


@cute.jit
def transpose_tile(cfg: FwdConfig, slot_V: cute.Tensor, slot_Vt: cute.Tensor, thread: Int32):
    """One warp's share of a tile."""
    share = Share.of(cfg, thread, NUM_TRANSPOSE_WARPS)
    V, Vt = rows_of_lane(slot_V, slot_Vt, thread % 32, share.first_key, share.first_column)
    for key, column in share.places:
        write_block(Vt, key, column, read_block(V, key, column))


@cute.jit
def transpose_in_place(cfg: DecodeConfig, slot_V: cute.Tensor, slot_Vt: cute.Tensor, tidx: Int32):
    """A V slot becomes a V^T slot: every warp reads its share before any writes.

    Runs on: the consumer warpgroup. Synchronises: its four warps, twice.
    """
    share = Share.of(cfg, tidx, num_warps=4)
    V, Vt = rows_of_lane(slot_V, slot_Vt, tidx % 32, share.first_key, share.first_column)
    blocks = [read_block(V, key, column) for key, column in share.places]
    sync_warpgroup(0)
    for i in cutlass.range_constexpr(len(share.places)):
        write_block(Vt, *share.places[i], blocks[i])
    cute.arch.fence_view_async_shared()
    sync_warpgroup(0)


@cute.jit
def clear_share(cfg: FwdConfig, slot_V: cute.Tensor, num_used: Int32, thread: Int32):
    """Zero the rows of a warp's share of a V tile from num_used on (mainloop.clear_unused_rows says why).

    Each lane zeroes what it addresses for ldmatrix: no warp waits for another.
    """
    share = Share.of(cfg, thread, NUM_TRANSPOSE_WARPS)
    V, _ = rows_of_lane(slot_V, slot_V, thread % 32, share.first_key, share.first_column)
    zeros = cute.make_rmem_tensor(4, Int32)
    zeros.fill(0)
    for i in cutlass.range_constexpr(len(share.places)):
        key, column = share.places[i]
        if share.first_key + key + thread % 32 >= num_used:
            cute.autovec_copy(zeros, cute.make_tensor(V.pointer(Int32, column, key), cute.make_layout(4)))
    cute.arch.sync_warp()


@dataclass(frozen=True)
class Share:
    """What a warp transposes of a tile: columns of blocks, taken in turn, if they can be shared out, else some keys.

    places   (key, column) of its blocks, counted from first_key and first_column
    """
    first_key: Int32 | int
    first_column: Int32 | int
    places: list[tuple[int, int]]

    @staticmethod
    def of(cfg: FwdConfig | DecodeConfig, thread: Int32, num_warps: int) -> "Share":
        """Of the warp of thread `thread` among so many."""
        keys, first_key, first_column, column_step = cfg.tile_n, 0, 0, BLOCK_COLUMNS
        if cfg.head_dim % (num_warps * BLOCK_COLUMNS) == 0:
            column_step = num_warps * BLOCK_COLUMNS      # no bit of which is in first_column, as SwizzledRow wants
            first_column = thread // 32 * BLOCK_COLUMNS
        else:
            keys //= num_warps
            first_key = thread // 32 * keys
        return Share(first_key, first_column, [(key, column) for key in range(0, keys, BLOCK_KEYS)
                                               for column in range(0, cfg.head_dim, column_step)])
