"""Consumer role: dK and dV of the CTA's keys, and their part of dQ."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, const_expr

from ...planning.backward import BackwardConfig
from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.rings import WARP, by_name
from ..common.barriers import sync_warpgroup
from ..common.copies import clear_rows, row_copy
from ..common.layout import convert, element_type
from ..common.sequences import is_present
from ..common.tiles import rows_from
from .blocks import KeyTile, QueryRange
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .gradients import make_gradients
from .visible import KeyMask

CONSUMERS = 10     # named barrier: all consumers have read K and V, whose slots dK and dV take


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
    for _ in cutlass.range(params.group, unroll=1):
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_full_min, unroll=1):
            gradients.step(mask, m_block, is_masked=True)
        for m_block in cutlass.range(queries.m_block_full_min, queries.m_block_full_max, unroll=1):
            gradients.step(mask, m_block, is_masked=False)
        if const_expr(cfg.is_local):
            for m_block in cutlass.range(queries.m_block_full_max, queries.m_block_max, unroll=1):
                gradients.step(mask, m_block, is_masked=True)
    cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=128 * cfg.num_consumer_wgs)
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
        num_used = tile.seqlen_k - tile.n_block * cfg.tile_n
        if num_used < cfg.tile_n:
            for slot in (smem.sK[None, None, 0], smem.sV[None, None, 0]):
                clear_rows(cfg, slot, num_used, cfg.tile_n, tidx % 128, 128)
            cute.arch.fence_view_async_shared()
            sync_warpgroup(tidx // 128)


@cute.jit
def store_gradient(cfg: BackwardConfig, mmas: BwdMmas, acc: cute.Tensor, slot: cute.Tensor, mX: cute.Tensor,
                   tile: KeyTile, tidx: Int32):
    """acc (f32) -> the slot -> rows of dK or dV below seqlen_k. Not of a null pointer: a gradient that is not wanted.

    Runs on: a consumer warpgroup, each its 64 keys.
    """
    wg_idx = tidx // 128
    if is_present(mX):
        rX = cute.make_rmem_tensor_like(acc, element_type(cfg))
        convert(acc, rX)
        stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), element_type(cfg))
        thread_copy = cute.make_tiled_copy_C(stmatrix, mmas.dkv).get_slice(tidx)
        cute.copy(thread_copy, thread_copy.retile(rX), thread_copy.partition_D(slot[None, None, 0]))
        sync_warpgroup(wg_idx)
        shape, block = (ROWS_PER_WARPGROUP, cfg.head_dim), tile.n_block * cfg.num_consumer_wgs + wg_idx
        gX = cute.local_tile(rows_from(cfg, tile.offset_k, mX[None, None, tile.kv_head, tile.batch]), shape, (block, 0))
        sX = cute.local_tile(slot[None, None, 0], shape, (wg_idx, 0))
        store_used_rows(cfg, sX, gX, tile.seqlen_k - block * ROWS_PER_WARPGROUP, tidx % 128, 128)


@cute.jit
def store_used_rows(cfg: BackwardConfig, sX: cute.Tensor, gX: cute.Tensor, num_rows: Int32, thread: Int32,
                    num_threads: Constexpr[int]):
    """The first num_rows rows of sX -> gX, in 16-byte pieces."""
    copy, first_row, rows_per_step = row_copy(cfg.head_dim, element_type(cfg), thread, num_threads)
    tXsX, tXgX = copy.partition_S(sX), copy.partition_D(gX)
    rows = cute.size(sX, mode=[0])
    for step in cutlass.range_constexpr(-(-rows // rows_per_step)):
        row = step * rows_per_step + first_row
        if row < num_rows and row < rows:
            for c in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
                piece = cute.make_rmem_tensor_like(tXsX[None, 0, 0])
                cute.autovec_copy(tXsX[None, step, c], piece)
                cute.autovec_copy(piece, tXgX[None, step, c])
