"""S = Q K^T -> online softmax -> O += P V over a range of K/V tiles, by one consumer warpgroup.

FA3 paper, algorithm 2, two-stage intra-warpgroup overlap: while the tensor core computes S[n], the registers still hold
P[n+1]; its PV GEMM is issued right behind, so that softmax(S[n]) overlaps PV[n+1]:

    tensor core   QK[n] PV[n+1] | QK[n-1] PV[n] | ...
    CUDA cores                  softmax[n]      softmax[n-1]
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, const_expr

from ...planning.config import KernelConfig
from ...planning.strategies import Steps, Values
from .arithmetic import maximum
from .barriers import all_agree, pass_turn, wait_turn
from .block_list import BlockList
from .block_range import BlockRange, first_key
from .copies import clear_unused_rows
from .dropout import RowDropout
from .fp8 import Descales
from .layout import ROW_STEP, as_operand_a, convert
from .mods import RowMods
from .new_row import NewRow
from .row_end import Sinks, end_rows, end_rows_without_keys
from .score_mask import RowMask
from .scores import RowFactors, ScoreTransform
from .softmax import OnlineSoftmax, Scores, by_head
from .staged_mask import StagedMask
from .transpose import transpose_in_place
from .visibility import Mask
from .wgmma import Mmas, in_flight, issue_gemm, part_of


@dataclass
class Attend:
    """State of one consumer warpgroup. Methods are loop-free verbs; the loops are in `attend_to`."""
    cfg: Constexpr
    mmas: Mmas
    tSrQ: cute.Tensor
    tSrK: cute.Tensor
    tOrV: cute.Tensor
    tOrP: cute.Tensor
    acc_O: cute.Tensor
    softmax: OnlineSoftmax
    scores: ScoreTransform
    k_consumer: pipeline.PipelineConsumer
    v_consumer: pipeline.PipelineConsumer
    wg_idx: Int32
    q_slot: Int32
    sV: cute.Tensor
    sVt: cute.Tensor
    value_factor: Optional[Float32]
    factors: Optional[RowFactors]
    dropout: Optional[RowDropout]
    row_mask: Optional[RowMask | StagedMask]
    mods: Optional[RowMods]

    @cute.jit
    def start_tile(self, descales: Optional[Descales], mask: Mask, packed_heads: Int32 | int = 1,
                   q_factors: Optional[cute.Tensor] = None):
        """Read what the tile's scores and values are to be multiplied with, descales, and ALiBi's slopes; find
        the rows of attn_mask, and the rows' heads for dropout. q_factors: of each row's scores, beside descales."""
        tile = mask.tile
        if const_expr(self.cfg.has_descales):
            self.value_factor = descales.value_factor(tile.kv_head, tile.sequence)
            if const_expr(self.cfg.has_dropout):
                self.value_factor = self.value_factor * self.dropout.keep_factor
            if const_expr(self.cfg.transforms_scores):
                scales, scale = self.factors.scale, self.scores.scale
            else:
                scales, scale = self.softmax.scale_log2, self.scores.scale_log2
            for r in cutlass.range_constexpr(cute.size(scales)):
                head = self.head_of_row(mask, r, packed_heads)
                row_scale = scale if const_expr(q_factors is None) else scale * q_factors[r]
                scales[r] = descales.score_factor(row_scale, head, tile.kv_head, tile.sequence)
        if const_expr(self.cfg.has_alibi):
            for r in cutlass.range_constexpr(cute.size(self.factors.slopes)):
                slope = self.scores.slopes[self.head_of_row(mask, r, packed_heads), tile.sequence]
                self.factors.slopes[r] = slope if self.cfg.has_natural_scores else slope / self.scores.scale
        if const_expr(self.cfg.attn_mask):
            for r in cutlass.range_constexpr(cute.size(self.row_mask.rows)):
                head, query = self.head_of_row(mask, r, packed_heads), mask.query(r)
                self.row_mask.rows[r] = self.scores.mask.row(self.cfg, tile.sequence, head, query)
        if const_expr(self.cfg.has_mods and self.cfg.packs_heads):
            for r in cutlass.range_constexpr(cute.size(self.mods.heads)):
                self.mods.heads[r] = self.head_of_row(mask, r, packed_heads)
        if const_expr(self.cfg.has_dropout and self.cfg.packs_heads):
            for r in cutlass.range_constexpr(cute.size(self.dropout.heads)):
                self.dropout.heads[r] = self.head_of_row(mask, r, packed_heads)

    def head_of_row(self, mask: Mask, r: int, packed_heads: Int32 | int) -> Int32:
        """The head of the thread's r-th row."""
        if not self.cfg.packs_heads:
            return mask.tile.head
        row = mask.tile.m_block * self.cfg.tile_m + mask.first_row + ROW_STEP * r
        return mask.tile.head + row % packed_heads

    @cute.jit
    def first_qk(self, mask: Mask, n_block: Int32):
        """S[last] alone, there is no P to overlap with yet. P = exp(S), O = 0."""
        if const_expr(self.cfg.stages_mask):
            self.row_mask.start(mask.tile, n_block)
        acc_S, ahead = self.qk_alone(mask, n_block)
        self.transform(acc_S, mask, n_block, ahead, is_masked=True)
        mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, Scores.FIRST)
        self.make_P(acc_S, mask, n_block)
        self.acc_O.fill(0.0)

    @cute.jit
    def step(self, mask: Mask, n_block: Int32, is_masked: Constexpr[bool], known: Constexpr[Scores] = Scores.ANY):
        """S[n] and O += P[n+1] V[n+1] in flight together or one after the other; then P[n] = exp(S[n])."""
        if const_expr(self.cfg.steps is Steps.SERIAL):
            self.step_serial(mask, n_block, is_masked, known)
        else:
            self.step_overlapped(mask, n_block, is_masked, known)

    @cute.jit
    def step_serial(self, mask: Mask, n_block: Int32, is_masked: Constexpr[bool], known: Constexpr[Scores]):
        """`step` one after the other: S and T may share registers."""
        self.add_pv()
        acc_S, ahead = self.qk_alone(mask, n_block)
        self.transform(acc_S, mask, n_block, ahead, is_masked)
        if const_expr(is_masked):
            mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, known)
        self.make_P(acc_S, mask, n_block)

    @cute.jit
    def step_overlapped(self, mask: Mask, n_block: Int32, is_masked: Constexpr[bool], known: Constexpr[Scores]):
        """`step` as it says."""
        acc_S = self.new_acc_S()
        k = self.k_consumer.wait_and_advance()
        wait_turn(self.cfg, self.wg_idx)
        self.start_qk(acc_S, k.index)
        v = self.start_pv()
        pass_turn(self.cfg, self.wg_idx)
        ahead = self.fetch(acc_S, mask, n_block)
        in_flight(1)                     # S[n] is complete, PV[n+1] may still run
        k.release()
        self.transform(acc_S, mask, n_block, ahead, is_masked)
        if const_expr(is_masked):
            mask.apply(acc_S, n_block)
        self.softmax.update(acc_S, known)
        in_flight(0)                     # PV[n+1] is complete: acc_O and tOrP are ours again
        self.release_v(v)
        self.make_P(acc_S, mask, n_block)
        if const_expr(not self.cfg.rescale_before_pv):
            self.softmax.rescale(self.acc_O)

    def fetch(self, acc_S: cute.Tensor, mask: Mask, n_block: Int32) -> Optional[cute.Tensor]:
        """What attn_mask has for one K/V tile, in flight; None without."""
        is_fetched = self.cfg.attn_mask and not self.cfg.stages_mask
        return self.row_mask.fetch(acc_S, mask.place(n_block), n_block) if is_fetched else None

    def transform(self, acc_S: cute.Tensor, mask: Mask, n_block: Int32, ahead: Optional[cute.Tensor], is_masked: bool):
        """Scores of one K/V tile, before the mask that follows from lengths and the window.

        is_masked   some row does not see every key; only block lists say so of a MaskMod
        """
        if self.cfg.stages_mask:
            ahead = self.row_mask.take()
        self.scores.apply(self.cfg, acc_S, mask.place(n_block), self.factors, ahead if self.cfg.has_bias else None)
        if self.cfg.stages_mask:
            self.row_mask.bring(mask.tile, n_block - 1)
        if self.cfg.has_mods:
            self.mods.apply(acc_S, mask.place(n_block), is_masked or not self.cfg.has_block_lists)
        if self.cfg.attn_mask and not self.cfg.has_bias:
            self.row_mask.hide(acc_S, ahead)

    def make_P(self, acc_S: cute.Tensor, mask: Mask, n_block: Int32):
        """P of one K/V tile, as PV reads it."""
        convert(as_operand_a(self.cfg, acc_S), self.tOrP)
        if self.cfg.has_dropout:
            self.dropout.apply(self.tOrP, mask.place(n_block))

    @cute.jit
    def last_pv(self, sinks: Optional[cute.Tensor]):
        """O += P[first] V[first], then normalise."""
        self.add_pv()
        end_rows(self.softmax, self.acc_O, self.value_factor, sinks)

    @cute.jit
    def add_pv(self):
        """O += P V of the next V slot, alone; O has been rescaled for P, but not in serial steps."""
        if const_expr(self.cfg.steps is Steps.SERIAL):
            self.fold_pv()
        else:
            v = self.start_pv()
            in_flight(0)
            self.release_v(v)

    @cute.jit
    def fold_pv(self):
        """T = P V of the next V slot, added to O; for parts of V's columns in turn where T has no registers for all.

        T is a new tensor every time: WGMMA's operands would otherwise carry the last one's along. The parts share one,
        which holds the compiler back: with a T of its own for each it folds them last, all at once, and spills.
        """
        v = self.wait_for_v()
        acc_T = cute.make_rmem_tensor_like(part_of(self.acc_O, 2, 0))
        for part in cutlass.range_constexpr(self.cfg.num_value_parts):
            acc_O = part_of(self.acc_O, 2, part)
            tOrV = part_of(self.tOrV[None, None, None, v.index], 1, part)
            issue_gemm(self.mmas.pv, acc_T, self.tOrP, tOrV, zero_init=True)
            in_flight(0)
            if const_expr(part == self.cfg.num_value_parts - 1):
                self.release_v(v)
            self.softmax.fold(acc_O, acc_T)

    @cute.jit
    def no_visible_key(self, sinks: Optional[cute.Tensor]):
        """O = 0 and LSE = -inf, or the sink: no row of the tile sees a key. Takes no turn and no K or V slot."""
        end_rows_without_keys(self.softmax, self.acc_O, sinks)

    @cute.jit
    def read_sinks(self, sinks: Optional[Sinks], mask: Mask) -> Optional[cute.Tensor]:
        """Of each row; None where the row's end is not here."""
        if const_expr(sinks is None):
            return None
        values = cute.make_rmem_tensor(cute.size(self.softmax.row_sum), Float32)
        for r in cutlass.range_constexpr(cute.size(values)):
            values[r] = sinks.of(mask.tile, self.head_of_row(mask, r, getattr(self.cfg, "packed_heads", 1)))
        return values

    @cute.jit
    def has_negative_row(self) -> Boolean:
        """Whether some row of the warpgroup has a negative maximum, or none yet."""
        return not all_agree(self.wg_idx, self.softmax.is_nonnegative())

    @cute.jit
    def qk_alone(self, mask: Mask, n_block: Int32) -> tuple[cute.Tensor, Optional[cute.Tensor]]:
        """S of the next K slot, complete, and what `fetch` brings."""
        acc_S = self.new_acc_S()
        k = self.k_consumer.wait_and_advance()
        wait_turn(self.cfg, self.wg_idx)
        self.start_qk(acc_S, k.index)
        pass_turn(self.cfg, self.wg_idx)
        ahead = self.fetch(acc_S, mask, n_block)
        in_flight(0)
        k.release()
        return acc_S, ahead

    def start_qk(self, acc_S: cute.Tensor, k_slot: Int32):
        """S = Q K^T of one K slot, left in flight."""
        tSrQ = self.tSrQ if self.cfg.has_q_in_registers else self.tSrQ[None, None, None, self.q_slot]
        issue_gemm(self.mmas.qk, acc_S, tSrQ, self.tSrK[None, None, None, k_slot], zero_init=True)

    def start_pv(self) -> pipeline.PipelineConsumer.ImmutableResourceHandle:
        """O += P V of the next V slot, which is returned, left in flight."""
        if self.cfg.rescale_before_pv:
            self.softmax.rescale(self.acc_O)
        v = self.wait_for_v()
        issue_gemm(self.mmas.pv, self.acc_O, self.tOrP, self.tOrV[None, None, None, v.index], zero_init=False)
        return v

    def wait_for_v(self) -> pipeline.PipelineConsumer.ImmutableResourceHandle:
        """The next V slot, as PV reads it."""
        v = self.v_consumer.wait_and_advance()
        if self.cfg.values is Values.TRANSPOSED_IN_PLACE:
            tidx = cute.arch.thread_idx()[0]
            transpose_in_place(self.cfg, self.sV[None, None, v.index], self.sVt[None, None, v.index], tidx)
        return v

    @cute.jit
    def release_v(self, v: pipeline.PipelineConsumer.ImmutableResourceHandle):
        """One arrival per warp: the V ring sees to that itself, the V^T ring does not."""
        if const_expr(self.cfg.values.has_ring):
            with cute.arch.elect_one():
                v.release()
        else:
            v.release()

    def new_acc_S(self) -> cute.Tensor:
        """A fresh S accumulator."""
        return cute.make_rmem_tensor(self.mmas.qk.partition_shape_C((self.cfg.tile_m, self.cfg.tile_n)), Float32)


