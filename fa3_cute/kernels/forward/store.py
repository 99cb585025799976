"""From acc_O to global memory: the consumers write O into a slot, their tile's of Q or O's own, and one warp sends it
out with TMA."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr

from ...planning.config import FwdConfig
from ...planning.strategies import Output
from ..common.arithmetic import ceil_div
from ..common.barriers import sync_warpgroup
from ..common.copies import is_in_row, row_copy
from ..common.layout import (ROW_STEP, SwizzledRow, as_quads, convert, fragment_col, fragment_row, out_type,
                             pieces_of_row)
from ..common.tiles import Tile, group_of, query_and_head, rows_from
from ..common.tma import tma_views
from ..common.wgmma import Mmas
from .bundles import FwdParams, FwdPipelines, FwdSmem
from .tile_ring import TileReader


@cute.jit
def write_O(cfg: FwdConfig, mmas: Mmas, sO: cute.Tensor, acc_O: cute.Tensor, tidx: Int32):
    """acc_O (f32, normalised) -> sO (tile_m, dim_v) in O's type, visible to TMA.

    Runs on: a consumer warpgroup, each its 64 rows.
    Synchronises: its four warps, where sO lies over the Q that they read.
    """
    if const_expr(cfg.values.is_transposed):
        write_quads(cfg, sO, as_quads(acc_O), tidx)
    else:
        rO = cute.make_rmem_tensor_like(acc_O, out_type(cfg))
        convert(acc_O, rO)
        sync_warpgroup(tidx // 128)
        stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), out_type(cfg))
        thread_copy = cute.make_tiled_copy_C(stmatrix, mmas.pv).get_slice(tidx)
        cute.copy(thread_copy, thread_copy.retile(rO), thread_copy.partition_D(sO))
    cute.arch.fence_view_async_shared()   # generic-proxy writes before the async proxy's read


@cute.jit
def write_quads(cfg: FwdConfig, sO: cute.Tensor, quads: cute.Tensor, tidx: Int32):
    """write_O's stores for an accumulator in quads (layout.as_quads): 8 bytes each."""
    row = SwizzledRow.create(sO, fragment_row(tidx), tidx % 4 * 8)
    for g in cutlass.range_constexpr(cfg.dim_v // 16):
        for r in cutlass.range_constexpr(2):
            rO, quad = cute.make_rmem_tensor(4, out_type(cfg)), cute.make_rmem_tensor(4, Float32)
            for i in cutlass.range_constexpr(4):
                quad[i] = quads[i, r, g]
            rO.store(quad.load().to(out_type(cfg)))
            place = row.pointer(out_type(cfg), 32 * g, ROW_STEP * r, alignment=8)
            cute.autovec_copy(rO, cute.make_tensor(place, cute.make_layout(4)))


@cute.jit
def write_rows(cfg: FwdConfig, params: FwdParams, tile: Tile, acc_O: cute.Tensor, tidx: Int32):
    """acc_O (f32, normalised) -> out in FP32, rows below seqlen_q.

    Runs on: a consumer warpgroup, each its 64 rows.
    """
    for r in cutlass.range_constexpr(2):
        row = tile.m_block * cfg.tile_m + fragment_row(tidx) + ROW_STEP * r
        if row < tile.seqlen_q:
            mO = params.mO[tile.offset_q + row, None, tile.head, tile.batch]
            pieces, size = pieces_of_row(cfg, acc_O, r)
            store_pieces(cfg, pieces, size, mO, tidx)


@cute.jit
def store_pieces(cfg: FwdConfig, pieces: Constexpr, size: Constexpr[int], mO: cute.Tensor, tidx: Int32):
    """What a thread holds of a row (layout.pieces_of_row) -> the columns that the row has."""
    for i in cutlass.range_constexpr(len(pieces)):
        place = 4 * i + tidx % 4
        if const_expr(cfg.is_padded):
            if place * size < mO.shape[0]:
                store_piece(pieces[i], cute.local_tile(mO, (size,), (place,)))
        else:
            store_piece(pieces[i], cute.local_tile(mO, (size,), (place,)))


def store_piece(values: tuple, place: cute.Tensor):
    """Neighbouring columns (f32) at once."""
    piece = cute.make_rmem_tensor(len(values), Float32)
    for i, value in enumerate(values):
        piece[i] = value
    cute.autovec_copy(piece, place)


@cute.jit
def write_lse(cfg: FwdConfig, params: FwdParams, tile: Tile, lse: cute.Tensor, tidx: Int32):
    """lse (f32, one per row that the thread holds) -> mLSE.

    Runs on: consumer warpgroups; of a row's four threads the first writes.
    """
    if const_expr(cfg.has_lse):
        if fragment_col(tidx) == 0:
            for r in cutlass.range_constexpr(cute.size(lse)):
                row = tile.m_block * cfg.tile_m + fragment_row(tidx) + ROW_STEP * r
                query, head = query_and_head(cfg, tile, row)
                if query < tile.seqlen_q:
                    params.mLSE[tile.offset_q + query, head, tile.batch] = lse[r]


@cute.jit
def store_rows(cfg: FwdConfig, params: FwdParams, tile: Tile, sO: cute.Tensor, num_rows: Int32):
    """The first num_rows rows of sO to global memory with ordinary stores: what TMA cannot bound, since behind them
    lie the rows of another sequence, or rows past seqused_q. Runs on: the store warp.
    """
    mO = rows_from(cfg, tile.offset_q, params.mO[None, None, group_of(cfg, tile), tile.batch])
    gO = cute.local_tile(mO, (cfg.tile_m, cfg.dim_v), (tile.m_block, 0))
    copy, first_row, rows_per_step = row_copy(cfg.dim_v, out_type(cfg), cute.arch.lane_idx(), num_threads=32)
    tOsO, tOgO = copy.partition_S(sO), copy.partition_D(gO)
    for step in cutlass.range(ceil_div(num_rows, rows_per_step), unroll=1):
        if step * rows_per_step + first_row < num_rows:
            store_row(cfg, tOsO, tOgO, step, params.mO.shape[1])


@cute.jit
def store_row(cfg: FwdConfig, tOsO: cute.Tensor, tOgO: cute.Tensor, step: Int32, extent: Int32 | int):
    """The lane's pieces of its row of a step of `row_copy`, as far as rows of O, which have so many columns, have them.
    Runs on: the store warp."""
    for c in cutlass.range_constexpr(cute.size(tOsO, mode=[2])):
        if const_expr(cfg.is_padded):
            if is_in_row(extent, cfg.dim_v, out_type(cfg), cute.arch.lane_idx(), c):
                move_piece(tOsO, tOgO, step, c)
        else:
            move_piece(tOsO, tOgO, step, c)


def move_piece(tOsO: cute.Tensor, tOgO: cute.Tensor, step: Int32, column: int):
    """One of `row_copy`'s pieces, through registers."""
    rO = cute.make_rmem_tensor_like(tOsO[None, 0, 0])
    cute.autovec_copy(tOsO[None, step, column], rO)
    cute.autovec_copy(rO, tOgO[None, step, column])


@cute.jit
def copy_rows(cfg: FwdConfig, params: FwdParams, tile: Tile, sO: cute.Tensor, slot: Int32, tOsO: cute.Tensor,
              tOgO: cute.Tensor):
    """O of a tile from its slot, which are TMA's views of, to global memory. Runs on: one warp, which waits until it is
    read."""
    num_queries = tile.seqlen_q - tile.m_block * cfg.queries_per_tile
    use_tma = Boolean(True)
    if const_expr(cfg.is_varlen):
        use_tma = num_queries >= cfg.queries_per_tile
        if num_queries < cfg.queries_per_tile:
            store_rows(cfg, params, tile, sO[None, None, slot], num_queries * cfg.packed_heads)
    if use_tma:
        cute.copy(params.o.atom, tOsO[None, slot], tOgO)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@dataclass
class OutStore:
    """A warp's place in the rings of the tiles that it stores."""
    q_consumer: pipeline.PipelineConsumer
    o_consumer: pipeline.PipelineConsumer

    @staticmethod
    def create(pipes: FwdPipelines) -> "OutStore":
        """At the CTA's first tile."""
        return OutStore(pipes.q.make_consumer(), pipes.o.make_consumer())

    @cute.jit
    def store(self, cfg: Constexpr[FwdConfig], params: FwdParams, smem: FwdSmem, tile: Tile):
        """O of the next tile from its slot to global memory; TMA drops the rows past seqlen_q. Then Q's slot may take
        the next Q.

        Runs on: one warp. Synchronises: waits for the full half of the O ring; empties the Q ring and O's own.
        """
        if const_expr(cfg.output is not Output.NOWHERE):
            mO = rows_from(cfg, tile.offset_q, params.o.tensor[None, None, group_of(cfg, tile), tile.batch])
            gO = cute.local_tile(mO, (cfg.tile_m, cfg.dim_v), (tile.m_block, 0))
            tOsO, tOgO = tma_views(params.o, gO, smem.sO)
        q = self.q_consumer.wait_and_advance()   # full long ago; this walks the ring whose slot we release
        o = self.o_consumer.wait_and_advance()
        if const_expr(cfg.output is not Output.NOWHERE):
            slot = o.index if const_expr(cfg.output is Output.OWN_SLOT) else q.index
            copy_rows(cfg, params, tile, smem.sO, slot, tOsO, tOgO)
        cute.arch.sync_warp()   # every lane has read, the one that issued the store has waited: now lane 0 may release
        q.release()
        if const_expr(cfg.output is Output.OWN_SLOT):
            with cute.arch.elect_one():
                o.release()


@cute.jit
def store(cfg: FwdConfig, params: FwdParams, smem: FwdSmem, pipes: FwdPipelines):
    """Every tile's O.

    Runs on: warp 1 in 16 bit. Synchronises: reads the tile ring; see OutStore.store.
    """
    out = OutStore.create(pipes)
    reader = TileReader.create(smem.sTiles, pipes.tiles)
    while reader.has_tile():
        out.store(cfg, params, smem, reader.tile)
        reader.advance()
