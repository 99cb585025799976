"""Load role of the kernel of dK and dV: one warp of each CTA of a cluster."""
import cutlass
import cutlass.cute as cute
from cutlass import Int16, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.one_side import PREPARED_ROWS
from ...planning.pair import PairConfig
from ..common.tiles import rows_from
from ..common.tma import TmaOperand, tma_load, tma_views
from .blocks import KeyTile, query_range
from .load import load_rows
from .pair_bundles import PairParams, PairPipelines, PairSmem


def tma_load_parts(cfg: PairConfig, tensor: cute.Tensor, ring: cute.ComposedLayout) -> TmaOperand:
    """Global -> shared memory of all CTAs of the cluster, of each tile a part."""
    if cfg.num_ctas == 1:
        return tma_load(tensor, ring, cfg.tile_m)
    slot = cute.select(ring, mode=[0, 1])
    return TmaOperand(*cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SMulticastOp(), tensor, slot, (cfg.tile_m, cute.size(slot, mode=[1])),
        num_multicast=cfg.num_ctas))


def part_views(cfg: PairConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, head: Int32):
    """TMA's view of what this CTA loads of a head's rows of Q or dO: smem (box, slot) and gmem (box, m_block)."""
    mX = rows_from(cfg, tile.offset_q, op.tensor[None, None, head, tile.batch])
    gX = cute.local_tile(mX, (cfg.tile_m, cute.size(sX, mode=[1])), (None, 0))
    return cpasync.tma_partition(
        op.atom, cute.arch.block_idx_in_cluster() if cfg.num_ctas > 1 else 0, cute.make_layout(cfg.num_ctas),
        cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2))


@cute.jit
def copy_part(cfg: PairConfig, op: TmaOperand, gX: cute.Tensor, sX: cute.Tensor, barrier):
    """A part of a tile, into all CTAs; its bytes count down their mbarriers."""
    if const_expr(cfg.num_ctas > 1):
        cute.copy(op.atom, gX, sX, tma_bar_ptr=barrier, mcast_mask=Int16((1 << cfg.num_ctas) - 1))
    else:
        cute.copy(op.atom, gX, sX, tma_bar_ptr=barrier)


@cute.jit
def load_keys(cfg: PairConfig, op: TmaOperand, sX: cute.Tensor, tile: KeyTile, pipe):
    """The CTA's keys of K or V, once."""
    slot = pipe.make_producer().acquire_and_advance()
    mX = rows_from(cfg, tile.offset_k, op.tensor[None, None, tile.kv_head, tile.batch])
    block = tile.n_block * cfg.num_ctas + cute.arch.block_idx_in_cluster()
    gX = cute.local_tile(mX, (ROWS_PER_WARPGROUP, cute.size(sX, mode=[1])), (block, 0))
    tXsX, tXgX = tma_views(op, gX, sX)
    cute.copy(op.atom, tXgX, tXsX[None, slot.index], tma_bar_ptr=slot.barrier)


@cute.jit
def load(cfg: PairConfig, params: PairParams, smem: PairSmem, pipes: PairPipelines, tile: KeyTile):
    """K and V, then of each query head of the group tiles of Q and dO with the rows' values. Runs on: warp 0."""
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    q_producer, do_producer = pipes.q.make_producer(), pipes.do.make_producer()
    if queries.m_block_max > queries.m_block_min:
        load_keys(cfg, params.k, smem.sK, tile, pipes.k)
        load_keys(cfg, params.v, smem.sV, tile, pipes.v)
    for i in cutlass.range(params.group, unroll=1):
        head = tile.kv_head * params.group + i
        tQsQ, tQgQ = part_views(cfg, params.q, smem.sQ, tile, head)
        tOsO, tOgO = part_views(cfg, params.do, smem.sdO, tile, head)
        shift, delta = params.shift[None, head], params.delta[None, head]
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_max, unroll=1):
            row = tile.first_q_block * PREPARED_ROWS + m_block * cfg.tile_m
            q = q_producer.acquire_and_advance()
            copy_part(cfg, params.q, tQgQ[None, m_block], tQsQ[None, q.index], q.barrier)
            load_rows(cfg, shift, row, smem.sShift[None, q.index], q.barrier)
            do = do_producer.acquire_and_advance()
            copy_part(cfg, params.do, tOgO[None, m_block], tOsO[None, do.index], do.barrier)
            load_rows(cfg, delta, row, smem.sDelta[None, do.index], do.barrier)