def make_attend(cfg: KernelConfig, params, mmas: Mmas, smem, pipes, wg_idx: Int32,
                num_used: Optional[Int32] = None) -> Attend:
    """Fragments and state of consumer warpgroup `wg_idx`; params, smem and pipes: either kernel's bundles of
    scores and dropout, of sQ, sK, sV, sVt and of the rings k and vt; num_used: see OnlineSoftmax.create."""
    scores, dropout, row_mask = params.scores, params.dropout, None
    first_threads = cute.make_layout(cfg.num_consumer_wgs, stride=128)
    wg_qk, wg_pv = mmas.qk.get_slice(first_threads(wg_idx)), mmas.pv.get_slice(first_threads(wg_idx))
    acc_O = cute.make_rmem_tensor(mmas.pv.partition_shape_C((cfg.tile_m, cfg.dim_v)), Float32)
    num_rows, factors = acc_O.shape[0][0] * acc_O.shape[1], None
    if cfg.transforms_scores:
        scale = by_head(cfg, num_rows, scores.scale) if cfg.has_descales else scores.scale
        factors = RowFactors(scale, by_head(cfg, num_rows, Float32(0.0)) if cfg.has_alibi else None)
    if cfg.stages_mask:
        row_mask = StagedMask.create(cfg, scores.mask, smem.sMask, wg_idx)
    elif cfg.attn_mask:
        row_mask = RowMask(cfg, cute.make_rmem_tensor(num_rows, Int64), scores.mask.is_paired)
    return Attend(
        cfg, mmas,
        tSrQ=mmas.qk.make_fragment_A(mmas.qk.partition_shape_A((cfg.tile_m, cfg.dim_qk)) if cfg.has_q_in_registers
                                     else wg_qk.partition_A(smem.sQ)),
        tSrK=mmas.qk.make_fragment_B(wg_qk.partition_B(smem.wide_K if cfg.widens else smem.sK)),
        tOrV=mmas.pv.make_fragment_B(wg_pv.partition_B(smem.sVt)),
        tOrP=mmas.pv.make_fragment_A(mmas.pv.partition_shape_A((cfg.tile_m, cfg.tile_n))),
        acc_O=acc_O, scores=scores,
        softmax=OnlineSoftmax.create(cfg, scores.scale_log2, num_rows, num_used),
        k_consumer=(pipes.wide_k if cfg.widens else pipes.k).make_consumer(), v_consumer=pipes.vt.make_consumer(),
        wg_idx=wg_idx, q_slot=Int32(0),
        sV=smem.sV, sVt=smem.sVt,
        value_factor=dropout.keep_factor if cfg.has_dropout else Float32(1.0) if cfg.has_descales else None,
        factors=factors, dropout=dropout.start(cfg, num_rows) if cfg.has_dropout else None, row_mask=row_mask,
        mods=scores.mods.start(cfg, num_rows) if cfg.has_mods else None)


