"""Consumer role: dK and dV of the CTA's keys, and their part of dQ."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.rings import WARP, by_name
from .barriers import BarrierId
from .blocks import KeyTile, QueryRange
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .gradients import clear_unused_rows, make_gradients
from .store import store_gradient
from .visible import KeyMask


@cute.jit
def consume(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines, tile: KeyTile,
            queries: QueryRange):
    """All Q tiles of each query head of the group, one after the other; dK and dV at the end.

    Runs on: consumer warpgroups.
    Synchronises: waits for the full halves of the K, V, Q, dO and dS rings; empties Q, dO and dS; fills dS and dQ.
    """
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    wg_idx = cute.arch.make_warp_uniform(tidx // 128)
    gradients = make_gradients(cfg, params, mmas, smem, pipes, tidx, wg_idx)
    for w in cutlass.range_constexpr(1, cfg.num_consumer_wgs):
        if wg_idx >= w:
            gradients.dq_producer.advance()
    mask = KeyMask.create(cfg, params.window, tile, tidx)
    if queries.m_block_max > queries.m_block_min:
        wait_for_keys(cfg, smem, pipes, tile, tidx)
    for i in cutlass.range(params.group, unroll=1):
        gradients.start_head(tile.kv_head * params.group + i, tile.sequence)
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_full_min, unroll=1):
            gradients.step(mask, m_block, is_masked=True)
        for m_block in cutlass.range(queries.m_block_full_min, queries.m_block_full_max, unroll=1):
            gradients.step(mask, m_block, is_masked=False)
        if const_expr(cfg.is_local):
            for m_block in cutlass.range(queries.m_block_full_max, queries.m_block_max, unroll=1):
                gradients.step(mask, m_block, is_masked=True)
    cute.arch.barrier(barrier_id=BarrierId.KEYS_READ, number_of_threads=128 * cfg.num_consumer_wgs)
    store_gradient(cfg, mmas, gradients.acc_dV, smem.sV, params.mdV, tile, tidx)
    for i in cutlass.range_constexpr(cute.size(gradients.acc_dK)):
        gradients.acc_dK[i] = params.scale * gradients.acc_dK[i]
    store_gradient(cfg, mmas, gradients.acc_dK, smem.sK, params.mdK, tile, tidx)


@cute.jit
def wait_for_keys(cfg: BackwardConfig, smem: BwdSmem, pipes: BwdPipelines, tile: KeyTile, tidx: Int32):
    """Until K and V are there; rows behind the sequence's last are zeroed, as TMA does behind the tensor's."""
    pipes.k.make_consumer().wait_and_advance()
    pipes.v.make_consumer().wait_and_advance()
    if const_expr(cfg.is_varlen):
        slots = smem.sK[None, None, 0], smem.sV[None, None, 0]
        clear_unused_rows(cfg, slots, tile.seqlen_k - tile.n_block * cfg.tile_n, tidx)
