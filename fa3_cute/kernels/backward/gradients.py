"""One consumer warpgroup's part of a backward pass: 64 keys, whose dK and dV stay in its registers while Q tiles pass.

    S^T  = K Q^T           A = K, B = Q, both K-major
    dP^T = V dO^T          A = V, B = dO
    P^T  = exp(scale S^T - LSE)     no maximum, no sum: the forward has left the LSE
    dV  += P^T dO          A = P^T from registers, B = dO read MN-major from the slot that dP^T reads K-major
    dS^T = P^T (dP^T - D)  to shared memory, transposed by stmatrix: keys contiguous
    dK  += dS^T Q          A = dS^T from registers, B = Q read MN-major
    dQ   = dS K            of all warpgroups' dS; A = dS K-major, B = K MN-major; or dQ^T = K^T dS^T
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr
from cutlass.experimental import primitives

from ...planning.backward import BackwardConfig, GradientFields
from ..common.copies import clear_rows
from ..common.barriers import pass_turn, sync_warpgroup, wait_turn
from ..common.layout import as_operand_a, element_type, rounded, transposed, unhoisted
from ..common.wgmma import in_flight, issue_gemm
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .outgoing import wait_until_free
from .scores import Exponents, Scores
from .visible import KeyMask
from .workspace import QUAD, in_thread_order, quads_of


@dataclass
class Gradients:
    """State of one consumer warpgroup. t<GEMM>r<operand>: fragments in shared memory.

    turn, of its methods: Q tiles so far. The rings have two slots, that of dQ one of each warpgroup, and turn together.
    """
    cfg: Constexpr
    mmas: BwdMmas
    smem: BwdSmem
    tSrK: cute.Tensor
    tSrQ: cute.Tensor
    tPrV: cute.Tensor
    tPrdO: cute.Tensor
    tVrdO: cute.Tensor
    tKrQ: cute.Tensor
    tQrA: cute.Tensor          # dS, or K^T if cfg.is_dq_transposed
    tQrB: cute.Tensor          # K, or dS
    tSsdS: cute.Tensor         # where this thread's dS^T goes, (.., slot)
    store_dS: cute.TiledCopy
    acc_dK: cute.Tensor
    acc_dV: cute.Tensor
    pipes: BwdPipelines
    wg_idx: Int32
    sdQ: cute.Tensor           # this warpgroup's part of dQ, (4, quads) of this thread
    scale_log2: Float32
    tidx: Int32
    scores: Optional[Scores]
    slope: Optional[Float32]   # of ALiBi and the query head; None without

    @cute.jit
    def step(self, mask: KeyMask, m_block: Int32, turn: Int32, is_masked: Constexpr[bool]):
        """dV, dK and dQ of one Q tile. Nothing is in flight before or after: what is in flight from one round of a loop
        to the next, ptxas waits for at every WGMMA (C7514). dQ is sent while dK runs."""
        q = do = ds = filled(turn)
        self.wait_for_queries(q, mask, m_block)
        self.wait_for_douts(do, mask, m_block)
        acc_S, acc_dP = self.start_S_and_dP(turn & 1)
        in_flight(1)                     # S is complete, dP may still run
        if const_expr(self.cfg.has_softcap):
            self.scores.cap(acc_S)
        if const_expr(is_masked):
            mask.apply(acc_S, m_block)
        self.start_dV(self.make_P(acc_S, mask, m_block, turn & 1), turn & 1)
        in_flight(1)                     # dP is complete, dV may still run
        rdS = self.write_dS(self.score_gradients(acc_S, acc_dP), turn)
        commit_written(self.pipes.ds, emptied(turn))
        self.pipes.ds.consumer_wait(ds)  # every warpgroup's
        acc_dQ = self.start_dQ(turn & 1)
        in_flight(1)                     # dV
        self.pipes.do.consumer_release(do)
        self.start_dK(rdS, turn & 1)
        in_flight(1)                     # dQ
        self.release_dS(ds)
        self.send_dQ(acc_dQ, turn)
        in_flight(0)                     # dK
        self.pipes.q.consumer_release(q)

    @cute.jit
    def step_behind(self, mask: KeyMask, m_block: Int32, turn: Int32, is_masked: Constexpr[bool],
                    has_dq: Constexpr[bool], is_first: Constexpr[bool] = False):
        """dV and dK of one Q tile and dQ of the one before it, whose dS no warpgroup has to wait for: it runs under the
        exponentials. Nothing is in flight before or after. is_first: of a tile of keys, before whose dS the gradients
        of the last one have left its slots."""
        q = do = filled(turn)
        self.wait_for_queries(q, mask, m_block)
        wait_turn(self.cfg, self.wg_idx)
        acc_S = self.start_S(turn & 1)
        if const_expr(has_dq):
            ds = filled(turn - 1)
            self.pipes.ds.consumer_wait(ds)
            acc_dQ = self.start_dQ((turn - 1) & 1)
        in_flight(int(has_dq))           # S is complete
        pass_turn(self.cfg, self.wg_idx)
        if const_expr(self.cfg.has_softcap):
            self.scores.cap(acc_S)
        if const_expr(is_masked):
            mask.apply(acc_S, m_block)
        rP = self.make_P(acc_S, mask, m_block, turn & 1)
        self.wait_for_douts(do, mask, m_block)
        if const_expr(has_dq):
            in_flight(0)                 # dQ
            self.release_dS(ds)
            self.write_dQ(acc_dQ, turn - 1)  # before dP needs its registers
            if const_expr("dQ" not in self.cfg.late_fences):
                commit_written(self.pipes.dq, self.dQ_slot(turn - 1))
        acc_dP = self.start_dP(turn & 1)
        self.start_dV(rP, turn & 1)
        if const_expr(has_dq and "dQ" in self.cfg.late_fences):
            commit_written(self.pipes.dq, self.dQ_slot(turn - 1))
        in_flight(1)                     # dP
        if const_expr(is_first):
            wait_until_free(self.cfg)
        rdS = self.write_dS(self.score_gradients(acc_S, acc_dP), turn)
        if const_expr("dS" not in self.cfg.late_fences):
            commit_written(self.pipes.ds, emptied(turn))
        self.start_dK(rdS, turn & 1)
        if const_expr("dS" in self.cfg.late_fences):
            commit_written(self.pipes.ds, emptied(turn))
        in_flight(1)                     # dV
        self.pipes.do.consumer_release(do)
        in_flight(0)                     # dK
        self.pipes.q.consumer_release(q)

    def has_turn(self, turn: Int32) -> Boolean:
        """This warpgroup computes dQ of the Q tile of that turn: one slot of dS and of dQ is its alone."""
        return turn & 1 == self.wg_idx

    @cute.jit
    def finish_dQ(self, turn: Int32):
        """Of the last Q tile, the one of this turn, after step_behind."""
        ds = filled(turn)
        self.pipes.ds.consumer_wait(ds)
        acc_dQ = self.start_dQ(turn & 1)
        in_flight(0)
        self.release_dS(ds)
        self.send_dQ(acc_dQ, turn)

    @cute.jit
    def wait_for_queries(self, q: pipeline.PipelineState, mask: KeyMask, m_block: Int32):
        """Until Q tile m_block is there."""
        self.pipes.q.consumer_wait(q)
        if const_expr(self.cfg.is_varlen):
            self.clear_unused(self.smem.sQ[None, None, q.index], mask, m_block)

    @cute.jit
    def wait_for_douts(self, do: pipeline.PipelineState, mask: KeyMask, m_block: Int32):
        """Until its dO is there."""
        self.pipes.do.consumer_wait(do)
        if const_expr(self.cfg.is_varlen):
            self.clear_unused(self.smem.sdO[None, None, do.index], mask, m_block)

    @cute.jit
    def clear_unused(self, slot: cute.Tensor, mask: KeyMask, m_block: Int32):
        """Of a Q tile the rows behind the sequence's last."""
        clear_unused_rows(self.cfg, (slot,), mask.tile.seqlen_q - m_block * self.cfg.tile_m, self.tidx)

    @cute.jit
    def write_dS(self, rdS: cute.Tensor, turn: Int32) -> cute.Tensor:
        """This warpgroup's dS to shared memory, for all of them; returns it."""
        slot = emptied(turn)
        self.pipes.ds.producer_acquire(slot)
        store, target = self.store_dS, self.tSsdS
        if const_expr("dS" in self.cfg.finds_places_again):
            store, target = places_of_dS(self.cfg, self.mmas, self.smem, unhoisted(self.tidx))
        cute.copy(store, store.retile(rdS), target[None, None, None, slot.index])
        return rdS

    @cute.jit
    def release_dS(self, ds: pipeline.PipelineState):
        """This warp has read every warpgroup's dS."""
        with cute.arch.elect_one():
            self.pipes.ds.consumer_release(ds)

    @cute.jit
    def start_S_and_dP(self, slot: Int32):
        """S^T = K Q^T and dP^T = V dO^T of a pair of slots, left in flight.

        Start values are written before the first WGMMA of both is issued: ptxas would wait for it otherwise (C7517).
        """
        acc_S = self.start_values(self.smem.sShift, slot, self.cfg.has_softcap)
        acc_dP = self.start_values(self.smem.sDelta, slot)
        issue_gemm(self.mmas.sdp, acc_S, self.tSrK[None, None, None, 0], self.tSrQ[None, None, None, slot],
                   zero_init=self.cfg.has_softcap)
        issue_gemm(self.mmas.sdp, acc_dP, self.tPrV[None, None, None, 0], self.tPrdO[None, None, None, slot],
                   zero_init=False)
        return acc_S, acc_dP

    @cute.jit
    def start_S(self, slot: Int32):
        """S^T of a slot of Q, left in flight."""
        acc_S = self.start_values(self.smem.sShift, slot, self.cfg.has_softcap)
        issue_gemm(self.mmas.sdp, acc_S, self.tSrK[None, None, None, 0], self.tSrQ[None, None, None, slot],
                   zero_init=self.cfg.has_softcap)
        return acc_S

    @cute.jit
    def start_dP(self, slot: Int32):
        """dP^T of a slot of dO, left in flight."""
        acc_dP = self.start_values(self.smem.sDelta, slot)
        issue_gemm(self.mmas.sdp, acc_dP, self.tPrV[None, None, None, 0], self.tPrdO[None, None, None, slot],
                   zero_init=False)
        return acc_dP

    @cute.jit
    def start_values(self, sX: cute.Tensor, slot: Int32, is_zero: Constexpr[bool] = False):
        """An accumulator of S^T or dP^T that starts at its queries' values, or at what a GEMM zeroes."""
        acc = cute.make_rmem_tensor(self.mmas.sdp.partition_shape_C((self.cfg.tile_n, self.cfg.tile_m)), Float32)
        if const_expr(not is_zero):
            start_at(acc, sX[None, slot], self.tidx)
        return acc

    def start_dV(self, rP: cute.Tensor, slot: Int32):
        """dV += P^T dO of one dO slot, left in flight."""
        issue_gemm(self.mmas.dkv, self.acc_dV, as_operand_a(self.cfg, rP), self.tVrdO[None, None, None, slot],
                   zero_init=False)

    def start_dK(self, rdS: cute.Tensor, slot: Int32):
        """dK += dS^T Q of one Q slot, left in flight."""
        issue_gemm(self.mmas.dkv, self.acc_dK, as_operand_a(self.cfg, rdS), self.tKrQ[None, None, None, slot],
                   zero_init=False)

    @cute.jit
    def make_P(self, acc_S: cute.Tensor, mask: KeyMask, m_block: Int32, q_slot: Int32) -> cute.Tensor:
        """S -> P in place, in FP32, with softcap what scores.py calls x -> W; returns P, rounded."""
        if const_expr(self.cfg.transforms_scores):
            rP = cute.make_rmem_tensor_like(acc_S, element_type(self.cfg))
            self.exponents(acc_S, mask, m_block, q_slot).make_P(acc_S, True, rP)
        else:
            for i in cutlass.range_constexpr(cute.size(acc_S)):
                acc_S[i] = cute.math.exp2(acc_S[i] * self.scale_log2, fastmath=True)
            rP = rounded(acc_S, element_type(self.cfg))
        return rP

    def exponents(self, acc_S: cute.Tensor, mask: KeyMask, m_block: Int32, q_slot: Int32) -> Exponents:
        """Of a Q tile."""
        shift = of_columns(acc_S, self.smem.sShift[None, q_slot], self.tidx) if self.cfg.has_softcap else None
        to_diagonal = None
        if self.cfg.has_alibi:
            to_diagonal = tuple(Float32(mask.to_diagonal(r, m_block)) for r in range(2))
        return Exponents(self.cfg, self.scores.factor, column_shift=shift, shift_factor=self.scale_log2,
                         slope=self.slope, to_diagonal=to_diagonal)

    def start_head(self, head: Int32, sequence: Int32):
        """Read what is the same for all scores of a query head."""
        if self.cfg.has_alibi:
            self.slope = self.scores.slope_of(head, sequence)

    @cute.jit
    def score_gradients(self, P: cute.Tensor, acc_dP: cute.Tensor) -> cute.Tensor:
        """P, dP -> dS, rounded."""
        for i in cutlass.range_constexpr(cute.size(acc_dP)):
            acc_dP[i] = P[i] * acc_dP[i]
        return rounded(acc_dP, element_type(self.cfg))

    def start_dQ(self, ds_slot: Int32) -> cute.Tensor:
        """This warpgroup's part of dQ, left in flight."""
        cfg, dq = self.cfg, self.mmas.dq
        is_transposed = cfg.is_dq_transposed
        shape = (cfg.head_dim, cfg.tile_m) if is_transposed else (cfg.tile_m, cfg.head_dim)
        acc_dQ = cute.make_rmem_tensor(dq.partition_shape_C(shape), Float32)
        a_slot, b_slot = (0, ds_slot) if is_transposed else (ds_slot, 0)
        issue_gemm(dq, acc_dQ, self.tQrA[None, None, None, a_slot], self.tQrB[None, None, None, b_slot], zero_init=True)
        return acc_dQ

    @cute.jit
    def dQ_slot(self, turn: Int32) -> pipeline.PipelineState:
        """The warpgroup's, in that turn."""
        slot = emptied(turn)
        if const_expr(not self.cfg.is_dq_in_turns):
            slot = pipeline.PipelineState(self.cfg.num_consumer_wgs, turn, self.wg_idx, turn & 1 ^ 1)
        return slot

    @cute.jit
    def wait_for_dQ_place(self, turn: Int32):
        """Until what was sent before this turn is read, and the warpgroup's slot free for something else."""
        if const_expr(self.cfg.is_dq_in_turns):
            if not self.has_turn(turn):
                turn += 1
        self.pipes.dq.producer_acquire(self.dQ_slot(turn))

    @cute.jit
    def write_dQ(self, acc_dQ: cute.Tensor, turn: Int32):
        """To its slot, in thread order."""
        self.pipes.dq.producer_acquire(self.dQ_slot(turn))
        place = self.sdQ
        if const_expr("dQ" in self.cfg.finds_places_again):
            place = place_of_dQ(self.cfg, self.smem, self.wg_idx, unhoisted(self.tidx))
        cute.autovec_copy(quads_of(acc_dQ), place)

    @cute.jit
    def send_dQ(self, acc_dQ: cute.Tensor, turn: Int32):
        """The same, and the warp that adds it is told."""
        self.write_dQ(acc_dQ, turn)
        commit_written(self.pipes.dq, self.dQ_slot(turn))


