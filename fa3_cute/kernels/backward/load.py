"""Load role: one warp brings K and V of each tile of keys, and Q and dO tiles with the rows' values."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig
from ..common.arithmetic import maximum
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_views
from .blocks import KeyTile, query_range
from .bundles import BwdParams, BwdPipelines, BwdSmem
from .schedule import END, read_tile


@cute.jit
def load(cfg: BackwardConfig, params: BwdParams, smem: BwdSmem, pipes: BwdPipelines):
    """Per tile of keys: the first Q and dO, V and K, in the order in which their slots become free, then the other
    pairs: of each query head of the group all Q tiles in order.

    Runs on: warp 0. Synchronises: reads the tile ring; waits for the empty halves of the Q, dO, V and K rings; TMA
    signals the full halves.
    """
    q_producer, do_producer = pipes.q.make_producer(), pipes.do.make_producer()
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    tiles = pipes.tiles.make_consumer()
    tile = read_tile(smem.sTiles[None, tiles.wait().index])
    while tile.n_block != END:
        queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
        per_head = queries.m_block_max - queries.m_block_min
        for i in cutlass.range(maximum(params.group * per_head, 1), unroll=1):
            if per_head > 0:
                of_group = i // per_head
                head, m_block = tile.kv_head * params.group + of_group, queries.m_block_min + i - of_group * per_head
                place = tile, head, m_block, (tile.first_q_block + m_block) * cfg.tile_m
                load_queries(cfg, params.q, smem.sQ, (params.shift, smem.sShift), place,
                             q_producer.acquire_and_advance())
                load_queries(cfg, params.do, smem.sdO, (params.delta, smem.sDelta), place,
                             do_producer.acquire_and_advance())
            if i == 0:
                load_keys(cfg, params.v, smem.sV, tile, v_producer.acquire_and_advance())
                load_keys(cfg, params.k, smem.sK, tile, k_producer.acquire_and_advance())
        with cute.arch.elect_one():
            tiles.release()
        tiles.advance()
        tile = read_tile(smem.sTiles[None, tiles.wait().index])


@cute.jit
def load_queries(cfg: BackwardConfig, op: TmaOperand, sX: cute.Tensor, rows: tuple, place: tuple, slot):
    """A tile of Q or dO with its rows' values. rows: in global and in shared memory; place: (tile, head, m_block, row
    of the first among the padded ones)."""
    tile, head, m_block, row = place
    tXsX, tXgX = query_views(cfg, op, sX, tile, head)
    cute.copy(op.atom, tXgX[None, m_block], tXsX[None, slot.index], tma_bar_ptr=slot.barrier)
    load_rows(cfg, rows[0][None, head], row, rows[1][None, slot.index], slot.barrier)


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
