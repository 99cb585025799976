"""Merging partial results of split-KV: within a cluster through shared memory, between clusters through global memory.

    LSE = ln sum_s exp(LSE_s),   O = sum_s exp(LSE_s - LSE) O_s

Row r of an item's tile belongs to CTA r % cluster_size of each cluster: the others send it their normalised O and LSE
of that row. If the cluster is all that works on the item, the merged row goes to out; else to the scratch, and the last
to arrive of the CTAs that own the row merges the clusters' rows and sets their arrival count back to 0.

The order of the sums is fixed, whoever comes last: the same call gives the same bits.
"""
import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32

from ...planning.config import DecodeConfig
from ...planning.rings import WARP
from ..common.arithmetic import LOG2_E
from ..common.barriers import sync_consumers
from ..common.cluster import send, sync_cluster
from ..common.layout import ROW_STEP, fragment_col, fragment_row, out_type, pieces_of_row
from ..common.row_end import with_sink
from ..common.sequences import is_present
from .bundles import DecodeParams, DecodeSmem
from .split import SplitWork

COLUMNS = 4          # merged by one thread at a time
IN_FLIGHT = 16       # partial results that a thread reads at once: their latencies overlap


@cute.jit
def expect_partials(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, work: SplitWork, tidx: Int32):
    """Arm the mbarrier for the rows that the cluster's CTAs will send to this one."""
    if tidx == 0:
        num_bytes = work.num_own_rows * params.grid.cluster_size.divisor * (4 * cfg.dim_v + 4)
        cute.arch.mbarrier_arrive_and_expect_tx(smem.partials_arrived, num_bytes)


@cute.jit
def send_partial(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, work: SplitWork, acc_O: cute.Tensor,
                 lse: cute.Tensor, tidx: Int32, part: Constexpr[int] = 0):
    """acc_O and lse (f32, normalised) -> the CTAs of the cluster that own the rows.

    part   of the columns that acc_O has, where each consumer warpgroup has one; tidx counts within it
    Runs on: the consumers. Synchronises: the cluster, before, since the partial results lie over the K that
    its consumers read; the mbarrier of each owner counts the bytes.
    """
    sync_consumers(cfg)
    sync_cluster()
    for r in cutlass.range_constexpr(cute.size(lse)):
        row = fragment_row(tidx) + ROW_STEP * r
        if row < work.num_rows:
            slot, owner = divmod(row, params.grid.cluster_size)
            line = slot * params.grid.cluster_size.divisor + work.rank
            pieces, size = pieces_of_row(cfg, acc_O, r)
            for i in cutlass.range_constexpr(len(pieces)):
                index = 4 * (part * len(pieces) + i) + tidx % 4
                place = cute.local_tile(smem.sPartial[line, None], (size,), (index,))
                send(pieces[i], place, smem.partials_arrived, owner)
            if part == 0 and fragment_col(tidx) == 0:
                send((lse[r],), cute.local_tile(smem.sPartialLSE, (1,), (line,)), smem.partials_arrived, owner)


@dataclass
class Merge:
    """The running merge of one row's COLUMNS columns."""
    maximum: Float32
    total: Float32
    acc: cute.Tensor

    @staticmethod
    def create() -> "Merge":
        """Of nothing yet."""
        acc = cute.make_rmem_tensor(COLUMNS, Float32)
        acc.fill(0.0)
        return Merge(-Float32.inf, Float32(0.0), acc)

    @cute.jit
    def add(self, O: cute.Tensor, LSE: cute.Tensor):
        """IN_FLIGHT partial results: O (COLUMNS, IN_FLIGHT), LSE (IN_FLIGHT,), natural logarithms."""
        old = self.maximum
        new = LSE.load().reduce(cute.ReductionOp.MAX, old, 0)
        offset = Float32(0.0) if new == -Float32.inf else new
        rescale = cute.math.exp2((old - offset) * LOG2_E, fastmath=True)
        weights = cute.math.exp2((LSE.load() - offset) * LOG2_E, fastmath=True)
        self.maximum = new
        self.total = self.total * rescale
        for c in cutlass.range_constexpr(COLUMNS):
            self.acc[c] = self.acc[c] * rescale
        for i in cutlass.range_constexpr(IN_FLIGHT):
            self.total = self.total + weights[i]
            for c in cutlass.range_constexpr(COLUMNS):
                self.acc[c] = self.acc[c] + weights[i] * O[c, i]

    @cute.jit
    def finish(self, sink: Float32) -> Float32:
        """acc becomes O; returns LSE. No key at all: O = 0, LSE = -inf. Of merged rows the end (common/row_end.py),
        where the sink of the row joins, -inf without."""
        top, total, factor = self.maximum, self.total, Float32(1.0)
        if sink != -Float32.inf:
            top, total, factor = with_sink(top, total, sink)
        is_empty = total == 0.0
        inverse = Float32(0.0) if is_empty else cute.arch.rcp_approx(total) * factor
        for c in cutlass.range_constexpr(COLUMNS):
            self.acc[c] = self.acc[c] * inverse
        lse = top + cute.math.log2(total, fastmath=True) * math.log(2.0)
        return -Float32.inf if is_empty else lse


