"""Consumer roles where each warpgroup has a GEMM of its own (planning/backward.py, is_split): of the CTA's 96 keys one
computes S and P, one dP and dS, one dQ; dV^T and dK^T stay in their registers, in blocks of 64 columns.

    scores     S  = Q K^T       P  = exp(scale S - LSE) -> shared memory         blocks 0 and 2 of dV, 0 of dK
    products   dP = dO V^T      dS = P (dP - D)         -> shared memory         block 1 of each
    queries    dQ = dS K        -> shared memory, 64 columns at a time           block 2 of dK

    dV^T += dO^T P   dK^T += Q^T dS    A = 64 columns of dO or Q, B = P or dS, all read MN-major

At head_dim 192 shared memory limits a kernel of all gradients: A and B of S and dP are read by one WGMMA each here,
where each of three warpgroups with a third of the keys would read A anew. Registers are dealt out by need
(ROLE_REGISTERS); the scores role has no room for all of S and computes it half by half.
"""
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Constexpr, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ...planning.backward import BackwardConfig
from ...planning.config import ROWS_PER_WARPGROUP
from ..common.layout import CONVERT_CHUNK, ROW_STEP, as_rows_cols, element_type, fragment_row, rounded, transposed
from ..common.wgmma import in_flight, issue_gemm, part_of
from .bundles import BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .frame import scores_mma
from .gradients import clear_unused_rows, commit_written, emptied, filled
from .outgoing import wait_until_free
from .visible import RowMask
from .workspace import QUAD, in_thread_order, quads_of

SCORES, PRODUCTS, QUERIES = range(3)    # roles, by the index of their warpgroup
BLOCKS_OF_DV = {SCORES: (0, 2), PRODUCTS: (1,), QUERIES: ()}
P, DS = 0, 1    # slots of smem.sdS


