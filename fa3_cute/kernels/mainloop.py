"""Consumer role: S = Q K^T -> online softmax -> O += P V  (FA3 paper, algorithm 2, two-stage intra-warpgroup overlap).

While the tensor core computes S[n], the registers still hold P[n+1]; its PV GEMM is issued right behind, so that
softmax(S[n]) overlaps PV[n+1]:

    tensor core   QK[n] PV[n+1] | QK[n-1] PV[n] | ...
    CUDA cores                  softmax[n]      softmax[n-1]
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Float32, Int32, const_expr

from ..config import FwdConfig
from .arithmetic import maximum
from .barriers import open_turnstile, pass_turn, wait_turn
from .block_range import block_range
from .epilogue import write_lse, write_O
from .layout import as_operand_a, convert, transposed
from .mask import Mask
from .params import FwdMmas, FwdParams, FwdPipelines, FwdSmem
from .scheduler import TileScheduler
from .softmax import OnlineSoftmax
from .wgmma import in_flight, issue_gemm


@dataclass
class Attend:
    """State of one consumer warpgroup. Methods are loop-free verbs; the loops are in `consume`."""
    cfg: Constexpr
    mmas: FwdMmas
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tOrV: cute.Tensor
    tOrP: cute.Tensor
    acc_O: cute.Tensor
    softmax: OnlineSoftmax
    k_consumer: pipeline.PipelineConsumer
    v_consumer: pipeline.PipelineConsumer
    wg_idx: Int32
    q_slot: Int32

    @cute.jit
    def first_qk(self, mask: Mask, n_block: Int32):
        """S[last] alone, there is no P to overlap with yet. P = exp(S), O = 0."""
        acc_S = self.new_acc_S()
        k = self.k_consumer.wait_and_advance()
        wait_turn(self.cfg, self.wg_idx)
        self.start_qk(acc_S, k.index)
        pass_turn(self.cfg, self.wg_idx)
        in_flight(0)
        k.release()
        mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, is_first=True)
        convert(as_operand_a(acc_S), self.tOrP)
        self.acc_O.fill(0.0)

    @cute.jit
    def step(self, mask: Mask, n_block: Int32, is_masked: Constexpr[bool]):
        """S[n] and O += P[n+1] V[n+1] in flight together; then P[n] = exp(S[n])."""
        acc_S = self.new_acc_S()
        k = self.k_consumer.wait_and_advance()
        wait_turn(self.cfg, self.wg_idx)
        self.start_qk(acc_S, k.index)
        v = self.start_pv()
        pass_turn(self.cfg, self.wg_idx)
        in_flight(1)                     # S[n] is complete, PV[n+1] may still run
        k.release()
        if const_expr(is_masked):
            mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, is_first=False)
        in_flight(0)                     # PV[n+1] is complete: acc_O and tOrP are ours again
        v.release()
        convert(as_operand_a(acc_S), self.tOrP)
        if const_expr(not self.cfg.rescale_before_pv):
            self.softmax.rescale(self.acc_O)

    @cute.jit
    def last_pv(self):
        """O += P[first] V[first], then normalise."""
        v = self.start_pv()
        in_flight(0)
        v.release()
        self.softmax.finalize(self.acc_O)

    @cute.jit
    def no_visible_key(self):
        """O = 0 and LSE = -inf: no row of the tile sees a key. Takes no turn and no K or V slot."""
        self.acc_O.fill(0.0)
        self.softmax.no_key()

    def start_qk(self, acc_S: cute.Tensor, k_slot: Int32):
        """S = Q K^T of one K slot, left in flight."""
        tSrQ, tSrK = self.tSrQ[None, None, None, self.q_slot], self.tSrK[None, None, None, k_slot]
        issue_gemm(self.mmas.qk, acc_S, tSrQ, tSrK, zero_init=True)

    def start_pv(self):
        """O += P V of the next V slot, left in flight; returns the slot."""
        if self.cfg.rescale_before_pv:
            self.softmax.rescale(self.acc_O)
        v = self.v_consumer.wait_and_advance()
        issue_gemm(self.mmas.pv, self.acc_O, self.tOrP, self.tOrV[None, None, None, v.index], zero_init=False)
        return v

    def new_acc_S(self) -> cute.Tensor:
        """A fresh S accumulator."""
        return cute.make_rmem_tensor(self.mmas.qk.partition_shape_C((self.cfg.tile_m, self.cfg.tile_n)), Float32)


def make_attend(cfg: FwdConfig, params: FwdParams, mmas: FwdMmas, smem: FwdSmem, pipes: FwdPipelines,
                wg_idx: Int32) -> Attend:
    """Fragments and state of consumer warpgroup `wg_idx`."""
    first_threads = cute.make_layout(cfg.num_consumer_wgs, stride=128)
    wg_qk, wg_pv = mmas.qk.get_slice(first_threads(wg_idx)), mmas.pv.get_slice(first_threads(wg_idx))
    acc_O = cute.make_rmem_tensor(mmas.pv.partition_shape_C((cfg.tile_m, cfg.head_dim)), Float32)
    return Attend(
        cfg, mmas,
        tSrQ=mmas.qk.make_fragment_A(wg_qk.partition_A(smem.sQ)),
        tSrK=mmas.qk.make_fragment_B(wg_qk.partition_B(smem.sK)),
        tOrV=mmas.pv.make_fragment_B(wg_pv.partition_B(transposed(smem.sV))),
        tOrP=mmas.pv.make_fragment_A(mmas.pv.partition_shape_A((cfg.tile_m, cfg.tile_n))),
        acc_O=acc_O,
        softmax=OnlineSoftmax.create(params.softmax_scale_log2, acc_O.shape[0][0] * acc_O.shape[1]),
        k_consumer=pipes.k.make_consumer(), v_consumer=pipes.v.make_consumer(), wg_idx=wg_idx, q_slot=Int32(0))


@cute.jit
def consume(cfg: FwdConfig, params: FwdParams, mmas: FwdMmas, smem: FwdSmem, pipes: FwdPipelines):
    """Attend to every tile that the scheduler hands out, and hand its O to the store warp.

    Runs on: consumer warpgroups.
    Synchronises: waits for the full halves of the Q, K, V rings; empties K and V; fills O.
    """
    tidx = cute.arch.thread_idx()[0] - 128
    wg_idx = cute.arch.make_warp_uniform(tidx // 128)
    attend = make_attend(cfg, params, mmas, smem, pipes, wg_idx)
    q_consumer, o_producer = pipes.q.make_consumer(), pipes.o.make_producer()
    open_turnstile(cfg, wg_idx)

    seqlen_q, seqlen_k = params.q.tensor.shape[0], params.k.tensor.shape[0]
    scheduler = TileScheduler.create(cfg.is_causal, params.grid)
    while scheduler.has_tile():
        tile = scheduler.tile()
        mask = Mask.create(cfg, tidx, tile.m_block, seqlen_q, seqlen_k)
        blocks = block_range(cfg, tile.m_block, seqlen_q, seqlen_k)
        n_block = blocks.n_block_max - 1
        q = q_consumer.wait_and_advance()
        attend.q_slot = q.index
        if n_block >= blocks.n_block_min:
            attend.first_qk(mask, n_block)
            # Two loops, so that the second carries no mask code: 1. tiles on the diagonal  2. the rest
            if const_expr(cfg.is_causal):
                num_masked = maximum(n_block - maximum(blocks.n_block_full_max, blocks.n_block_min), 0)
                for i in cutlass.range(num_masked, unroll=1):
                    attend.step(mask, n_block - 1 - i, is_masked=True)
                n_block -= num_masked
            for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
                attend.step(mask, n_block - 1 - i, is_masked=False)
            attend.last_pv()
        else:
            attend.no_visible_key()
        write_O(cfg, mmas, smem.sQ[None, None, attend.q_slot], attend.acc_O, tidx)
        o_producer.commit()      # no acquire: the Q ring has emptied the slot
        o_producer.advance()
        write_lse(cfg, params, tile, attend.softmax.row_sum, tidx)
        scheduler.advance()
