"""Consumer roles of the kernel of dK and dV: a warpgroup each, with the same 64 keys."""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Float32, Int32, const_expr

from ...planning.pair import PairConfig
from ..common.barriers import sync_consumers, sync_warpgroup
from ..common.layout import as_operand_a, element_type, rounded, transposed
from ..common.sequences import is_present
from ..common.wgmma import in_flight, issue_gemm
from .blocks import KeyTile, query_range
from .gradients import clear_unused_rows, start_at
from .pair_bundles import PairMmas, PairParams, PairPipelines, PairSmem
from .store import store_part, write_slot
from .visible import KeyMask
from .walk import walk_heads
from .workspace import QUAD, in_thread_order, quads_of


@dataclass
class Values:
    """State of the warpgroup of dV. t<GEMM>r<operand>: fragments in shared memory."""
    cfg: Constexpr
    mmas: PairMmas
    smem: PairSmem
    tSrK: cute.Tensor
    tSrQ: cute.Tensor
    tVrdO: cute.Tensor
    acc_dV: cute.Tensor
    sP: cute.Tensor            # this thread's part, (4, quads, slot)
    q_consumer: pipeline.PipelineConsumer
    do_consumer: pipeline.PipelineConsumer
    p_producer: pipeline.PipelineProducer
    scale_log2: Float32
    tidx: Int32

    @cute.jit
    def step(self, mask: KeyMask, m_block: Int32, num_used: Int32, is_masked: Constexpr[bool]):
        """dV of one Q tile. Nothing is in flight before or after.

        num_used   rows of the tile that the sequence has; the others of packed tensors are another's
        """
        cfg = self.cfg
        acc_S = new_scores(cfg, self.mmas)
        q = self.q_consumer.wait_and_advance()
        if const_expr(cfg.is_varlen):
            clear_unused_rows(cfg, (self.smem.sQ[None, None, q.index],), num_used, self.tidx)
        start_at(acc_S, self.smem.sShift[None, q.index], self.tidx)
        issue_gemm(self.mmas.scores, acc_S, self.tSrK[None, None, None, 0], self.tSrQ[None, None, None, q.index],
                   zero_init=False)
        in_flight(0)
        q.release()
        if const_expr(is_masked):
            mask.apply(acc_S, m_block)
        for i in cutlass.range_constexpr(cute.size(acc_S)):
            acc_S[i] = cute.math.exp2(acc_S[i] * self.scale_log2, fastmath=True)
        self.hand_over(acc_S)
        rP = rounded(acc_S, element_type(cfg))
        do = self.do_consumer.wait_and_advance()
        if const_expr(cfg.is_varlen):
            clear_unused_rows(cfg, (self.smem.sdO[None, None, do.index],), num_used, self.tidx)
        issue_gemm(self.mmas.dv, self.acc_dV, as_operand_a(cfg, rP), self.tVrdO[None, None, None, do.index],
                   zero_init=False)
        in_flight(0)
        do.release()

    def start_head(self, mask: KeyMask, head: Int32, sequence: Int32):
        """Nothing is a head's own: there are no features of scores."""

    @cute.jit
    def hand_over(self, acc_P: cute.Tensor):
        """P^T, in FP32, to the thread of the other warpgroup that has the same elements of dP^T."""
        p = self.p_producer.acquire_and_advance()
        cute.autovec_copy(quads_of(acc_P), self.sP[None, None, p.index])
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            p.commit()


@dataclass
class Keys:
    """State of the warpgroup of dK."""
    cfg: Constexpr
    mmas: PairMmas
    smem: PairSmem
    tPrV: cute.Tensor
    tPrdO: cute.Tensor
    tKrQ: cute.Tensor
    acc_dK: cute.Tensor
    sP: cute.Tensor
    q_consumer: pipeline.PipelineConsumer
    do_consumer: pipeline.PipelineConsumer
    p_consumer: pipeline.PipelineConsumer
    tidx: Int32

    @cute.jit
    def step(self, num_used: Int32):
        """dK of one Q tile, what is hidden of which P has as 0. Nothing is in flight before or after."""
        cfg = self.cfg
        acc_dP = new_scores(cfg, self.mmas)
        do = self.do_consumer.wait_and_advance()
        if const_expr(cfg.is_varlen):
            clear_unused_rows(cfg, (self.smem.sdO[None, None, do.index],), num_used, self.tidx)
        start_at(acc_dP, self.smem.sDelta[None, do.index], self.tidx)
        issue_gemm(self.mmas.scores, acc_dP, self.tPrV[None, None, None, 0], self.tPrdO[None, None, None, do.index],
                   zero_init=False)
        acc_P = self.take()
        in_flight(0)
        do.release()
        for i in cutlass.range_constexpr(cute.size(acc_dP)):
            acc_dP[i] = acc_P[i] * acc_dP[i]
        rdS = rounded(acc_dP, element_type(cfg))
        q = self.q_consumer.wait_and_advance()
        if const_expr(cfg.is_varlen):
            clear_unused_rows(cfg, (self.smem.sQ[None, None, q.index],), num_used, self.tidx)
        issue_gemm(self.mmas.dk, self.acc_dK, as_operand_a(cfg, rdS), self.tKrQ[None, None, None, q.index],
                   zero_init=False)
        in_flight(0)
        q.release()

    @cute.jit
    def take(self) -> cute.Tensor:
        """P^T of a tile."""
        p = self.p_consumer.wait_and_advance()
        acc_P = new_scores(self.cfg, self.mmas)
        cute.autovec_copy(self.sP[None, None, p.index], quads_of(acc_P))
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            p.release()
        return acc_P


