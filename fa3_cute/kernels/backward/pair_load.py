"""Load role of the kernel of dK and dV: one warp brings K and V, then tiles of Q and dO with the rows' values."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...planning.one_side import PREPARED_ROWS
from ...planning.pair import PairConfig
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_views
from .blocks import KeyTile, query_range
from .load import load_rows
from .pair_bundles import PairParams, PairPipelines, PairSmem


@cute.jit
def load(cfg: PairConfig, params: PairParams, smem: PairSmem, pipes: PairPipelines, tile: KeyTile):
    """K and V once, then of each query head of the group all pairs of Q and dO in order.

    Runs on: warp 0. Synchronises: waits for the empty halves of the Q and dO rings; TMA signals the full halves.
    """
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    q_producer, do_producer = pipes.q.make_producer(), pipes.do.make_producer()
    if queries.m_block_max > queries.m_block_min:
        load_keys(cfg, params.k, smem.sK, tile, pipes.k)
        load_keys(cfg, params.v, smem.sV, tile, pipes.v)
    for i in cutlass.range(params.group, unroll=1):
        head = tile.kv_head * params.group + i
        tQsQ, tQgQ = query_views(cfg, params.q, smem.sQ, tile, head)
        tOsO, tOgO = query_views(cfg, params.do, smem.sdO, tile, head)
        shift, delta = params.shift[None, head], params.delta[None, head]
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_max, unroll=1):
            row = tile.first_q_block * PREPARED_ROWS + m_block * cfg.tile_m
            q = q_producer.acquire_and_advance()
            cute.copy(params.q.atom, tQgQ[None, m_block], tQsQ[None, q.index], tma_bar_ptr=q.barrier)
            load_rows(cfg, shift, row, smem.sShift[None, q.index], q.barrier)
            do = do_producer.acquire_and_advance()
            cute.copy(params.do.atom, tOgO[None, m_block], tOsO[None, do.index], tma_bar_ptr=do.barrier)
            load_rows(cfg, delta, row, smem.sDelta[None, do.index], do.barrier)


@cute.jit
def load_keys(cfg: PairConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, pipe):
    """The CTA's keys of K or V."""
    slot = pipe.make_producer().acquire_and_advance()
    mX = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    gX = cute.local_tile(mX, (cfg.tile_n, cute.size(sX, mode=[1])), (tile.n_block, 0))
    tXsX, tXgX = tma_views(op, gX, sX)
    cute.copy(op.atom, tXgX, tXsX[None, slot.index], tma_bar_ptr=slot.barrier)


def query_views(cfg: PairConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, head: Int32):
    """TMA's view of a head's rows of Q or dO: smem (box, slot) and gmem (box, m_block)."""
    mX = rows_from(cfg, tile.offset_q, op.tensor[None, None, head, tile.batch])
    return tma_views(op, cute.local_tile(mX, (cfg.tile_m, cute.size(sX, mode=[1])), (None, 0)), sX)
