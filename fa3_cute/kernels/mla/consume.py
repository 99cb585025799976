"""Consumer roles: attention over one split of K, then its merge with the others of the item.

    warpgroup 0   S = Q K^T (+ Q_v V^T), P = exp(S), O_left += P V_left, P in registers
    warpgroup 1   O_right += P V_right, P and the rows' factors from shared memory

named barriers   P_FULL: they are there; P_EMPTY: they have been read.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.mla import MlaConfig
from ..common.arithmetic import ceil_div
from ..common.barriers import BarrierId
from ..common.block_range import first_key
from ..common.copies import clear_unused_rows
from ..common.layout import ROW_STEP, as_operand_a, as_rows_cols, convert, element_type, fragment_col, fragment_row
from ..common.row_end import end_rows, end_rows_without_keys
from ..common.softmax import OnlineSoftmax, Scores
from ..common.visibility import Mask, Visibility
from ..common.wgmma import in_flight, issue_gemm
from ..decode.bundles import DecodePipelines
from ..decode.consume import read_Q
from ..decode.merge import expect_partials, merge_cluster, merge_clusters, send_partial, sink_of
from ..decode.split import SplitWork
from .bundles import MlaMmas, MlaParams, MlaSmem
from .queries import read_Qv
from .store import write_partial

LEFT, RIGHT = 0, 1      # halves of O's columns


@cute.jit
def consume_split(cfg: MlaConfig, params: MlaParams, mmas: MlaMmas, smem: MlaSmem, pipes: DecodePipelines,
                  work: SplitWork):
    """Attend to one split, then merge it with the others of its item.

    Runs on: the consumer warpgroups.
    Synchronises: waits for the full halves of the rings and empties them; merges, see decode/merge.py.
    """
    tidx = cute.arch.thread_idx()[0]
    expect_partials(cfg, params, smem, work, tidx)
    if const_expr(cfg.has_qv):
        read_Qv(cfg, params, smem, work, tidx)
    read_Q(cfg, params, smem, work, tidx, Int32(0))
    if cute.arch.make_warp_uniform(tidx // 128) == 0:
        lead(cfg, params, mmas, smem, pipes, work, tidx)
    else:
        follow(cfg, params, mmas, smem, pipes, work, tidx - 128)
    if params.grid.cluster_size.divisor > 1:
        merge_cluster(cfg, params, smem, work, tidx)
    if work.num_clusters > 1 and work.num_own_rows > 0:
        merge_clusters(cfg, params, smem, work, tidx)


@dataclass
class Leader:
    """State of warpgroup 0. Methods are loop-free verbs.

    tSrQv, tSrV  what S has besides Q and K; None unless cfg.has_qv
    rP           P of the last tile, as the accumulator of S has it
    k_consumer   of slots that S is made of; v_consumer: of those of P V, which may be the same, later
    """
    cfg: Constexpr
    mmas: MlaMmas
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tSrQv: Optional[cute.Tensor]
    tSrV: Optional[cute.Tensor]
    tOrV: cute.Tensor
    acc_O: cute.Tensor
    softmax: OnlineSoftmax
    rP: cute.Tensor
    k_consumer: pipeline.PipelineConsumer
    v_consumer: pipeline.PipelineConsumer
    sP: cute.Tensor
    sFactors: cute.Tensor
    tidx: Int32

    @cute.jit
    def first(self, mask: Mask, n_block: Int32, sV: cute.Tensor):
        """S and P of the first tile, in whose V rows behind the sequence become zero; O is 0."""
        acc_S, k = self.start_S()
        in_flight(0)
        self.release_k(k)
        num_keys = mask.tile.seqlen_k - first_key(self.cfg, n_block)
        if num_keys < self.cfg.tile_n:
            clear_unused_rows(self.cfg, sV, self.v_consumer, num_keys, self.cfg.tile_n, self.tidx)
        self.make_P(acc_S, mask, n_block, True, Scores.FIRST)

    @cute.jit
    def step(self, mask: Mask, n_block: Int32, is_masked: Constexpr[bool]):
        """O += P V of the tile before, and right behind it S of this one; then its P."""
        v = self.start_PV()
        acc_S, k = self.start_S()
        in_flight(2 if self.cfg.has_qv else 1)
        v.release()
        in_flight(0)
        self.release_k(k)
        self.make_P(acc_S, mask, n_block, is_masked, Scores.ANY)
        self.softmax.rescale(self.acc_O)

    @cute.jit
    def last(self):
        """O += P V of the last tile."""
        v = self.start_PV()
        in_flight(0)
        v.release()

    def start_S(self) -> tuple[cute.Tensor, pipeline.PipelineConsumer.ImmutableResourceHandle]:
        """S of the next slot, left in flight."""
        acc_S = cute.make_rmem_tensor_like(self.rP, Float32)
        k = self.k_consumer.wait_and_advance()
        issue_gemm(self.mmas.qk, acc_S, self.tSrQ, self.tSrK[None, None, None, k.index], zero_init=True)
        if self.cfg.has_qv:
            issue_gemm(self.mmas.qk, acc_S, self.tSrQv, self.tSrV[None, None, None, k.index], zero_init=False)
        return acc_S, k

    def release_k(self, k: pipeline.PipelineConsumer.ImmutableResourceHandle):
        """Give K's slot back, whose S is complete; one that V has too goes with P V."""
        if not self.cfg.shares_slots:
            k.release()

    def start_PV(self) -> pipeline.PipelineConsumer.ImmutableResourceHandle:
        """P V of the slot before, left in flight."""
        v = self.v_consumer.wait_and_advance()
        tOrV = self.tOrV[None, None, None, v.index]
        issue_gemm(self.mmas.pv, self.acc_O, as_operand_a(self.cfg, self.rP), tOrV, zero_init=False)
        return v

    @cute.jit
    def make_P(self, acc_S: cute.Tensor, mask: Mask, n_block: Int32, is_masked: Constexpr[bool],
               known: Constexpr[Scores]):
        """P of a tile whose S is there, and the same for the other warpgroup."""
        if const_expr(is_masked):
            mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, known)
        convert(acc_S, self.rP)
        self.hand_over(self.rP)

    @cute.jit
    def hand_over(self, rP: cute.Tensor):
        """P and what O is to be multiplied with before it is added, to the other warpgroup."""
        stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), element_type(self.cfg))
        thread_copy = cute.make_tiled_copy_C(stmatrix, self.mmas.qk).get_slice(self.tidx)
        wait_for_empty()
        cute.copy(thread_copy, thread_copy.retile(rP), thread_copy.partition_D(self.sP))
        self.write_factors(self.softmax.row_scale)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=BarrierId.P_FULL, number_of_threads=256)

    @cute.jit
    def write_factors(self, factors: cute.Tensor):
        """Of the thread's rows, each by one thread."""
        if fragment_col(self.tidx) == 0:
            for r in cutlass.range_constexpr(cute.size(factors)):
                self.sFactors[fragment_row(self.tidx) + ROW_STEP * r] = factors[r]