def new_scores(cfg: PairConfig, mmas: PairMmas) -> cute.Tensor:
    """A fresh accumulator of S^T or dP^T."""
    return cute.make_rmem_tensor(mmas.scores.partition_shape_C((cfg.tile_n, cfg.tile_m)), Float32)


def part_of_P(cfg: PairConfig, sP: cute.Tensor, tidx: Int32) -> cute.Tensor:
    """A thread's part of the slots of P, (4, quads, slot)."""
    return in_thread_order((sP.iterator + QUAD * tidx).align(16), cfg.tile_n * cfg.tile_m, cfg.num_p_stages)


def new_gradient(cfg: PairConfig, mma: cute.TiledMma, columns: int) -> cute.Tensor:
    """dK or dV, 0."""
    acc = cute.make_rmem_tensor(mma.partition_shape_C((cfg.tile_n, columns)), Float32)
    acc.fill(0.0)
    return acc


@cute.jit
def consume_values(cfg: PairConfig, params: PairParams, mmas: PairMmas, smem: PairSmem, pipes: PairPipelines,
                   tile: KeyTile):
    """dV of the CTA's keys. Runs on: the first consumer warpgroup."""
    tidx = cute.arch.thread_idx()[0] % 128
    thread = lambda mma: mma.get_slice(0)
    values = Values(
        cfg, mmas, smem,
        tSrK=mmas.scores.make_fragment_A(thread(mmas.scores).partition_A(smem.sK)),
        tSrQ=mmas.scores.make_fragment_B(thread(mmas.scores).partition_B(smem.sQ)),
        tVrdO=mmas.dv.make_fragment_B(thread(mmas.dv).partition_B(transposed(smem.sdO))),
        acc_dV=new_gradient(cfg, mmas.dv, cfg.dim_v), sP=part_of_P(cfg, smem.sP, tidx),
        q_consumer=pipes.q.make_consumer(), do_consumer=pipes.do.make_consumer(), p_producer=pipes.p.make_producer(),
        scale_log2=params.scale_log2, tidx=tidx)
    mask = KeyMask.create(cfg, params.window, tile, tidx)
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if queries.m_block_max > queries.m_block_min:
        wait_for_keys(cfg, pipes.k, smem.sK, tile, tidx)
    walk_heads(values, mask, queries, params.group)
    store_own_keys(cfg, mmas.dv, values.acc_dV, smem.sV, params.mdV, tile)


@cute.jit
def consume_keys(cfg: PairConfig, params: PairParams, mmas: PairMmas, smem: PairSmem, pipes: PairPipelines,
                 tile: KeyTile):
    """dK of the CTA's keys. Runs on: the second consumer warpgroup."""
    tidx = cute.arch.thread_idx()[0] % 128
    thread = lambda mma: mma.get_slice(0)
    keys = Keys(
        cfg, mmas, smem,
        tPrV=mmas.scores.make_fragment_A(thread(mmas.scores).partition_A(smem.sV)),
        tPrdO=mmas.scores.make_fragment_B(thread(mmas.scores).partition_B(smem.sdO)),
        tKrQ=mmas.dk.make_fragment_B(thread(mmas.dk).partition_B(transposed(smem.sQ))),
        acc_dK=new_gradient(cfg, mmas.dk, cfg.dim_qk), sP=part_of_P(cfg, smem.sP, tidx),
        q_consumer=pipes.q.make_consumer(), do_consumer=pipes.do.make_consumer(), p_consumer=pipes.p.make_consumer(),
        tidx=128 + tidx)
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if queries.m_block_max > queries.m_block_min:
        wait_for_keys(cfg, pipes.v, smem.sV, tile, 128 + tidx)
    for i in cutlass.range(params.group, unroll=1):
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_max, unroll=1):
            keys.step(tile.seqlen_q - m_block * cfg.tile_m)
    for i in cutlass.range_constexpr(cute.size(keys.acc_dK)):
        keys.acc_dK[i] = params.scale * keys.acc_dK[i]
    store_own_keys(cfg, mmas.dk, keys.acc_dK, smem.sK, params.mdK, tile)


@cute.jit
def wait_for_keys(cfg: PairConfig, pipe: pipeline.PipelineTmaAsync, sX: cute.Tensor, tile: KeyTile, tidx: Int32):
    """Until K or V is there; rows behind the sequence's last are zeroed, as TMA does behind the tensor's."""
    pipe.make_consumer().wait_and_advance()
    if const_expr(cfg.is_varlen):
        clear_unused_rows(cfg, (sX[None, None, 0],), tile.seqlen_k - tile.n_block * cfg.tile_n, tidx)


@cute.jit
def store_own_keys(cfg: PairConfig, mma: cute.TiledMma, acc: cute.Tensor, ring: cute.Tensor, mX: cute.Tensor,
                   tile: KeyTile):
    """dK or dV -> the slot of K or V -> rows below seqlen_k; not of a null pointer, a gradient that is not wanted."""
    tidx, wg_idx, slot = cute.arch.thread_idx()[0] % 128, cute.arch.thread_idx()[0] // 128 - 1, ring[None, None, 0]
    rX = rounded(acc, element_type(cfg))
    sync_consumers(cfg)                    # both have read what the other writes to
    if is_present(mX):
        write_slot(mma, rX, slot, tidx)
        sync_warpgroup(wg_idx)
        store_part(cfg, slot, 0, mX, (tile.n_block, tile.offset_k, tile.seqlen_k, tile.kv_head, tile.batch), tidx)