@cute.jit
def attend_to(cfg: KernelConfig, attend: Attend, mask: Mask, blocks: BlockRange, sV: cute.Tensor,
              tidx: Int32, sinks: Optional[Sinks] = None, new: Optional[NewRow] = None) -> Attend:
    """O and LSE of one Q tile over a range of K/V tiles, from the last one down. Returns the state that it advanced.

    sinks: where the rows end here; new: a row that takes its place in the first of these tiles before it is read.
    """
    n_block = blocks.n_block_max - 1
    if n_block >= blocks.n_block_min:
        if const_expr(new is not None):
            new.put_key(attend.k_consumer, tidx)
        attend.first_qk(mask, n_block)
        if const_expr(cfg.is_varlen and not cfg.values.has_ring):
            num_used = mask.tile.seqlen_k - first_key(cfg, n_block)
            if num_used < cfg.tile_n:
                clear_unused_rows(cfg, sV, attend.v_consumer, num_used, cfg.tile_n, tidx)
        if const_expr(new is not None):
            new.put_value(attend.v_consumer, tidx)
        # Three ranges, so that the middle one, where the time goes, has no mask code: tiles cut by the right end of
        # what rows see, tiles that all see, tiles cut by the left end. Nearly all of the middle has no negative maxima.
        if const_expr(cfg.mask != "full"):
            num_right = blocks.num_cut_right(n_block)
            for i in cutlass.range(num_right, unroll=1):
                attend.step(mask, n_block - 1 - i, is_masked=True)
            n_block -= num_right
        num_full = n_block - blocks.n_block_min
        if const_expr(cfg.is_local):
            num_full = blocks.num_full(n_block)
        if const_expr(cfg.takes_max_of_bits):
            while (num_full > 0) & attend.has_negative_row():
                attend.step(mask, n_block - 1, is_masked=False)
                n_block -= 1
                num_full -= 1
        known = Scores.NONNEGATIVE if const_expr(cfg.takes_max_of_bits) else Scores.ANY
        for i in cutlass.range(num_full, unroll=1):
            attend.step(mask, n_block - 1 - i, is_masked=False, known=known)
        if const_expr(cfg.is_local):
            n_block -= num_full
            for i in cutlass.range(n_block - blocks.n_block_min, unroll=1):
                attend.step(mask, n_block - 1 - i, is_masked=True)
        if const_expr(mask.first_visible is not None and not cfg.values.has_ring):
            num_gone = mask.first_visible - first_key(cfg, blocks.n_block_min)
            if num_gone > 0:
                clear_unused_rows(cfg, sV, attend.v_consumer, Int32(0), num_gone, tidx)
        attend.last_pv(attend.read_sinks(sinks, mask))
    else:
        attend.no_visible_key(attend.read_sinks(sinks, mask))
    return attend