def make_split_mmas(cfg: BackwardConfig) -> BwdMmas:
    """sdp of one warpgroup, dkv of all; dkv_part: of half the keys, S's and those that leave."""
    element, k, mn = element_type(cfg), OperandMajorMode.K, OperandMajorMode.MN
    mma = lambda a, b, warpgroups, columns: sm90.make_trivial_tiled_mma(
        element, element, a, b, Float32, (warpgroups, 1, 1), (ROWS_PER_WARPGROUP, columns))
    dq = mma(k, mn, 1, ROWS_PER_WARPGROUP)
    return BwdMmas(sdp=scores_mma(cfg, 1, cfg.tile_n), dkv=mma(mn, mn, cfg.num_consumer_wgs, cfg.tile_n), dq=dq,
                   dkv_part=scores_mma(cfg, 1, cfg.tile_n // 2), dq_part=dq)


def full(turn: Int32) -> pipeline.PipelineState:
    """A consumer's place in a ring of one slot."""
    return pipeline.PipelineState(1, turn, Int32(0), turn & 1)


def empty(turn: Int32) -> pipeline.PipelineState:
    """A producer's."""
    return pipeline.PipelineState(1, turn, Int32(0), turn & 1 ^ 1)


@cute.jit
def release(pipe: pipeline.PipelineAsync, slot: pipeline.PipelineState):
    """This warp has read a slot that threads fill."""
    with cute.arch.elect_one():
        pipe.consumer_release(slot)


@dataclass
class Columns:
    """State of one role. t<GEMM>r<operand>: fragments in shared memory.

    turn, of its methods: Q tiles so far. Nothing is in flight before or after a method that passes one.
    """
    cfg: Constexpr
    role: Constexpr
    mmas: BwdMmas
    smem: BwdSmem
    pipes: BwdPipelines
    tVrdO: tuple               # of each block of dV
    tKrQ: cute.Tensor
    tKrP: cute.Tensor          # P and dS
    tOwnA: cute.Tensor         # of S, dP or dQ
    tOwnB: cute.Tensor
    accs_dV: tuple             # of each block
    acc_dK: cute.Tensor
    scale_log2: Float32
    tidx: Int32                # in the warpgroup

    def start_head(self, head: Int32, sequence: Int32):
        """Nothing is a head's own: there are no features of scores."""

    @cute.jit
    def start_dV(self, turn: Int32):
        """dV^T += dO^T P, the role's blocks, left in flight as one group: when all warps, the role's own too, have
        written P."""
        self.pipes.p.consumer_wait(full(turn))
        warpgroup.fence()
        mma = cute.make_mma_atom(self.mmas.dkv.op)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        for block in cutlass.range_constexpr(len(self.accs_dV)):
            A, acc = self.tVrdO[block][None, None, None, turn & 1], self.accs_dV[block]
            for k in cutlass.range_constexpr(cute.size(A, mode=[2])):
                cute.gemm(mma, acc, A[None, None, k], self.tKrP[None, None, k, P], acc)
        warpgroup.commit_group()

    @cute.jit
    def start_dK(self, turn: Int32):
        """dK^T += Q^T dS, left in flight: when all warps have written dS."""
        self.pipes.ds.consumer_wait(full(turn))
        issue_gemm(self.mmas.dkv, self.acc_dK, self.tKrQ[None, None, None, turn & 1], self.tKrP[None, None, None, DS],
                   zero_init=False)

    @cute.jit
    def wait_for_keys(self, num_used: Int32, number: Int32):
        """Until K and V are there, the CTA's number-th. num_used: keys that are the sequence's. Rows behind them are
        zeroed by the role whose products, dP or dQ, have zeros of P or dS as factors; S of theirs is masked."""
        self.pipes.v.consumer_wait(full(number))
        self.pipes.k.consumer_wait(full(number))
        if const_expr(self.cfg.is_varlen and self.role != SCORES):
            sX = self.smem.sV if const_expr(self.role == PRODUCTS) else self.smem.sK
            clear_unused_rows(self.cfg, (sX[None, None, 0],), num_used, self.thread())

    @cute.jit
    def wait_for_queries(self, turn: Int32, num_used: Int32):
        """Until a Q tile is there. num_used: its rows that are the sequence's. Those behind them are zeroed, for all
        roles: others multiply them behind P or dS. Runs on: scores."""
        self.pipes.q.consumer_wait(filled(turn))
        if const_expr(self.cfg.is_varlen):
            clear_unused_rows(self.cfg, (self.smem.sQ[None, None, turn & 1],), num_used, self.thread())

    @cute.jit
    def wait_for_douts(self, turn: Int32, num_used: Int32):
        """Until its dO is there."""
        self.pipes.do.consumer_wait(filled(turn))
        if const_expr(self.cfg.is_varlen):
            clear_unused_rows(self.cfg, (self.smem.sdO[None, None, turn & 1],), num_used, self.thread())

    def thread(self) -> Int32:
        """Among the consumers."""
        return self.role * 128 + self.tidx

    def values(self, sX: cute.Tensor, turn: Int32) -> list[Float32]:
        """Of the thread's two rows of a Q tile."""
        row = fragment_row(self.tidx)
        return [sX[row + r * ROW_STEP, turn & 1] for r in range(2)]

    def copy_of(self, op) -> cute.TiledCopy:
        """Of a thread's elements of P or dS, 16 columns at a time (`columns_of`)."""
        atom = cute.make_copy_atom(op(False, 4), element_type(self.cfg))
        return cute.make_tiled_copy_C(atom, self.mmas.sdp).get_slice(self.tidx)

    # ---- scores: a consumer of consume.walk ----------------------------------------------------
    @cute.jit
    def step_behind(self, mask: RowMask, m_block: Int32, turn: Int32, is_masked: Constexpr[bool],
                    has_dq: Constexpr[bool], is_first: Constexpr[bool] = False):
        """P of one Q tile; if has_dq, dV and dK of the one before it. is_first: of a tile of keys, before which the
        gradients of the last one have left what is written to."""
        num_used = mask.tile.seqlen_q - m_block * self.cfg.tile_m
        self.wait_for_queries(turn, num_used)
        shifts = self.values(self.smem.sShift, turn)
        for half in cutlass.range_constexpr(2):
            acc_S = self.start_S(turn, half)
            if const_expr(has_dq and half == 0):
                self.start_dV(turn - 1)
            elif const_expr(has_dq):
                self.start_dK(turn - 1)
            in_flight(int(has_dq))       # S
            if const_expr(is_masked):
                mask.apply(acc_S, m_block, half * (self.cfg.tile_n // 2))
            rP = self.exponentials(acc_S, shifts)
            in_flight(0)
            if const_expr(has_dq and half == 0):
                self.pipes.do.consumer_release(filled(turn - 1))
                release(self.pipes.p, full(turn - 1))
            elif const_expr(has_dq):
                self.pipes.q.consumer_release(filled(turn - 1))
                release(self.pipes.ds, full(turn - 1))
            if const_expr(half == 0):
                if const_expr(is_first):
                    wait_until_free(self.cfg)
                self.pipes.p.producer_acquire(empty(turn))
            self.write_P(rP, half)
        commit_written(self.pipes.p, empty(turn))
        self.wait_for_douts(turn, num_used)

    @cute.jit
    def start_S(self, turn: Int32, half: Constexpr[int]) -> cute.Tensor:
        """Half of S's keys, left in flight."""
        mma = self.mmas.dkv_part
        acc = cute.make_rmem_tensor(mma.partition_shape_C((self.cfg.tile_m, self.cfg.tile_n // 2)), Float32)
        issue_gemm(mma, acc, self.tOwnA[None, None, None, turn & 1], part_of(self.tOwnB[None, None, None, 0], 1, half),
                   zero_init=True)
        return acc

    @cute.jit
    def exponentials(self, acc_S: cute.Tensor, shifts: list[Float32]) -> cute.Tensor:
        """S -> P, rounded."""
        S = as_rows_cols(acc_S)
        for r in cutlass.range_constexpr(2):
            shift = shifts[r] * self.scale_log2
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = cute.math.exp2(S[r, c] * self.scale_log2 + shift, fastmath=True)
        return rounded(acc_S, element_type(self.cfg))

    @cute.jit
    def write_P(self, rP: cute.Tensor, half: Constexpr[int]):
        """Half of its keys to its slot."""
        store = self.copy_of(cute.nvgpu.warp.StMatrix8x8x16bOp)
        sP = store.partition_D(self.smem.sdS[None, None, P])
        pieces = cute.size(rP) // CONVERT_CHUNK
        for n in cutlass.range_constexpr(pieces):
            piece = cute.make_tensor(rP.iterator + CONVERT_CHUNK * n, cute.make_layout((CONVERT_CHUNK, 1)))
            cute.copy(store, piece, columns_of(sP, half * pieces + n))

    # ---- products ------------------------------------------------------------------------------
    @cute.jit
    def pass_products(self, turn: Int32, num_used: Int32, has_before: Constexpr[bool]):
        """dS of one Q tile; if has_before, dV and dK of the one before it."""
        if const_expr(has_before):
            self.start_dV(turn - 1)
            self.start_dK(turn - 1)
        self.wait_for_douts(turn, num_used)
        deltas = self.values(self.smem.sDelta, turn)
        acc_dP = cute.make_rmem_tensor(self.mmas.sdp.partition_shape_C((self.cfg.tile_m, self.cfg.tile_n)), Float32)
        issue_gemm(self.mmas.sdp, acc_dP, self.tOwnA[None, None, None, turn & 1], self.tOwnB[None, None, None, 0],
                   zero_init=True)
        if const_expr(has_before):
            in_flight(1)                 # dV and dK
            self.pipes.do.consumer_release(filled(turn - 1))
            self.pipes.q.consumer_release(filled(turn - 1))
            release(self.pipes.p, full(turn - 1))
        in_flight(0)                     # dP
        self.pipes.p.consumer_wait(full(turn))
        self.pipes.ds.producer_acquire(empty(turn))
        self.write_dS(acc_dP, deltas)
        commit_written(self.pipes.ds, empty(turn))
        self.pipes.q.consumer_wait(filled(turn))

    @cute.jit
    def write_dS(self, acc_dP: cute.Tensor, deltas: list[Float32]):
        """P (dP - D), rounded, to its slot. P, rounded, comes from its own: the next columns while these are used."""
        element = element_type(self.cfg)
        load = self.copy_of(cute.nvgpu.warp.LdMatrix8x8x16bOp)
        store = self.copy_of(cute.nvgpu.warp.StMatrix8x8x16bOp)
        sP = load.partition_S(self.smem.sdS[None, None, P])
        sdS = store.partition_D(self.smem.sdS[None, None, DS])
        pieces, piece = cute.size(acc_dP) // CONVERT_CHUNK, cute.make_layout((CONVERT_CHUNK, 1))
        rPs = [cute.make_rmem_tensor(piece, element) for _ in range(2)]
        cute.copy(load, columns_of(sP, 0), rPs[0])
        for n in cutlass.range_constexpr(pieces):
            if const_expr(n + 1 < pieces):
                cute.copy(load, columns_of(sP, n + 1), rPs[(n + 1) % 2])
            part, rdS = cute.make_rmem_tensor(CONVERT_CHUNK, Float32), cute.make_rmem_tensor(piece, element)
            for i in cutlass.range_constexpr(CONVERT_CHUNK):
                part[i] = Float32(rPs[n % 2][i]) * (acc_dP[n * CONVERT_CHUNK + i] + deltas[i // 2 % 2])
            cute.make_tensor(rdS.iterator, cute.make_layout(CONVERT_CHUNK)).store(part.load().to(element))
            cute.copy(store, rdS, columns_of(sdS, n))

    @cute.jit
    def finish(self, turn: Int32):
        """dV and dK of the last Q tile, the one of this turn. Runs on: scores, products."""
        self.start_dV(turn)
        self.start_dK(turn)
        in_flight(0)
        self.pipes.do.consumer_release(filled(turn))
        self.pipes.q.consumer_release(filled(turn))
        release(self.pipes.p, full(turn))
        if const_expr(self.role == SCORES):
            release(self.pipes.ds, full(turn))

    # ---- queries -------------------------------------------------------------------------------
    @cute.jit
    def start_dQ(self, part: Int32) -> cute.Tensor:
        """64 columns of dQ, left in flight."""
        acc = cute.make_rmem_tensor(self.mmas.dq.partition_shape_C((self.cfg.tile_m, ROWS_PER_WARPGROUP)), Float32)
        issue_gemm(self.mmas.dq, acc, self.tOwnA[None, None, None, DS],
                   part_of(self.tOwnB[None, None, None, 0], 1, part), zero_init=True)
        return acc

    @cute.jit
    def write_dQ(self, acc_dQ: cute.Tensor, number: Int32):
        """A part to its slot, in thread order."""
        slot = emptied(number)
        self.pipes.dq.producer_acquire(slot)
        place = self.smem.sdQ[None, slot.index].iterator + QUAD * self.tidx
        cute.autovec_copy(quads_of(acc_dQ), in_thread_order(place, self.cfg.dq_part)[None, None, 0])

    @cute.jit
    def commit_dQ(self, number: Int32):
        """A part that is written."""
        commit_written(self.pipes.dq, emptied(number))

    @cute.jit
    def wait_for_dQ_places(self, turn: Int32):
        """Until what was sent before this turn is read."""
        for i in cutlass.range_constexpr(2):
            self.pipes.dq.producer_acquire(emptied(self.cfg.num_dq_wgs * turn + i))


@cute.jit
def pass_queries(columns: Columns, turn: Int32, has_before: Boolean):
    """dK and dQ of one Q tile. The reduce role is told of a part of dQ when the next GEMM is issued, since the fence
    before waits until all is written; has_before: of the last part of the Q tile before, too.

    Runs on: queries.
    """
    pipes, parts = columns.pipes, columns.cfg.num_dq_wgs
    pipes.q.consumer_wait(filled(turn))
    columns.start_dK(turn)
    if has_before:
        columns.commit_dQ(parts * turn - 1)
    for part in cutlass.range(parts, unroll=1):    # unrolled, parts would have accumulators of their own
        acc_dQ = columns.start_dQ(part)
        if part > 0:
            columns.commit_dQ(parts * turn + part - 1)
        in_flight(0)
        if part == 0:
            pipes.q.consumer_release(filled(turn))
        if part == parts - 1:
            release(pipes.ds, full(turn))
        columns.write_dQ(acc_dQ, parts * turn + part)


def columns_of(tXsX: cute.Tensor, piece: int) -> cute.Tensor:
    """16 of the columns of a partition of P or dS."""
    return tXsX[(None, (piece % 2, piece // 2)), 0, None]


def make_columns(cfg: BackwardConfig, params: BwdParams, mmas: BwdMmas, smem: BwdSmem, pipes: BwdPipelines,
                 role: int) -> Columns:
    """Fragments and state of a consumer thread."""
    tidx, dkv = cute.arch.thread_idx()[0] % 128, mmas.dkv
    own = {SCORES: mmas.dkv_part, PRODUCTS: mmas.sdp, QUERIES: mmas.dq}[role].get_slice(0)
    sA, sB = {SCORES: (smem.sQ, smem.sK), PRODUCTS: (smem.sdO, smem.sV), QUERIES: (smem.sdS, transposed(smem.sK))}[role]
    rows_of = lambda sX, block: dkv.make_fragment_A(dkv.get_slice(128 * block).partition_A(transposed(sX)))
    acc = lambda: cute.make_rmem_tensor(dkv.partition_shape_C((cfg.head_dim, cfg.tile_n)), Float32)
    return Columns(
        cfg, role, mmas, smem, pipes, tVrdO=tuple(rows_of(smem.sdO, block) for block in BLOCKS_OF_DV[role]),
        tKrQ=rows_of(smem.sQ, role), tKrP=dkv.make_fragment_B(dkv.get_slice(0).partition_B(transposed(smem.sdS))),
        tOwnA=own.make_fragment_A(own.partition_A(sA)), tOwnB=own.make_fragment_B(own.partition_B(sB)),
        accs_dV=tuple(acc() for _ in BLOCKS_OF_DV[role]), acc_dK=acc(), scale_log2=params.scale_log2, tidx=tidx)
