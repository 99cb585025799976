"""Load role: one warp brings K and V of each tile of keys, and Q and dO tiles with the rows' values. And what the load
roles of the other backward kernels share with it."""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Constexpr, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig, GradientFields
from ...planning.one_side import PREPARED_ROWS, OneSideConfig
from ...planning.pair import PairConfig
from ...planning.rings import WARP
from ..common.tile_ring import END, read_tile
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_views
from .barriers import BarrierId
from .blocks import KeyTile, QueryRange, key_tile_of, queries_of
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .gradients import emptied, filled
from .listed import are_few
from .split import full


@cute.jit
def load(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per tile of keys: V and K, if any, as soon as their last reader is done; then the pairs of Q and dO that pass.

    Runs on: warp 0. Synchronises: reads the tile ring; tells the schedule role that a tile's loads are all issued;
    waits for the empty halves of the Q, dO, V and K rings, and as wait_for_last does; TMA signals the full halves.
    """
    q = QueryTiles(cfg, params.q, smem.sQ, pipes.q.make_producer(), params.shift, smem.sShift, True)
    do = QueryTiles(cfg, params.do, smem.sdO, pipes.do.make_producer(), params.delta, smem.sDelta, True)
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    tiles, turn = pipes.tiles.make_consumer(), Int32(0)
    tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))
    while tile.n_block != END:
        keys = tile.n_block, tile.offset_k, tile.kv_head, tile.batch
        has_keys = True
        if const_expr(cfg.is_varlen):    # places of the order may have none
            has_keys = tile.seqlen_k > 0
        if has_keys:
            load_tile(cfg, params.v, smem.sV, keys, v_producer.acquire_and_advance())
            load_tile(cfg, params.k, smem.sK, keys, k_producer.acquire_and_advance())
        queries = queries_of(cfg, params.window, tile)
        for i in cutlass.range(queries.num_passes(params.group), unroll=1):
            m_block, of_group = queries.passing(i, params.group, tile.is_rising)
            row, head = (tile.first_q_block + m_block) * cfg.tile_m, tile.kv_head * params.group + of_group
            q.bring(tile, head, m_block, row)
            do.bring(tile, head, m_block, row)
        turn += queries.num_passes(params.group)
        if are_few(params):
            wait_for_last(cfg, pipes, turn, queries.num_passes(params.group) == 1)
        cute.arch.barrier_arrive(barrier_id=BarrierId.LOADED, number_of_threads=2 * WARP)
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))


@cute.jit
def wait_for_last(cfg: BackwardConfig, pipes: BwdPipelines, turn: Int32, is_only: Boolean):
    """Until consumers have read all of a tile's Q tiles but one, or written dS of its only one; of Q tiles before it
    where none passes.

    turn: Q tiles so far.
    """
    if is_only:
        pipes.ds.consumer_wait((full if const_expr(cfg.is_split) else filled)(turn - 1))
    else:
        is_read = pipes.q.producer_try_acquire(emptied(turn))
        while not is_read:
            is_read = pipes.q.producer_try_acquire(emptied(turn))


@dataclass
class QueryTiles:
    """Tiles of Q or dO on their way to the slots of a ring, each with the values of its rows, shift or delta."""
    cfg: Constexpr
    op: TmaOperand
    ring: cute.Tensor
    producer: pipeline.PipelineProducer
    values: cute.Tensor                # (padded rows, num_heads) f32
    sValues: Optional[cute.Tensor]     # (tile_m, slot) f32; None where they are not wanted
    is_early: Constexpr = False        # the kernel before, which writes values, may still run

    @cute.jit
    def bring(self, tile: KeyTile, head: Int32, m_block: Int32, row: Int32):
        """Q tile m_block of a head of the tile's sequence; row: of its first value among the padded ones."""
        slot = self.producer.acquire_and_advance()
        load_tile(self.cfg, self.op, self.ring, (m_block, tile.offset_q, head, tile.batch), slot)
        if const_expr(self.is_early):
            cute.arch.griddepcontrol_wait()
        if const_expr(self.sValues is not None):
            load_rows(self.cfg, self.values[None, head], row, self.sValues[None, slot.index], slot.barrier)


@cute.jit
def load_heads(cfg: OneSideConfig | PairConfig, group: Int32, tile: KeyTile, queries: QueryRange, q: QueryTiles,
               do: QueryTiles):
    """Of each query head of the group all pairs of Q and dO in order: of the kernels of dK or dV."""
    for i in cutlass.range(group, unroll=1):
        head = tile.kv_head * group + i
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_max, unroll=1):
            row = tile.first_q_block * PREPARED_ROWS + m_block * cfg.tile_m
            q.bring(tile, head, m_block, row)
            do.bring(tile, head, m_block, row)


@cute.jit
def load_tile(cfg: GradientFields, op: TmaOperand, ring: cute.Tensor, where: tuple, slot):
    """A tile of rows -> a slot of a ring, as many as it has. where: (tile, first row of the sequence, head, batch)"""
    index, offset, head, batch = where
    shape = tuple(cute.size(ring, mode=[mode]) for mode in (0, 1))
    mX = rows_from(cfg, offset, op.tensor[None, None, head, batch])
    tXsX, tXgX = tma_views(op, cute.local_tile(mX, shape, (index, 0)), ring)
    cute.copy(op.atom, tXgX, tXsX[None, slot.index], tma_bar_ptr=slot.barrier)


def load_rows(cfg: GradientFields, mX: cute.Tensor, row: Int32, sX: cute.Tensor, barrier):
    """tile_m values of rows of a vector, counted on the barrier of the tile that they belong to."""
    with cute.arch.elect_one():
        primitives.cp_async_bulk_shared_cluster_global(
            sX.iterator.llvm_ptr, (mX.iterator + row).llvm_ptr, barrier.llvm_ptr, 4 * cfg.tile_m)