@cute.jit
def attend_to_listed(cfg: KernelConfig, attend: Attend, mask: Mask, blocks: BlockList,
                     sinks: Optional[Sinks] = None) -> Attend:
    """`attend_to` over the K/V tiles of a list: partial ones first, then those that all rows see, without mask code."""
    if blocks.num_blocks > 0:
        attend.first_qk(mask, blocks.block(Int32(0)))
        following = blocks.block(Int32(1))     # read a step ahead, so that it is there when S is
        first_full = maximum(blocks.num_partial, 1)
        for i in cutlass.range(1, first_full, unroll=1):
            n_block, following = following, blocks.block(i + 1)
            attend.step(mask, n_block, is_masked=True)
        index = first_full
        if const_expr(cfg.takes_max_of_bits):
            while (index < blocks.num_blocks) & attend.has_negative_row():
                n_block, following = following, blocks.block(index + 1)
                attend.step(mask, n_block, is_masked=False)
                index += 1
        known = Scores.NONNEGATIVE if const_expr(cfg.takes_max_of_bits) else Scores.ANY
        for i in cutlass.range(index, blocks.num_blocks, unroll=1):
            n_block, following = following, blocks.block(i + 1)
            attend.step(mask, n_block, is_masked=False, known=known)
        attend.last_pv(attend.read_sinks(sinks, mask))
    else:
        attend.no_visible_key(attend.read_sinks(sinks, mask))
    return attend


@cute.jit
def skip_tiles(attend: Attend, count: Int32) -> Attend:
    """Give the next K and V slots back unread: other warpgroups' rows see them. Returns the state that it advanced."""
    for _ in cutlass.range(count, unroll=1):
        attend.k_consumer.wait_and_advance().release()
        attend.release_v(attend.v_consumer.wait_and_advance())
    return attend
