"""The second part of Q, which meets V."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...planning.mla import MlaConfig
from ...planning.rings import WARP
from ..common.arithmetic import ceil_div
from ..common.copies import row_copy, row_piece
from ..common.layout import element_type
from ..decode.split import SplitWork
from .bundles import MlaParams, MlaSmem


@cute.jit
def read_Qv(cfg: MlaConfig, params: MlaParams, smem: MlaSmem, work: SplitWork, tidx: Int32):
    """The rows that exist, from global to shared memory, as `read_Q` those of the first part, which comes after this
    and has the fence and the barrier of both.

    Runs on: the consumers.
    """
    copy, first_row, rows_per_step = row_copy(cfg.dim_v, element_type(cfg), tidx, WARP * cfg.num_consumer_warps)
    tQsQ = copy.partition_D(smem.sQv[None, None, 0])
    for step in cutlass.range(ceil_div(work.num_rows, rows_per_step), unroll=1):
        row = step * rows_per_step + first_row
        if row < work.num_rows:
            query, head = divmod(work.tile.m_block * cfg.tile_m + row, params.grid.packed_heads)
            mQ = params.mQv[work.tile.offset_q + query, None, work.tile.head + head, work.tile.batch]
            for c in cutlass.range_constexpr(cute.size(tQsQ, mode=[2])):
                cute.autovec_copy(row_piece(mQ, cfg.dim_v, tidx, c), tQsQ[None, step, c])