@cute.jit
def commit_written(pipe: pipeline.PipelineAsync, slot: pipeline.PipelineState):
    """A slot that the warp has written, once TMA and WGMMA see it: the fence waits until all is written."""
    cute.arch.fence_view_async_shared()
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        pipe.producer_commit(slot)


def filled(turn: Int32) -> pipeline.PipelineState:
    """A consumer's place in a ring of two slots."""
    return pipeline.PipelineState(2, turn, turn & 1, (turn >> 1) & 1)


def emptied(turn: Int32) -> pipeline.PipelineState:
    """A producer's."""
    return pipeline.PipelineState(2, turn, turn & 1, (turn >> 1) & 1 ^ 1)


@cute.jit
def clear_unused_rows(cfg: GradientFields, slots: tuple[cute.Tensor, ...], num_used: Int32, tidx: Int32):
    """Zero the rows from num_used on of the tiles in some slots: they may hold NaN, which P = dS = 0 would not silence.

    Each warpgroup does it for itself, so that none waits for another: they write the same zeros. In split.py those do
    whose products need it.
    """
    rows = cute.size(slots[0], mode=[0])
    if num_used < rows:
        thread = cute.arch.shuffle_sync_bfly(cute.arch.thread_idx()[0], 0) % 128   # as unhoisted, of fewer registers
        for slot in slots:
            clear_rows(cfg, slot, num_used, rows, thread, 128)
        cute.arch.fence_view_async_shared()
        sync_warpgroup(tidx // 128)


@cute.jit
def start_at(acc: cute.Tensor, sX: cute.Tensor, tidx: Int32):
    """acc[j, i] = sX[i]: the rows of the accumulator are keys, the columns queries.

    Each element in a register of its own: two that share a value would be one variable, copied when the WGMMA is
    issued, and ptxas would wait for the GEMM in flight before that (C7517).
    """
    columns = of_columns(acc, sX, tidx)
    values = cute.make_rmem_tensor(columns.shape, Float32)
    cute.autovec_copy(columns, values)
    for i in cutlass.range_constexpr(cute.size(acc)):
        value = values[i % 2, i // QUAD]
        if const_expr(i // 2 % 2 == 1):
            value = primitives.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])
        acc[i] = value


def of_columns(acc: cute.Tensor, sX: cute.Tensor, tidx: Int32) -> cute.Tensor:
    """sX[i] of the columns i of the thread's elements of an accumulator, (2, pairs of neighbouring columns)."""
    return cute.make_tensor(sX.iterator + 2 * (tidx % 4),
                            cute.make_layout((2, cute.size(acc) // QUAD), stride=(1, 8)))


def places_of_dS(cfg: BackwardConfig, mmas: BwdMmas, smem: BwdSmem, tidx: Int32) -> tuple[cute.TiledCopy, cute.Tensor]:
    """Gradients.store_dS and tSsdS of a thread."""
    stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(True, 4), element_type(cfg))
    store = cute.make_tiled_copy_C(stmatrix, mmas.sdp).get_slice(tidx)
    return store, store.partition_D(transposed(smem.sdS))


def place_of_dQ(cfg: BackwardConfig, smem: BwdSmem, wg_idx: Int32, tidx: Int32) -> cute.Tensor:
    """Gradients.sdQ of a thread."""
    return in_thread_order(smem.sdQ[None, wg_idx].iterator + QUAD * (tidx % 128), cfg.dq_part)[None, None, 0]


def make_gradients(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines,
                   tidx: Int32, wg_idx: Int32) -> Gradients:
    """Fragments and state of consumer warpgroup `wg_idx`."""
    first_threads = cute.make_layout(cfg.num_consumer_wgs, stride=128)
    part = lambda mma: mma.get_slice(first_threads(wg_idx))
    operand_a = lambda mma, sX: mma.make_fragment_A(part(mma).partition_A(sX))
    operand_b = lambda mma, sX: mma.make_fragment_B(part(mma).partition_B(sX))
    dq_part = mmas.dq.get_slice(0 if cfg.is_dq_in_turns else first_threads(wg_idx))
    sKt = transposed(smem.sK)
    sA, sB = (sKt, smem.sdS) if cfg.is_dq_transposed else (smem.sdS, sKt)
    store_dS, tSsdS = places_of_dS(cfg, mmas, smem, tidx)
    acc_dK, acc_dV = (cute.make_rmem_tensor(mmas.dkv.partition_shape_C((cfg.tile_n, cfg.head_dim)), Float32)
                      for _ in range(2))
    sdQ = place_of_dQ(cfg, smem, wg_idx, tidx)
    return Gradients(
        cfg, mmas, smem,
        tSrK=operand_a(mmas.sdp, smem.sK), tSrQ=operand_b(mmas.sdp, smem.sQ),
        tPrV=operand_a(mmas.sdp, smem.sV), tPrdO=operand_b(mmas.sdp, smem.sdO),
        tVrdO=operand_b(mmas.dkv, transposed(smem.sdO)), tKrQ=operand_b(mmas.dkv, transposed(smem.sQ)),
        tQrA=mmas.dq.make_fragment_A(dq_part.partition_A(sA)), tQrB=mmas.dq.make_fragment_B(dq_part.partition_B(sB)),
        tSsdS=tSsdS, store_dS=store_dS, acc_dK=acc_dK, acc_dV=acc_dV,
        pipes=pipes, wg_idx=wg_idx, sdQ=sdQ, scale_log2=params.scale_log2, tidx=tidx,
        scores=params.scores, slope=Float32(0.0) if cfg.has_alibi else None)
