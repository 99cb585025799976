"""Rows of a CTA that is a cluster of its own, from registers to out or to the scratch."""
import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32

from ...planning.mla import MlaConfig
from ..common.layout import ROW_STEP, fragment_col, fragment_row, out_type, pieces_of_row
from ..common.sequences import is_present
from ..decode.bundles import DecodeParams
from ..decode.split import SplitWork


@cute.jit
def write_partial(cfg: MlaConfig, params: DecodeParams, work: SplitWork, acc_O: cute.Tensor, lse: cute.Tensor,
                  tidx: Int32, half: Constexpr[int]):
    """One half of O's columns; the left one has the LSE.

    Runs on: a consumer warpgroup.
    """
    for r in cutlass.range_constexpr(cute.size(lse)):
        row = fragment_row(tidx) + ROW_STEP * r
        query, head = divmod(work.tile.m_block * cfg.tile_m + row, params.grid.packed_heads)
        query, head = work.tile.offset_q + query, work.tile.head + head
        if row < work.num_rows and work.num_clusters == 1:
            write_row(cfg, acc_O, r, params.mO[query, None, head, work.tile.batch], tidx, half, out_type(cfg))
            if half == 0 and fragment_col(tidx) == 0 and is_present(params.mLSE):
                params.mLSE[query, head, work.tile.batch] = lse[r]
        elif row < work.num_rows:
            scratch = params.scratch
            write_row(cfg, acc_O, r, scratch.O[work.item, work.cluster, row, None], tidx, half, cutlass.Float32)
            if half == 0 and fragment_col(tidx) == 0:
                scratch.LSE[work.item, work.cluster, row] = lse[r]


@cute.jit
def write_row(cfg: MlaConfig, acc_O: cute.Tensor, r: Constexpr[int], row: cute.Tensor, tidx: Int32,
              half: Constexpr[int], element: Constexpr):
    """The thread's pieces of its r-th row."""
    pieces, size = pieces_of_row(cfg, acc_O, r)
    for i in cutlass.range_constexpr(len(pieces)):
        piece = cute.make_rmem_tensor(size, element)
        for j in cutlass.range_constexpr(size):
            piece[j] = pieces[i][j].to(element)
        index = 4 * (half * len(pieces) + i) + tidx % 4
        cute.autovec_copy(piece, cute.local_tile(row, (size,), (index,)))