def wait_for_empty():
    """Until P and the factors before have been read."""
    cute.arch.barrier(barrier_id=BarrierId.P_EMPTY, number_of_threads=256)


@cute.jit
def lead(cfg: MlaConfig, params: MlaParams, mmas: MlaMmas, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork,
         tidx: Int32):
    """S, P, the left half of O, and LSE.

    Runs on: warpgroup 0. Synchronises: K and V ring; P_FULL, P_EMPTY.
    """
    warp_row = cute.arch.make_warp_uniform(tidx // 32) * 16
    num_used = ceil_div(work.num_rows - warp_row, 8)
    acc_O = cute.make_rmem_tensor(mmas.pv.partition_shape_C((cfg.tile_m, cfg.dim_v // 2)), Float32)
    acc_O.fill(0.0)
    softmax = OnlineSoftmax.create(cfg, params.scores.scale_log2, 2, num_used)
    rP = cute.make_rmem_tensor(mmas.qk.partition_shape_C((cfg.tile_m, cfg.tile_n)), element_type(cfg))
    tSrQv = tSrV = None
    if const_expr(cfg.has_qv):
        tSrQv, tSrV = operand_a(mmas.qk, smem.sQv), operand_b(mmas.qk, smem.sV)
    leader = Leader(cfg, mmas, operand_a(mmas.qk, smem.sQ), operand_b(mmas.qk, smem.sK), tSrQv, tSrV,
                    operand_b(mmas.pv, half_of(cfg, smem.sVt, LEFT)), acc_O, softmax, rP,
                    pipes.k.make_consumer(), pipes.v.make_consumer(), smem.sP[None, None, 0], smem.sFactors, tidx)
    mask = Visibility(cfg, params.window, work.tile, params.grid.packed_heads).of_thread(tidx)
    factors, sinks = row_tensor(1.0), own_sinks(cfg, params, work, tidx)
    blocks = work.blocks
    n_block = blocks.n_block_max - 1
    if n_block >= blocks.n_block_min:
        leader.first(mask, n_block, smem.sV)
        if const_expr(cfg.is_local):
            num_right = blocks.num_cut_right(n_block)
            for i in cutlass.range(num_right, unroll=1):
                leader.step(mask, n_block - 1 - i, is_masked=True)
            n_block -= num_right
        for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
            leader.step(mask, n_block - 1 - i, is_masked=False)
        leader.last()
        end_rows(leader.softmax, factors, None, sinks)
    else:
        end_rows_without_keys(leader.softmax, factors, sinks)
    factors = as_rows_cols(factors)[None, 0]
    wait_for_empty()
    leader.write_factors(factors)
    cute.arch.barrier_arrive(barrier_id=BarrierId.P_FULL, number_of_threads=256)
    multiply_rows(leader.acc_O, factors)
    deliver(cfg, params, smem, work, leader.acc_O, leader.softmax.row_sum, tidx, LEFT)


@cute.jit
def follow(cfg: MlaConfig, params: MlaParams, mmas: MlaMmas, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork,
           tidx: Int32):
    """The right half of O.

    Runs on: warpgroup 1. Synchronises: V ring; P_FULL, P_EMPTY.
    """
    acc_O = cute.make_rmem_tensor(mmas.follow.partition_shape_C((cfg.tile_m, cfg.dim_v // 2)), Float32)
    acc_O.fill(0.0)
    tOrP = operand_a(mmas.follow, smem.sP)
    tOrV = operand_b(mmas.follow, half_of(cfg, smem.sVt, RIGHT))
    v_consumer = pipes.v.make_consumer()
    factors = cute.make_rmem_tensor(2, Float32)
    cute.arch.barrier_arrive(barrier_id=BarrierId.P_EMPTY, number_of_threads=256)
    for _ in cutlass.range(work.blocks.n_block_max - work.blocks.n_block_min, unroll=1):
        v = v_consumer.wait_and_advance()
        read_factors(smem.sFactors, factors, tidx)
        multiply_rows(acc_O, factors)
        issue_gemm(mmas.follow, acc_O, tOrP, tOrV[None, None, None, v.index], zero_init=False)
        in_flight(0)
        cute.arch.barrier_arrive(barrier_id=BarrierId.P_EMPTY, number_of_threads=256)
        v.release()
    read_factors(smem.sFactors, factors, tidx)
    multiply_rows(acc_O, factors)
    deliver(cfg, params, smem, work, acc_O, factors, tidx, RIGHT)


@cute.jit
def read_factors(sFactors: cute.Tensor, factors: cute.Tensor, tidx: Int32):
    """Of the thread's rows, once they and P are there."""
    cute.arch.barrier(barrier_id=BarrierId.P_FULL, number_of_threads=256)
    for r in cutlass.range_constexpr(cute.size(factors)):
        factors[r] = sFactors[fragment_row(tidx) + ROW_STEP * r]


@cute.jit
def multiply_rows(acc_O: cute.Tensor, factors: cute.Tensor):
    """Each row with its factor."""
    O = as_rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(factors)):
        O[r, None].store(O[r, None].load() * factors[r])


@cute.jit
def deliver(cfg: MlaConfig, params: MlaParams, smem: MlaSmem, work: SplitWork, acc_O: cute.Tensor,
            lse: cute.Tensor, tidx: Int32, half: Constexpr[int]):
    """acc_O, normalised, to those that merge it, or where it is the item's to out; the left half has the LSE.

    Runs on: both warpgroups, each its half. Synchronises: the cluster, once.
    """
    cute.arch.griddepcontrol_launch_dependents()
    if params.grid.cluster_size.divisor > 1:
        send_partial(cfg, params, smem, work, acc_O, lse, tidx, half)
    else:
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        write_partial(cfg, params, work, acc_O, lse, tidx, half)


@cute.jit
def own_sinks(cfg: MlaConfig, params: MlaParams, work: SplitWork, tidx: Int32) -> cute.Tensor:
    """Of the thread's rows, -inf where the rows do not end here."""
    sinks = cute.make_rmem_tensor(2, Float32)
    sinks.fill(-Float32.inf)
    if params.grid.cluster_size.divisor * work.num_clusters == 1:
        for r in cutlass.range_constexpr(cute.size(sinks)):
            sinks[r] = sink_of(cfg, params, work, fragment_row(tidx) + ROW_STEP * r)
    return sinks


def row_tensor(value: float) -> cute.Tensor:
    """An accumulator of one column: one number for each of a thread's rows."""
    acc = cute.make_rmem_tensor(((1, 2, 1), 1, 1), Float32)
    acc.fill(value)
    return acc


def half_of(cfg: MlaConfig, sVt: cute.Tensor, half: int) -> cute.Tensor:
    """Half of V's columns: (dim_v / 2, tile_n, slot)."""
    return cute.local_tile(sVt, (cfg.dim_v // 2, cfg.tile_n), (half, 0, None))


def operand_a(mma: cute.TiledMma, sX: cute.Tensor) -> cute.Tensor:
    """Of a ring with one slot, in shared memory."""
    return mma.make_fragment_A(mma.get_slice(0).partition_A(sX))[None, None, None, 0]


def operand_b(mma: cute.TiledMma, sX: cute.Tensor) -> cute.Tensor:
    """Of a ring, in shared memory."""
    return mma.make_fragment_B(mma.get_slice(0).partition_B(sX))
