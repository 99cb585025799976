"""Consumer role: attention over one split of K and V, then its merge with the others of the item."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from ...planning.config import DecodeConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div
from ..common.attend import attend_to, make_attend
from ..common.barriers import sync_consumers
from ..common.copies import index_of_piece, is_in_row, row_copy, row_piece
from ..common.layout import element_type
from ..common.rotary import Rotary, read_turned
from ..common.visibility import Visibility
from ..common.wgmma import Mmas
from .bundles import DecodeParams, DecodePipelines, DecodeSmem
from .merge import expect_partials, merge_cluster, merge_clusters, send_partial
from .new_rows import publish
from .queries import read_Q_as_operand
from .split import SplitWork


@cute.jit
def consume_split(cfg: DecodeConfig, params: DecodeParams, mmas: Mmas, smem: DecodeSmem, pipes: DecodePipelines,
                  work: SplitWork):
    """Attend to one split, then merge it with the others of its item.

    Runs on: the consumer warpgroup.
    Synchronises: waits for the full halves of the K and V rings and empties them; merges, see merge.py.
    """
    tidx = cute.arch.thread_idx()[0]
    expect_partials(cfg, params, smem, work, tidx)
    new, places = None, (Int32(0), Int32(0))
    if const_expr(params.new_rows is not None):
        places = params.new_rows.places(params.places.batch, work.tile.sequence)
        new = params.new_rows.row_of(cfg, smem, params.places.batch, work, places, tidx)
    if const_expr(not cfg.has_q_in_registers):
        read_Q(cfg, params, smem, work, tidx, places[1])
    warp_row = cute.arch.make_warp_uniform(tidx // 32) * 16      # fragment_row's first one in this warp, then 8 by 8
    num_used = ceil_div(work.num_rows - warp_row, 8)
    attend = make_attend(cfg, params, mmas, smem, pipes, Int32(0), num_used)
    q_factors = None
    if const_expr(cfg.has_q_in_registers):
        q_factors = read_Q_as_operand(cfg, params, attend.tSrQ, work, tidx)
    mask = Visibility(cfg, params.window, work.tile, params.grid.packed_heads).of_thread(tidx)
    attend.start_tile(params.descales, mask, params.grid.packed_heads, q_factors)
    attend = attend_to(cfg, attend, mask, work.blocks, smem.wide_V if cfg.widens else smem.sV, tidx, new=new)
    cute.arch.griddepcontrol_launch_dependents()     # any earlier, and the next kernel's CTAs take SMs unevenly
    send_partial(cfg, params, smem, work, attend.acc_O, attend.softmax.row_sum, tidx)
    merge_cluster(cfg, params, smem, work, tidx)
    if work.num_clusters > 1 and work.num_own_rows > 0:
        merge_clusters(cfg, params, smem, work, tidx)
    if const_expr(params.new_rows is not None):
        publish()


@cute.jit
def read_Q(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, work: SplitWork, tidx: Int32,
           start: Int32):
    """The rows of Q that exist, from global to shared memory with ordinary loads: there are few, and they are strided.
    Where the kernel turns them `start` is the position of the first.

    The other rows of sQ hold anything: rows do not mix, and these are never stored.
    Runs on: the consumers. Synchronises: their warps.
    """
    copy, first_row, rows_per_step = row_copy(cfg.dim_qk, element_type(cfg), tidx,
                                              WARP * cfg.num_consumer_warps)
    tQsQ = copy.partition_D(smem.sQ[None, None, 0])
    packed_heads = params.grid.packed_heads
    for step in cutlass.range(ceil_div(work.num_rows, rows_per_step), unroll=1):
        row = step * rows_per_step + first_row
        if row < work.num_rows:
            packed_row = work.tile.m_block * cfg.tile_m + row
            query, head = divmod(packed_row, packed_heads)
            mQ = params.mQ[work.tile.offset_q + query, None, work.tile.head + head, work.tile.batch]
            if const_expr(params.turns_queries):
                rotary = params.new_rows.rotary
                position = params.new_rows.position(start + query * rotary.query_step)
                turn_row(cfg, mQ, tQsQ[None, step, None], rotary, position, tidx)
            else:
                read_row(cfg, mQ, tQsQ[None, step, None], tidx)
    cute.arch.fence_view_async_shared()
    sync_consumers(cfg)


@cute.jit
def read_row(cfg: DecodeConfig, mQ: cute.Tensor, tQsQ: cute.Tensor, tidx: Int32):
    """A thread's pieces of one row of Q; zeros where the tile has columns that the row has not.

    Runs on: the threads that share the row.
    """
    for c in cutlass.range_constexpr(cute.size(tQsQ, mode=[1])):
        if const_expr(cfg.is_padded):
            rQ = cute.make_rmem_tensor_like(tQsQ[None, c])
            cute.recast_tensor(rQ, Int32).fill(0)
            if is_in_row(mQ.shape[0], cfg.dim_qk, mQ.element_type, tidx, c):
                cute.autovec_copy(row_piece(mQ, cfg.dim_qk, tidx, c), rQ)
            cute.autovec_copy(rQ, tQsQ[None, c])
        else:
            cute.autovec_copy(row_piece(mQ, cfg.dim_qk, tidx, c), tQsQ[None, c])


@cute.jit
def turn_row(cfg: DecodeConfig, mQ: cute.Tensor, tQsQ: cute.Tensor, rotary: Rotary, position: Int32, tidx: Int32):
    """As read_row, of a row that is turned on its way."""
    for c in cutlass.range_constexpr(cute.size(tQsQ, mode=[1])):
        piece = index_of_piece(cfg.dim_qk, mQ.element_type, tidx, c)
        cute.autovec_copy(read_turned(cfg.rotary, mQ, rotary, position, piece), tQsQ[None, c])
