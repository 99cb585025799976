"""Load role: one warp brings K and V of each tile of keys, and Q and dO tiles with the rows' values."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP
from ..common.tile_ring import END, read_tile
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_views
from .barriers import BarrierId
from .blocks import KeyTile, key_tile_of, query_range
from .bundles import BwdParams, BwdPipelines, BwdSmem


@cute.jit
def load(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per tile of keys: V and K, as soon as their last reader is done; then the pairs of Q and dO that pass.

    Runs on: warp 0. Synchronises: reads the tile ring; tells the schedule role that a tile's loads are all issued;
    waits for the empty halves of the Q, dO, V and K rings; TMA signals the full halves.
    """
    q_producer, do_producer = pipes.q.make_producer(), pipes.do.make_producer()
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    tiles = pipes.tiles.make_consumer()
    tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))
    while tile.n_block != END:
        load_keys(cfg, params.v, smem.sV, tile, v_producer.acquire_and_advance())
        load_keys(cfg, params.k, smem.sK, tile, k_producer.acquire_and_advance())
        queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
        for i in cutlass.range(queries.num_passes(params.group), unroll=1):
            m_block, of_group = queries.passing(i, params.group, tile.is_rising)
            row, head = (tile.first_q_block + m_block) * cfg.tile_m, tile.kv_head * params.group + of_group
            tQsQ, tQgQ = query_views(cfg, params.q, smem.sQ, tile, head)
            tOsO, tOgO = query_views(cfg, params.do, smem.sdO, tile, head)
            q = q_producer.acquire_and_advance()
            cute.copy(params.q.atom, tQgQ[None, m_block], tQsQ[None, q.index], tma_bar_ptr=q.barrier)
            load_rows(cfg, params.shift[None, head], row, smem.sShift[None, q.index], q.barrier)
            do = do_producer.acquire_and_advance()
            cute.copy(params.do.atom, tOgO[None, m_block], tOsO[None, do.index], tma_bar_ptr=do.barrier)
            load_rows(cfg, params.delta[None, head], row, smem.sDelta[None, do.index], do.barrier)
        cute.arch.barrier_arrive(barrier_id=BarrierId.LOADED, number_of_threads=2 * WARP)
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index], key_tile_of(cfg))


@cute.jit
def load_keys(cfg: BackwardConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, slot):
    """The tile's keys of K or V."""
    mX = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    tXsX, tXgX = tma_views(op, cute.local_tile(mX, (cfg.tile_n, cfg.head_dim), (tile.n_block, 0)), sX)
    cute.copy(op.atom, tXgX, tXsX[None, slot.index], tma_bar_ptr=slot.barrier)


def query_views(cfg: BackwardConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, head: Int32):
    """TMA's view of a head's rows of Q or dO: smem (box, slot) and gmem (box, m_block)."""
    mX = rows_from(cfg, tile.offset_q, op.tensor[None, None, head, tile.batch])
    return tma_views(op, cute.local_tile(mX, (cfg.tile_m, cfg.head_dim), (None, 0)), sX)


def load_rows(cfg: BackwardConfig, mX: cute.Tensor, row: Int32, sX: cute.Tensor, barrier):
    """tile_m values of rows of a vector, counted on the barrier of the tile that they belong to."""
    with cute.arch.elect_one():
        primitives.cp_async_bulk_shared_cluster_global(
            sX.iterator.llvm_ptr, (mX.iterator + row).llvm_ptr, barrier.llvm_ptr, 4 * cfg.tile_m)
