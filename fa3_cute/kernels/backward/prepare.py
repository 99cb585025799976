"""Before the main kernel: what a row adds to its scores and to dP, zeros in the main kernel's counts and in the sums of
dQ that are under way first, and what rows add to d_s_aux.

Counts come first, and at once: the main kernel starts when all CTAs have zeroed theirs. Where they do it when rows are
on their way, calls of 256, 512 and 128 take 1.03 to 1.09 times as long (BF16, H200, 2026-12-01).

    shift[i] = -LSE[i] / softmax_scale           so that exp(softmax_scale (S + shift)) is P
    delta[i] = dLSE[i] - rowsum(dO[i] O[i])      is added to dP

A row that sees no key (LSE = -inf, or +inf as others write it) has delta = 0, and a shift that is not +inf: all its
scores are masked. Rows behind the sequence's last have the shift -inf: P = 0. Both are padded to whole Q tiles, which
bulk copies can read.

A sink is a key of value 0, hence of dP = 0, and d_s_aux the sum of exp(s_aux - LSE[i]) delta[i]. Each warp that
has rows leaves that of its own, in the same order in every call; sinks.py adds them up.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr

from ...planning.backward import PREPARE_ARGUMENTS, PREPARE_THREADS, SINK_WARPS, BackwardConfig
from ...planning.rings import WARP
from ..common.arithmetic import LOG2_E
from ..common.copies import is_in_row, piece_size, row_copy, threads_per_row
from ..common.entry import flat_entry
from ..common.layout import element_type, lse_view, tensor_view
from ..common.row_end import Sinks
from ..common.sequences import Sequences, is_present
from .blocks import Blocks, QueryTile, query_tile
from .workspace import Sums, clear_block, per_block

# 16-byte pieces of O, and as many of dO, that a thread has on the way at most. Where few sequences are on few SMs a CTA
# then waits for memory once: for all of a Q tile's rows, with their LSE. The sequences of 256, 512 and 128 at 16 heads
# take 4.3 us here; with 128 threads, two steps of 4 to 8 on the way and LSE behind them 6.8, and the whole call 1.05 to
# 1.12 times as long (head_dim 128 and 64, BF16, H200, 2026-11-30).
MOST_PIECES_IN_FLIGHT = 8


@dataclass(frozen=True)
class PrepareParams:
    """What the kernel reads, and per block and head what it writes."""
    mO: cute.Tensor            # (seqlen_q, head_dim_v, num_heads, batch)
    mdO: cute.Tensor
    mLSE: cute.Tensor          # (seqlen_q, num_heads, batch) f32
    mdLSE: cute.Tensor         # the same, or null
    shift: cute.Tensor         # (tile_m, blocks, num_heads) f32
    delta: cute.Tensor
    sums: Sums
    order: cute.Tensor         # (1, blocks, num_heads) int32
    tile_counter: cute.Tensor  # (1) int32
    sink_sums: cute.Tensor     # (SINK_WARPS, blocks, num_heads) f32
    sinks: Sinks
    scale: Float32


@flat_entry(PREPARE_ARGUMENTS)
class PrepareBackward:
    """The kernel of one config. Compile `__call__`: its parameters are PREPARE_ARGUMENTS, in order."""

    def __init__(self, cfg: BackwardConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """shift = -LSE / softmax_scale, delta = dLSE - rowsum(dO O), the first sums of dQ = 0"""
        cfg, sequences = self.cfg, Sequences.create(a)
        batches = Int32(1) if sequences.is_packed() else a.batch_size
        shape = (a.seqlen_q, a.head_dim_v if cfg.is_padded else cfg.head_dim, a.num_heads, batches)
        blocks = Blocks.create(cfg.tile_m, sequences.cu_seqlens_q, a.seqlen_q, a.batch_size)
        lse = lse_view(a, batches)
        part = lambda pointer, size: per_block(pointer, size, blocks, a.num_heads)
        params = PrepareParams(
            mO=tensor_view(a, "out", shape), mdO=tensor_view(a, "dout", shape), mLSE=lse,
            mdLSE=cute.make_tensor(a.dlse, lse.layout), shift=part(a.shift, cfg.tile_m),
            delta=part(a.delta, cfg.tile_m), sums=Sums.create(cfg, a),
            order=part(a.order, 1), tile_counter=cute.make_tensor(a.tile_counter, cute.make_layout(1)),
            sink_sums=part(a.sink_sums, SINK_WARPS), sinks=Sinks.create(a),
            scale=a.softmax_scale)
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, blocks, sequences).launch(
            grid=(blocks.num_blocks * a.num_heads, 1, 1), block=(PREPARE_THREADS, 1, 1), use_pdl=True, stream=a.stream)

    @cute.kernel
    def kernel(self, params: PrepareParams, blocks: Blocks, sequences: Sequences):
        """A Q tile of one head per CTA."""
        cute.arch.griddepcontrol_wait()      # for whatever has written the lengths, and all else that is read here
        thread = cute.arch.thread_idx()[0]
        if thread == 0:
            self.clear_counts(params)
            cute.arch.griddepcontrol_launch_dependents()
        cfg, tile = self.cfg, query_tile(blocks, sequences, params.order.shape[2])
        lse, dlse = self.read_row(params, tile, thread)
        element = element_type(cfg)
        copy, first_row, rows_per_step = row_copy(cfg.head_dim, element, thread, PREPARE_THREADS)
        per_row = threads_per_row(cfg.head_dim, element)
        sink, of_sink = -Float32.inf, Float32(0.0)
        if params.sinks.address != 0:
            sink = params.sinks.read(tile.head)
        sProducts = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout(cfg.tile_m))
        gO, gdO = (copy.partition_S(tile.rows_of(cfg, mX)) for mX in (params.mO, params.mdO))
        num_steps = -(-cfg.tile_m // rows_per_step)
        most = max(1, MOST_PIECES_IN_FLIGHT * per_row * piece_size(element) // cfg.head_dim)
        in_flight = max(n for n in range(1, most + 1) if num_steps % n == 0)
        for first in cutlass.range(0, num_steps, in_flight, unroll=1):
            rows = [(first + i) * rows_per_step + first_row for i in range(in_flight)]
            are_used = [(tile.m_block * cfg.tile_m + row < tile.seqlen) & (row < cfg.tile_m) for row in rows]
            pairs = [[read_step(cfg, gX, first + i, is_used, params.mO.shape[1], thread) for gX in (gO, gdO)]
                     for i, is_used in enumerate(are_used)]
            for i in cutlass.range_constexpr(in_flight):
                product = row_sum(*pairs[i], per_row)
                if thread % per_row == 0 and rows[i] < cfg.tile_m:
                    sProducts[rows[i]] = product
        if const_expr(cfg.has_sums):
            self.clear(params, tile, thread)
        cute.arch.sync_threads()
        if thread < cfg.tile_m:
            is_used = tile.m_block * cfg.tile_m + thread < tile.seqlen
            of_sink = self.write_row(params, tile, thread, is_used, (sProducts[thread], lse, dlse), sink)
        if params.sinks.address != 0:
            of_sink = cute.arch.warp_reduction_sum(of_sink)
            if thread % WARP == 0 and thread < SINK_WARPS * WARP:
                params.sink_sums[thread // WARP, tile.block, tile.head] = of_sink

    @cute.jit
    def clear_counts(self, params: PrepareParams):
        """Those that the main kernel adds to before it waits for this one, when all CTAs have done it: the first CTA's
        tile_counter, of one unit each its progress. There are no more units than CTAs. Runs on: a thread.
        """
        if const_expr(self.cfg.has_sums):
            index = cute.arch.block_idx()[0]
            if index == 0:
                params.tile_counter[0] = Int32(0)
            if index < params.sums.num_units():
                params.sums.progress[0, index] = Int32(0)
                params.sums.progress[1, index] = Int32(0)
                cute.arch.fence_acq_rel_gpu()

    @cute.jit
    def clear(self, params: PrepareParams, tile: QueryTile, thread: Int32):
        """The tile's sums, if its unit is of those that have a slot first, and order."""
        unit, block, of_group = place_in_sums(params, tile.block, tile.head)
        if unit < params.sums.num_slots:
            clear_block(params.sums.parts[None, block, of_group, unit], thread, PREPARE_THREADS)
        if thread == 0:
            params.order[0, tile.block, tile.head] = Int32(0)

    @cute.jit
    def read_row(self, params: PrepareParams, tile: QueryTile, row: Int32) -> tuple[Float32, Float32]:
        """LSE and dLSE of a row of the tile; zeros of one that is not there, and where there is no dLSE."""
        lse, dlse, query = Float32(0.0), Float32(0.0), tile.m_block * self.cfg.tile_m + row
        if row < self.cfg.tile_m and query < tile.seqlen:
            lse = params.mLSE[tile.offset + query, tile.head, tile.batch]
            if is_present(params.mdLSE):
                dlse = params.mdLSE[tile.offset + query, tile.head, tile.batch]
        return lse, dlse

    @cute.jit
    def write_row(self, params: PrepareParams, tile: QueryTile, row: Int32, is_used: Boolean,
                  values: tuple[Float32, Float32, Float32], sink: Float32) -> Float32:
        """shift and delta of a row of the tile; returns what it adds to d_s_aux. values: rowsum(dO O), LSE, dLSE."""
        shift, delta, of_sink = -Float32.inf, Float32(0.0), Float32(0.0)
        product, lse, dlse = values
        if is_used:
            delta = dlse - product
            shift = -lse / params.scale
            if sink != -Float32.inf:
                below = Float32(0.0) if sink == lse else sink - lse      # of two that are +inf it is NaN
                of_sink = cute.math.exp2(below * LOG2_E, fastmath=True) * delta
            if lse == Float32.inf or lse == -Float32.inf:
                shift, delta = cutlass.min(shift, Float32(0.0)), Float32(0.0)
        params.shift[row, tile.block, tile.head] = shift
        params.delta[row, tile.block, tile.head] = delta
        return of_sink