@cute.jit
def read_partials(source_O: cute.Tensor, source_LSE: cute.Tensor, count: Int32, first: Int32, chunk: Int32):
    """COLUMNS columns and the LSE of the partial results first .. first + IN_FLIGHT - 1.

    Those past the last one count for nothing: O is 0 and LSE -inf.
    """
    O, LSE = cute.make_rmem_tensor((COLUMNS, IN_FLIGHT), Float32), cute.make_rmem_tensor(IN_FLIGHT, Float32)
    O.fill(0.0)
    LSE.fill(-Float32.inf)
    for i in cutlass.range_constexpr(IN_FLIGHT):
        if first + i < count:
            cute.autovec_copy(cute.local_tile(source_O[first + i, None], (COLUMNS,), (chunk,)), O[None, i])
            LSE[i] = source_LSE[first + i]
    return O, LSE


@cute.jit
def merge_columns(source_O: cute.Tensor, source_LSE: cute.Tensor, count: Int32, chunk: Int32, sink: Float32):
    """(O, LSE) of COLUMNS columns of one row: source_O (count, dim_v), source_LSE (count,); sink: of the whole row."""
    merge = Merge.create()
    for first in cutlass.range(0, count, IN_FLIGHT, unroll=1):
        O, LSE = read_partials(source_O, source_LSE, count, first, chunk)
        merge.add(O, LSE)
    return merge.acc, merge.finish(sink)


@cute.jit
def sink_of(cfg: DecodeConfig, params: DecodeParams, work: SplitWork, row: Int32) -> Float32:
    """Of a row of the tile; -inf without sinks."""
    _, head = divmod(work.tile.m_block * cfg.tile_m + row, params.grid.packed_heads)
    return params.sinks.of(work.tile, work.tile.head + head)


@cute.jit
def write_out(cfg: DecodeConfig, params: DecodeParams, work: SplitWork, row: Int32, chunk: Int32, O: cute.Tensor,
              lse: Float32):
    """COLUMNS merged columns of one row of the tile -> out, and with the first of them LSE."""
    query, head = divmod(work.tile.m_block * cfg.tile_m + row, params.grid.packed_heads)
    query, head = work.tile.offset_q + query, work.tile.head + head
    rO = cute.make_rmem_tensor(COLUMNS, out_type(cfg))
    rO.store(O.load().to(out_type(cfg)))
    cute.autovec_copy(rO, cute.local_tile(params.mO[query, None, head, work.tile.batch], (COLUMNS,), (chunk,)))
    if is_present(params.mLSE) and chunk == 0:
        params.mLSE[query, head, work.tile.batch] = lse


def chunks_of(cfg: DecodeConfig, params: DecodeParams) -> Int32 | int:
    """COLUMNS columns each, of a row of out."""
    return (params.mO.shape[1] if cfg.is_padded else cfg.dim_v) // COLUMNS


@cute.jit
def merge_cluster(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, work: SplitWork, tidx: Int32):
    """The rows that this CTA owns, from shared memory to out, or to the scratch if other clusters have a part.

    Runs on: the consumers. Synchronises: waits for the rows that the cluster sends (`send_partial`).
    """
    grid, chunks = params.grid, chunks_of(cfg, params)
    cute.arch.mbarrier_wait(smem.partials_arrived, 0)
    for unit in cutlass.range(tidx, work.num_own_rows * chunks, WARP * cfg.num_consumer_warps, unroll=1):
        slot, chunk = unit // chunks, unit % chunks
        count = grid.cluster_size.divisor
        row, sink = slot * count + work.rank, -Float32.inf
        if work.num_clusters == 1:
            sink = sink_of(cfg, params, work, row)
        O, lse = merge_columns(cute.domain_offset((slot * count, 0), smem.sPartial),
                               cute.domain_offset(slot * count, smem.sPartialLSE), count, chunk, sink)
        if work.num_clusters == 1:
            write_out(cfg, params, work, row, chunk, O, lse)
        else:
            scratch = params.scratch
            cute.autovec_copy(O, cute.local_tile(scratch.O[work.item, work.cluster, row, None], (COLUMNS,), (chunk,)))
            if chunk == 0:
                scratch.LSE[work.item, work.cluster, row] = lse


@cute.jit
def merge_clusters(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, work: SplitWork, tidx: Int32):
    """If this CTA is the last to arrive of those that own the same rows in their clusters: these rows to out.

    Runs on: the consumers, after merge_cluster. Synchronises: these CTAs through their arrival count, which
    releases what they wrote and lets the last one acquire it.
    """
    scratch, grid, chunks = params.scratch, params.grid, chunks_of(cfg, params)
    arrivals = work.item * grid.cluster_size.divisor + work.rank
    sync_consumers(cfg)
    if tidx == 0:
        count = scratch.arrivals.iterator + arrivals
        smem.sArrived[0] = cute.arch.atomic_add(count, Int32(1), sem="acq_rel", scope="gpu")
    sync_consumers(cfg)
    if smem.sArrived[0] == work.num_clusters - 1:
        for unit in cutlass.range(tidx, work.num_own_rows * chunks, WARP * cfg.num_consumer_warps, unroll=1):
            slot, chunk = unit // chunks, unit % chunks
            row = slot * grid.cluster_size.divisor + work.rank
            O, lse = merge_columns(scratch.O[work.item, None, row, None], scratch.LSE[work.item, None, row],
                                   work.num_clusters, chunk, sink_of(cfg, params, work, row))
            write_out(cfg, params, work, row, chunk, O, lse)
        if tidx == 0:
            scratch.arrivals[arrivals] = Int32(0)
