"""Consumer role of the backward kernels of one gradient: each warpgroup has 64 rows and waits for no other."""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Constexpr, Float32, Int32, Int64, const_expr

from ...planning.one_side import PREPARED_ROWS, OneSideConfig
from ...planning.rings import WARP, by_name
from ..common.barriers import sync_warpgroup
from ..common.dropout import RowDropout
from ..common.layout import ROW_STEP, as_operand_a, as_rows_cols, element_type, fragment_row, rounded, transposed
from ..common.score_mask import RowMask
from ..common.tiles import Tile
from ..common.visibility import Visibility
from ..common.wgmma import in_flight, issue_gemm
from .blocks import KeyTile, query_range
from .dropped import Dropped, of_keys, of_queries
from .gradients import clear_unused_rows, of_columns, start_at
from .one_side_bundles import SideMmas, SideParams, SidePipelines, SideSmem
from .scores import BiasGradient, Exponents, MaskOfKeys, Scores, find_rows
from .store import store_part, write_slot
from .visible import KeyMask
from .walk import walk_heads


@dataclass
class OneSide:
    """State of one consumer warpgroup."""
    cfg: Constexpr
    mmas: SideMmas
    smem: SideSmem
    tSrX: cute.Tensor
    tSrY: cute.Tensor
    tPrX2: cute.Tensor
    tPrY2: cute.Tensor
    tGrY: cute.Tensor              # the gradient's B: y, of dV y2, transposed
    acc_G: cute.Tensor
    row_shift: cute.Tensor         # of this thread's two rows, if they are queries: scaled by log2(e)
    row_delta: cute.Tensor
    y_consumer: pipeline.PipelineConsumer
    y2_consumer: pipeline.PipelineConsumer
    scale_log2: Float32
    tidx: Int32
    scores: Optional[Scores]
    slope: Optional[Float32]       # of ALiBi and the query head; None without
    row_mask: Optional[RowMask | MaskOfKeys]
    d_bias: Optional[BiasGradient]     # None if cfg.has_gradient
    dropout: Optional[RowDropout]
    head: Int32                    # the query head, and the sequence; used if cfg.has_dropout or not cfg.has_gradient
    sequence: Int32

    @cute.jit
    def step(self, mask, index: Int32, num_used: Int32, is_masked: Constexpr[bool]):
        """One tile of the other side: S, dP, and the gradient. Nothing is in flight before or after.

        num_used   rows of the tile that the sequence has; the others of packed tensors are another's
        """
        cfg = self.cfg
        acc_S, acc_dP = self.new_acc(), self.new_acc()
        y = self.y_consumer.wait_and_advance()
        self.clear_unused(self.smem.sY[None, None, y.index], num_used)
        if const_expr(cfg.is_of_queries):
            self.start_S(acc_S, y.index)
        y2 = self.y2_consumer.wait_and_advance()
        self.clear_unused(self.smem.sY2[None, None, y2.index], num_used)
        if const_expr(not cfg.is_of_queries):
            # Start values are written before the first WGMMA of both is issued: ptxas would wait for it (C7517).
            if const_expr(not cfg.has_softcap):
                start_at(acc_S, self.smem.sShift[None, y.index], self.tidx)
            if const_expr(cfg.has_dp and not cfg.has_dropout):
                start_at(acc_dP, self.smem.sDelta[None, y2.index], self.tidx)
            self.start_S(acc_S, y.index)
        if const_expr(cfg.has_dp):
            issue_gemm(self.mmas.scores, acc_dP, self.tPrX2[None, None, None, 0],
                       self.tPrY2[None, None, None, y2.index], zero_init=cfg.is_of_queries or cfg.has_dropout)
        ahead = self.fetch(acc_S, mask, index)
        in_flight(int(cfg.has_dp))           # S
        if const_expr(cfg.has_softcap):
            self.scores.cap(acc_S)
        if const_expr(cfg.attn_mask == "bool"):
            self.row_mask.hide(acc_S, ahead)
        if const_expr(is_masked):
            mask.apply(acc_S, index)
        if const_expr(cfg.transforms_scores):
            self.exponents(acc_S, mask, index, y.index, ahead).make_P(acc_S, has_slope=cfg.has_dp and cfg.has_gradient)
        else:
            self.make_P(acc_S)
        dropped = self.dropped(mask, index)
        if const_expr(cfg.has_dp):
            in_flight(0)                     # dP
            if const_expr(cfg.has_dropout):
                dropped.apply(acc_dP, self.dropout.keep_factor)
                self.add_delta(acc_dP, y2.index)
            y2.release()
            self.make_dS(acc_S, acc_dP)
        elif const_expr(cfg.has_dropout):
            dropped.apply(acc_S, Float32(1.0))
        if const_expr(cfg.has_gradient):
            self.add_gradient(acc_S, y.index if const_expr(cfg.has_dp) else y2.index)
        else:
            self.d_bias.add(acc_S, mask, self.sequence, index)
        y.release()
        if const_expr(not cfg.has_dp):
            y2.release()

    @cute.jit
    def clear_unused(self, slot: cute.Tensor, num_used: Int32):
        """Of a tile of the other side the rows behind the sequence's last."""
        if const_expr(self.cfg.is_varlen):
            clear_unused_rows(self.cfg, (slot,), num_used, self.tidx)

    def start_S(self, acc_S: cute.Tensor, slot: Int32):
        """S of a slot of y, left in flight."""
        issue_gemm(self.mmas.scores, acc_S, self.tSrX[None, None, None, 0], self.tSrY[None, None, None, slot],
                   zero_init=self.cfg.is_of_queries or self.cfg.has_softcap)

    @cute.jit
    def add_gradient(self, acc_S: cute.Tensor, slot: Int32):
        """The gradient += P or dS times the tile of a slot; complete."""
        cfg = self.cfg
        factor = rounded(acc_S, element_type(cfg))
        issue_gemm(self.mmas.gradient, self.acc_G, as_operand_a(cfg, factor), self.tGrY[None, None, None, slot],
                   zero_init=False)
        in_flight(0)

    @cute.jit
    def make_P(self, acc_S: cute.Tensor):
        """S -> P in place, in FP32."""
        S = as_rows_cols(acc_S)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                scaled = S[r, c] * self.scale_log2
                if const_expr(self.cfg.is_of_queries):
                    scaled = S[r, c] * self.scale_log2 + self.row_shift[r]
                S[r, c] = cute.math.exp2(scaled, fastmath=True)

    @cute.jit
    def make_dS(self, P: cute.Tensor, acc_dP: cute.Tensor):
        """P, dP -> dS in P's place."""
        P, dP = as_rows_cols(P), as_rows_cols(acc_dP)
        for r in cutlass.range_constexpr(cute.size(P, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(P, mode=[1])):
                value = dP[r, c]
                if const_expr(self.cfg.is_of_queries):
                    value = dP[r, c] + self.row_delta[r]
                P[r, c] = P[r, c] * value

    def dropped(self, mask, index: Int32) -> Optional[Dropped]:
        """What dropout drops of a tile of the other side; None without."""
        if not self.cfg.has_dropout:
            return None
        if self.cfg.is_of_queries:
            return of_queries(self.dropout, mask, self.sequence, index)
        return of_keys(self.dropout, mask, (self.head, self.sequence), index)

    @cute.jit
    def add_delta(self, acc_dP: cute.Tensor, y2_slot: Int32):
        """delta of columns that are queries, where dP has started at 0."""
        if const_expr(not self.cfg.is_of_queries):
            delta, dP = of_columns(acc_dP, self.smem.sDelta[None, y2_slot], self.tidx), as_rows_cols(acc_dP)
            for c in cutlass.range_constexpr(cute.size(dP, mode=[1])):
                value = delta[c % 2, c // 2]
                for r in cutlass.range_constexpr(cute.size(dP, mode=[0])):
                    dP[r, c] = dP[r, c] + value

    def fetch(self, acc_S: cute.Tensor, mask, index: Int32) -> Optional[cute.Tensor]:
        """What attn_mask has for a tile of the other side, in flight; None without."""
        if not self.cfg.attn_mask:
            return None
        if self.cfg.is_of_queries:
            return self.row_mask.fetch(acc_S, mask.place(index), index)
        return self.row_mask.fetch_tile(acc_S, mask, index)

    def exponents(self, acc_S: cute.Tensor, mask, index: Int32, y_slot: Int32, ahead: Optional[cute.Tensor]
                  ) -> Exponents:
        """Of a tile of the other side."""
        cfg, column_shift, to_diagonal = self.cfg, None, None
        if cfg.has_softcap and not cfg.is_of_queries:
            column_shift = of_columns(acc_S, self.smem.sShift[None, y_slot], self.tidx)
        if cfg.has_alibi:
            to_diagonal = tuple(Float32(mask.to_diagonal(r, index)) for r in range(2))
        return Exponents(cfg, self.scores.factor, self.row_shift if cfg.is_of_queries else None, column_shift,
                         self.scale_log2, self.slope, to_diagonal, ahead if cfg.has_bias else None)

    def start_head(self, mask, head: Int32, sequence: Int32):
        """Read what is the same for all scores of a query head, find its part of attn_mask."""
        if self.cfg.has_dropout or not self.cfg.has_gradient:
            self.head, self.sequence = head, sequence
        if self.cfg.has_alibi:
            self.slope = self.scores.slope_of(head, sequence)
        if self.cfg.attn_mask:
            find_rows(self.cfg, self.row_mask.rows, self.scores.mask, mask, (head, sequence))

    def new_acc(self) -> cute.Tensor:
        """A fresh accumulator of the scores' shape."""
        shape = (self.cfg.tile_rows, self.cfg.tile_columns)
        return cute.make_rmem_tensor(self.mmas.scores.partition_shape_C(shape), Float32)


def make_one_side(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, smem: SideSmem, pipes: SidePipelines,
                  tidx: Int32) -> OneSide:
    """Fragments and state of a consumer thread's warpgroup."""
    wg_idx = cute.arch.make_warp_uniform(tidx // 128)
    first = cute.make_layout(cfg.num_consumer_wgs, stride=128)
    scores, gradient = mmas.scores.get_slice(first(wg_idx)), mmas.gradient.get_slice(first(wg_idx))
    acc_G = cute.make_rmem_tensor(mmas.gradient.partition_shape_C((cfg.tile_rows, cfg.dim_gradient)), Float32)
    acc_G.fill(0.0)
    row_shift, row_delta = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
    row_shift.fill(0.0)
    row_delta.fill(0.0)
    row_mask = None
    if cfg.attn_mask:
        rows, mask = cute.make_rmem_tensor(2, Int64), params.scores.mask
        row_mask = RowMask(cfg, rows, mask.is_paired) if cfg.is_of_queries else MaskOfKeys(
            cfg, rows, mask.is_paired, mask.row_stride)
    return OneSide(
        cfg, mmas, smem,
        tSrX=mmas.scores.make_fragment_A(scores.partition_A(smem.sX)),
        tSrY=mmas.scores.make_fragment_B(scores.partition_B(smem.sY)),
        tPrX2=mmas.scores.make_fragment_A(scores.partition_A(smem.sX2)),
        tPrY2=mmas.scores.make_fragment_B(scores.partition_B(smem.sY2)),
        tGrY=mmas.gradient.make_fragment_B(gradient.partition_B(transposed(smem.sY if cfg.has_dp else smem.sY2))),
        acc_G=acc_G, row_shift=row_shift, row_delta=row_delta,
        y_consumer=pipes.y.make_consumer(), y2_consumer=pipes.y2.make_consumer(), scale_log2=params.scale_log2,
        tidx=tidx, scores=params.scores, slope=Float32(0.0) if cfg.has_alibi else None, row_mask=row_mask,
        d_bias=params.d_bias, dropout=params.dropout.start(cfg, 2) if cfg.has_dropout else None, head=Int32(0),
        sequence=Int32(0))


@cute.jit
def consume_for_queries(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, smem: SideSmem, pipes: SidePipelines,
                        tile: Tile, sequence: Int32):
    """dQ of a tile of queries of a sequence. Runs on: consumer warpgroups."""
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    side = make_one_side(cfg, params, mmas, smem, pipes, tidx)
    visible = Visibility(cfg, params.window, tile)
    mask, blocks = visible.of_thread(tidx), visible.tiles()
    side.start_head(mask, tile.head, sequence)
    if blocks.n_block_max > blocks.n_block_min:
        pipes.x.make_consumer().wait_and_advance()
        place = (tile.sequence + tile.m_block) * PREPARED_ROWS + fragment_row(tidx)
        for r in cutlass.range_constexpr(2):
            side.row_shift[r] = params.shift[place + r * ROW_STEP, tile.head] * params.scale_log2
            side.row_delta[r] = params.delta[place + r * ROW_STEP, tile.head]
    n_block = blocks.n_block_max - 1
    num_right = blocks.num_cut_right(n_block + 1)
    for i in cutlass.range(num_right, unroll=1):
        side.step(mask, n_block - i, tile.seqlen_k - (n_block - i) * cfg.tile_n, is_masked=True)
    n_block -= num_right
    num_full = n_block + 1 - blocks.n_block_min
    if const_expr(cfg.is_local):
        num_full = blocks.num_full(n_block + 1)
    for i in cutlass.range(num_full, unroll=1):
        side.step(mask, n_block - i, Int32(cfg.tile_n), is_masked=False)
    if const_expr(cfg.is_local):
        n_block -= num_full
        for i in cutlass.range(n_block + 1 - blocks.n_block_min, unroll=1):
            side.step(mask, n_block - i, tile.seqlen_k - (n_block - i) * cfg.tile_n, is_masked=True)
    where = tile.m_block, tile.offset_q, tile.seqlen_q, tile.head, tile.batch
    if const_expr(cfg.has_gradient):
        store_own_rows(cfg, params, mmas, smem.sX, side.acc_G, where, tidx)


@cute.jit
def consume_for_keys(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, smem: SideSmem, pipes: SidePipelines,
                     tile: KeyTile):
    """dK or dV of a block of keys. Runs on: consumer warpgroups."""
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    side = make_one_side(cfg, params, mmas, smem, pipes, tidx)
    mask = KeyMask.create(cfg, params.window, tile, tidx)
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if queries.m_block_max > queries.m_block_min:
        pipes.x.make_consumer().wait_and_advance()
        if const_expr(cfg.is_varlen):
            num_used = tile.seqlen_k - tile.n_block * cfg.tile_n
            clear_unused_rows(cfg, (smem.sX[None, None, 0], smem.sX2[None, None, 0]), num_used, tidx)
    walk_heads(side, mask, queries, params.group)
    where = tile.n_block, tile.offset_k, tile.seqlen_k, tile.kv_head, tile.batch
    store_own_rows(cfg, params, mmas, smem.sX, side.acc_G, where, tidx)


@cute.jit
def store_own_rows(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, sX: cute.Tensor, acc: cute.Tensor,
                   where: tuple, tidx: Int32):
    """The gradient -> x's slot -> rows below the sequence's length.

    where: as in store_part
    """
    wg_idx = tidx // 128
    if const_expr(cfg.side != "dv"):
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = params.scale * acc[i]
    elif const_expr(cfg.has_dropout):
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = params.dropout.keep_factor * acc[i]
    rG = rounded(acc, element_type(cfg))
    slot = cute.local_tile(sX[None, None, 0], (cfg.tile_rows, cfg.dim_gradient), (0, 0))
    sync_warpgroup(wg_idx)                 # all of it has read its rows of x
    write_slot(mmas.gradient, rG, slot, tidx)
    sync_warpgroup(wg_idx)
    store_part(cfg, slot, wg_idx, params.mG, where, tidx)