def place_in_sums(params: PrepareParams, block: Int32, head: Int32) -> tuple[Int32, Int32, Int32]:
    """Of a Q tile and a head: their unit, the tile among the unit's, the head among the group's."""
    _, blocks, group, _ = params.sums.parts.shape
    sequence, kv_head = block // blocks, head // group
    return sequence * (params.order.shape[2] // group) + kv_head, block - sequence * blocks, head - kv_head * group


@cute.jit
def read_step(cfg: Constexpr, gX: cute.Tensor, step: Int32, is_used: Boolean, extent: Int32 | int, thread: Int32
              ) -> cute.Tensor:
    """A thread's pieces of one of its rows, which has so many elements; zeros behind them, and if it is not used."""
    rX = cute.make_rmem_tensor_like(gX[None, 0, None])
    rX.fill(0.0)
    if const_expr(cfg.is_padded):
        for c in cutlass.range_constexpr(cute.size(rX, mode=[1])):
            if is_used and is_in_row(extent, cfg.head_dim, element_type(cfg), thread, c):
                cute.autovec_copy(gX[None, step, c], rX[None, c])
    else:
        if is_used:
            cute.autovec_copy(gX[None, step, None], rX)
    return rX


@cute.jit
def row_sum(rO: cute.Tensor, rdO: cute.Tensor, per_row: Constexpr[int]) -> Float32:
    """rowsum(dO O), of the threads that share a row."""
    product = Float32(0.0)
    for i in cutlass.range_constexpr(cute.size(rO)):
        product += rO[i].to(Float32) * rdO[i].to(Float32)
    for i in cutlass.range_constexpr(per_row.bit_length() - 1):
        product += cute.arch.shuffle_sync_bfly(product, 1 << i)
    return product
