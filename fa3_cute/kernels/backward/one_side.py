"""The backward kernel of one gradient (planning/one_side.py).

x, x2 are the CTA's own rows, y, y2 tiles of the other side:

    dQ     x = Q, x2 = dO    y = K, y2 = V      S  = Q K^T    dP  = dO V^T    dQ += dS K
    dK     x = K, x2 = V     y = Q, y2 = dO     S^T = K Q^T   dP^T = V dO^T   dK += dS^T Q
    dV     x = K             y = Q, y2 = dO     S^T = K Q^T                   dV += P^T dO

Each warpgroup has 64 rows and waits for no other: their GEMMs fill one another's gaps.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.one_side import ONE_SIDE_ARGUMENTS, PREPARED_ROWS, OneSideConfig
from ...planning.rings import WARP, by_name
from ..common.arithmetic import LOG2_E, maximum
from ..common.barriers import sync_warpgroup
from ..common.block_range import Window
from ..common.entry import flat_entry
from ..common.layout import (ROW_STEP, as_operand_a, as_rows_cols, convert, element_type, fragment_row, smem_ring,
                             tensor_view, transposed)
from ..common.sequences import Sequences, is_present
from ..common.tiles import Tile, rows_from
from ..common.tma import TmaOperand, tma_load, tma_views
from ..common.visibility import Visibility
from ..common.wgmma import in_flight, issue_gemm
from .blocks import Blocks, KeyTile, query_range
from .gradients import clear_unused_rows, start_at
from .load import load_rows
from .order import heads_per_section, key_tile
from .store import store_used_rows
from .visible import KeyMask


@dataclass(frozen=True)
class SideParams:
    """Run-time arguments (device side)."""
    x: TmaOperand
    x2: TmaOperand
    y: TmaOperand
    y2: TmaOperand
    mG: cute.Tensor                # the gradient, as x
    shift: cute.Tensor             # (padded rows of queries, num_heads) f32, see prepare.py
    delta: cute.Tensor
    window: Window
    sequences: Sequences
    q_blocks: Blocks               # of the prepare kernel: a sequence's vectors start with one of PREPARED_ROWS rows
    blocks: Blocks                 # of the CTA's side
    num_heads: Int32               # of the CTA's side
    group: Int32                   # query heads of a KV head
    scale: Float32
    scale_log2: Float32


@dataclass(frozen=True)
class SideMmas:
    """The GEMMs, over all consumer warpgroups."""
    scores: cute.TiledMma          # S and dP, or their transposes
    gradient: cute.TiledMma        # with P or dS in registers


@dataclass(frozen=True)
class SideSmem:
    sX: cute.Tensor                # the gradient at the end
    sX2: cute.Tensor
    sY: cute.Tensor
    sY2: cute.Tensor
    sShift: Optional[cute.Tensor]  # None if the CTA's rows are queries
    sDelta: Optional[cute.Tensor]


@dataclass(frozen=True)
class SidePipelines:
    x: pipeline.PipelineTmaAsync
    y: pipeline.PipelineTmaAsync
    y2: pipeline.PipelineTmaAsync


@flat_entry(ONE_SIDE_ARGUMENTS)
class OneSideBackward:
    """The kernel of one config. Compile `__call__`: its parameters are ONE_SIDE_ARGUMENTS, in order."""

    def __init__(self, cfg: OneSideConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """dQ = scale dS K, dK = scale dS^T Q or dV = P^T dO; dS = P (dP - D), P = exp(scale Q K^T - LSE), dP = dO V^T"""
        cfg, sequences, element = self.cfg, Sequences.create(a), element_type(self.cfg)
        batches = a.batch_size
        if const_expr(cfg.is_varlen):
            batches = Int32(1) if sequences.is_packed() else a.batch_size
        shape_q = (maximum(a.seqlen_q, 1), cfg.head_dim, a.num_heads, batches)
        shape_k = (maximum(a.seqlen_k, 1), cfg.head_dim, a.num_heads_k, batches)
        ring = lambda rows, slots: smem_ring(element, rows, cfg.head_dim, slots)
        sX, sY, sY2 = ring(cfg.tile_rows, 1), ring(cfg.tile_columns, cfg.num_y_stages), ring(
            cfg.tile_columns, cfg.num_y2_stages)
        names, shape, other = (("q", "dout", "k", "v"), shape_q, shape_k)
        if const_expr(not cfg.is_of_queries):
            names, shape, other = (("k", "v", "q", "dout"), shape_k, shape_q)
        x, x2 = (tma_load(tensor_view(a, name, shape), sX, cfg.tile_rows) for name in names[:2])
        y = tma_load(tensor_view(a, names[2], other), sY, cfg.tile_columns)
        y2 = tma_load(tensor_view(a, names[3], other), sY2, cfg.tile_columns)
        q_blocks = Blocks.create(PREPARED_ROWS, sequences.cu_seqlens_q, a.seqlen_q, a.batch_size)
        k_blocks = Blocks.create(cfg.tile_n, sequences.cu_seqlens_k, a.seqlen_k, a.batch_size)
        padded = Int64(q_blocks.num_blocks) * PREPARED_ROWS
        vector = cute.make_layout((padded, a.num_heads), stride=(1, padded))
        blocks = q_blocks if const_expr(cfg.is_of_queries) else k_blocks
        num_heads = a.num_heads if const_expr(cfg.is_of_queries) else a.num_heads_k
        params = SideParams(
            x=x, x2=x2, y=y, y2=y2, mG=tensor_view(a, "gradient", shape),
            shift=cute.make_tensor(a.shift, vector), delta=cute.make_tensor(a.delta, vector),
            window=Window.create(cfg, a), sequences=sequences, q_blocks=q_blocks, blocks=blocks, num_heads=num_heads,
            group=a.num_heads // a.num_heads_k, scale=a.softmax_scale, scale_log2=a.softmax_scale * Float32(LOG2_E))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, (sX, sY, sY2), make_side_mmas(cfg)).launch(
            grid=(blocks.num_blocks * num_heads, 1, 1), block=(cfg.num_threads, 1, 1),
            min_blocks_per_mp=1, stream=a.stream)

    @cute.kernel
    def kernel(self, params: SideParams, layouts: tuple, mmas: SideMmas):
        """Warp 0 loads, warps 1 to 3 retire; the other warpgroups consume."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (params.x, params.x2, params.y, params.y2):
                cpasync.prefetch_descriptor(operand.atom)
        smem, pipes = self.allocate(layouts)
        block, head, tile, is_there = self.find_tile(params)
        roles = by_name(cfg.roles)
        if warp_idx < roles["consume"].warps[0]:
            cute.arch.setmaxregister_decrease(roles["load"].registers)
            if is_there and warp_idx == 0:
                if const_expr(cfg.is_of_queries):
                    load_for_queries(cfg, params, smem, pipes, tile)
                else:
                    load_for_keys(cfg, params, smem, pipes, tile)
        else:
            cute.arch.setmaxregister_increase(roles["consume"].registers)
            if is_there:
                if const_expr(cfg.is_of_queries):
                    consume_for_queries(cfg, params, mmas, smem, pipes, tile)
                else:
                    consume_for_keys(cfg, params, mmas, smem, pipes, tile)

    @cute.jit
    def find_tile(self, params: SideParams):
        """(block, head, KeyTile or Tile, whether it has a row). Runs on: whole warps."""
        cfg, index = self.cfg, cute.arch.block_idx()[0]
        sequences = params.sequences
        seqlen_q, seqlen_k, offset_q, offset_k = sequences.rows_q, sequences.rows_k, Int32(0), Int32(0)
        if const_expr(cfg.is_varlen):
            head = index // params.blocks.num_blocks
            block = index - head * params.blocks.num_blocks
            sequence = params.blocks.find(block)
            offset_q, seqlen_q, offset_k, seqlen_k = sequences.place(sequence)
            block, batch = block - params.blocks.first(sequence), sequences.batch_coordinate(sequence)
        else:
            num_heads = params.num_heads * sequences.batch_size
            section = heads_per_section(num_heads, params.group, seqlen_q, cfg.head_dim)
            num_blocks = params.blocks.num_blocks // sequences.batch_size
            block, any_head = key_tile(cfg.is_causal, index, num_blocks, num_heads, section)
            if const_expr(cfg.is_of_queries and cfg.is_causal):
                block = num_blocks - 1 - block       # the last queries see most keys
            sequence = any_head // params.num_heads
            batch, head = sequence, any_head - sequence * params.num_heads
        first_q_block = params.q_blocks.first(sequence)
        if const_expr(cfg.is_of_queries):
            # Tile.sequence: its first block among the prepared ones, which is all that is asked of it here
            tile = Tile(block, head, head // params.group, batch, offset_q, seqlen_q, offset_k, seqlen_k, first_q_block)
            is_there = block * cfg.tile_rows < seqlen_q
        else:
            tile = KeyTile(block, head, batch, offset_q, seqlen_q, offset_k, seqlen_k, first_q_block)
            is_there = block * cfg.tile_rows < seqlen_k
        return block, head, tile, is_there

    @cute.jit
    def allocate(self, layouts: tuple):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg, (layout_x, layout_y, layout_y2) = self.cfg, layouts
        allocator = cutlass.memory.SmemAllocator()
        rings = by_name(cfg.rings)
        bars = {name: allocator.allocate_array(Int64, 2 * rings[name].slots) for name in ("x", "y", "y2")}
        tensor = lambda layout: allocator.allocate_tensor(
            element_type(cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)
        floats = lambda slots: allocator.allocate_tensor(
            Float32, cute.make_layout((cfg.tile_columns, slots)), byte_alignment=128)
        sX = tensor(layout_x)
        sX2 = tensor(layout_x) if const_expr(cfg.has_dp) else sX
        sY, sY2 = tensor(layout_y), tensor(layout_y2)
        has_vectors = not cfg.is_of_queries
        smem = SideSmem(sX, sX2, sY, sY2, floats(cfg.num_y_stages) if has_vectors else None,
                        floats(cfg.num_y2_stages) if has_vectors and cfg.has_dp else None)
        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        tma_ring = lambda name, tx_count: pipeline.PipelineTmaAsync.create(
            num_stages=rings[name].slots, producer_group=group(rings[name].full),
            consumer_group=group(rings[name].empty), barrier_storage=bars[name], tx_count=tx_count, defer_sync=True)
        vector = 4 * cfg.tile_columns * has_vectors
        pipes = SidePipelines(
            x=tma_ring("x", rings["x"].slot_bytes + rings["x2"].slot_bytes),
            y=tma_ring("y", rings["y"].slot_bytes + vector),
            y2=tma_ring("y2", rings["y2"].slot_bytes + vector * cfg.has_dp))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, pipes


def make_side_mmas(cfg: OneSideConfig) -> SideMmas:
    """Both operands of the scores lie in shared memory; the gradient's B is read MN-major from the same slots."""
    element, atoms = element_type(cfg), (cfg.num_consumer_wgs, 1, 1)
    k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
    return SideMmas(
        sm90.make_trivial_tiled_mma(element, element, k_major, k_major, Float32, atoms,
                                    (ROWS_PER_WARPGROUP, cfg.tile_columns)),
        sm90.make_trivial_tiled_mma(element, element, k_major, mn_major, Float32, atoms,
                                    (ROWS_PER_WARPGROUP, cfg.head_dim), warpgroup.OperandSource.RMEM))


# ---- load ------------------------------------------------------------------------------------------------------------


@cute.jit
def load_own_rows(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, block: Int32,
                  offset: Int32, place: tuple):
    """x and x2, once. place: (head, batch)."""
    slot = pipes.x.make_producer().acquire_and_advance()
    for i in cutlass.range_constexpr(2 if cfg.has_dp else 1):
        op, sX = (params.x, smem.sX) if i == 0 else (params.x2, smem.sX2)
        mX = rows_from(cfg, offset, op.tensor[None, None, place[0], place[1]])
        tXsX, tXgX = tma_views(op, cute.local_tile(mX, (cfg.tile_rows, cfg.head_dim), (block, 0)), sX)
        cute.copy(op.atom, tXgX, tXsX[None, slot.index], tma_bar_ptr=slot.barrier)


def tiles_of(cfg: OneSideConfig, op: TmaOperand, sY: cute.Tensor, offset: Int32, head: Int32, batch: Int32):
    """TMA's view of the other side's rows: smem (box, slot) and gmem (box, tile)."""
    mY = rows_from(cfg, offset, op.tensor[None, None, head, batch])
    return tma_views(op, cute.local_tile(mY, (cfg.tile_columns, cfg.head_dim), (None, 0)), sY)


@cute.jit
def load_for_queries(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, tile: Tile):
    """Q and dO, then tiles of K and V from the last one down. Runs on: warp 0."""
    blocks = Visibility(cfg, params.window, tile).tiles()
    y_producer, y2_producer = pipes.y.make_producer(), pipes.y2.make_producer()
    tYsY, tYgY = tiles_of(cfg, params.y, smem.sY, tile.offset_k, tile.kv_head, tile.batch)
    tZsZ, tZgZ = tiles_of(cfg, params.y2, smem.sY2, tile.offset_k, tile.kv_head, tile.batch)
    if blocks.n_block_max > blocks.n_block_min:
        load_own_rows(cfg, params, smem, pipes, tile.m_block, tile.offset_q, (tile.head, tile.batch))
    for i in cutlass.range(blocks.n_block_max - blocks.n_block_min, unroll=1):
        n_block = blocks.n_block_max - 1 - i
        y = y_producer.acquire_and_advance()
        cute.copy(params.y.atom, tYgY[None, n_block], tYsY[None, y.index], tma_bar_ptr=y.barrier)
        y2 = y2_producer.acquire_and_advance()
        cute.copy(params.y2.atom, tZgZ[None, n_block], tZsZ[None, y2.index], tma_bar_ptr=y2.barrier)


@cute.jit
def load_for_keys(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, tile: KeyTile):
    """K and V, then of each query head of the group tiles of Q and dO with the rows' values. Runs on: warp 0."""
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    y_producer, y2_producer = pipes.y.make_producer(), pipes.y2.make_producer()
    if queries.m_block_max > queries.m_block_min:
        load_own_rows(cfg, params, smem, pipes, tile.n_block, tile.offset_k, (tile.kv_head, tile.batch))
    for i in cutlass.range(params.group, unroll=1):
        head = tile.kv_head * params.group + i
        tYsY, tYgY = tiles_of(cfg, params.y, smem.sY, tile.offset_q, head, tile.batch)
        tZsZ, tZgZ = tiles_of(cfg, params.y2, smem.sY2, tile.offset_q, head, tile.batch)
        shift, delta = params.shift[None, head], params.delta[None, head]
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_max, unroll=1):
            row = tile.first_q_block * PREPARED_ROWS + m_block * cfg.tile_m
            y = y_producer.acquire_and_advance()
            cute.copy(params.y.atom, tYgY[None, m_block], tYsY[None, y.index], tma_bar_ptr=y.barrier)
            load_rows(cfg, shift, row, smem.sShift[None, y.index], y.barrier)
            y2 = y2_producer.acquire_and_advance()
            cute.copy(params.y2.atom, tZgZ[None, m_block], tZsZ[None, y2.index], tma_bar_ptr=y2.barrier)
            if const_expr(cfg.has_dp):
                load_rows(cfg, delta, row, smem.sDelta[None, y2.index], y2.barrier)


# ---- consume ---------------------------------------------------------------------------------------------------------


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

    @cute.jit
    def step(self, mask, index: Int32, num_used: Int32, is_masked: Constexpr[bool]):
        """One tile of the other side: S, dP, and the gradient. Nothing is in flight before or after.

        num_used   rows of the tile that the sequence has; the others of packed tensors are another's
        """
        cfg = self.cfg
        acc_S, acc_dP = self.new_acc(), self.new_acc()
        y = self.y_consumer.wait_and_advance()
        y2 = self.y2_consumer.wait_and_advance()
        if const_expr(cfg.is_varlen):
            slots = self.smem.sY[None, None, y.index], self.smem.sY2[None, None, y2.index]
            clear_unused_rows(cfg, slots, num_used, self.tidx)
        if const_expr(not cfg.is_of_queries):
            start_at(acc_S, self.smem.sShift[None, y.index], self.tidx)
            if const_expr(cfg.has_dp):
                start_at(acc_dP, self.smem.sDelta[None, y2.index], self.tidx)
        issue_gemm(self.mmas.scores, acc_S, self.tSrX[None, None, None, 0], self.tSrY[None, None, None, y.index],
                   zero_init=cfg.is_of_queries)
        if const_expr(cfg.has_dp):
            issue_gemm(self.mmas.scores, acc_dP, self.tPrX2[None, None, None, 0],
                       self.tPrY2[None, None, None, y2.index], zero_init=cfg.is_of_queries)
        in_flight(int(cfg.has_dp))           # S
        if const_expr(is_masked):
            mask.apply(acc_S, index)
        self.make_P(acc_S)
        if const_expr(cfg.has_dp):
            in_flight(0)                     # dP
            y2.release()
            self.make_dS(acc_S, acc_dP)
        factor = cute.make_rmem_tensor_like(acc_S, element_type(cfg))
        convert(acc_S, factor)
        slot = y.index if const_expr(cfg.has_dp) else y2.index
        issue_gemm(self.mmas.gradient, self.acc_G, as_operand_a(cfg, factor), self.tGrY[None, None, None, slot],
                   zero_init=False)
        in_flight(0)
        y.release()
        if const_expr(not cfg.has_dp):
            y2.release()

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
    acc_G = cute.make_rmem_tensor(mmas.gradient.partition_shape_C((cfg.tile_rows, cfg.head_dim)), Float32)
    acc_G.fill(0.0)
    row_shift, row_delta = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
    row_shift.fill(0.0)
    row_delta.fill(0.0)
    return OneSide(
        cfg, mmas, smem,
        tSrX=mmas.scores.make_fragment_A(scores.partition_A(smem.sX)),
        tSrY=mmas.scores.make_fragment_B(scores.partition_B(smem.sY)),
        tPrX2=mmas.scores.make_fragment_A(scores.partition_A(smem.sX2)),
        tPrY2=mmas.scores.make_fragment_B(scores.partition_B(smem.sY2)),
        tGrY=mmas.gradient.make_fragment_B(gradient.partition_B(transposed(smem.sY if cfg.has_dp else smem.sY2))),
        acc_G=acc_G, row_shift=row_shift, row_delta=row_delta,
        y_consumer=pipes.y.make_consumer(), y2_consumer=pipes.y2.make_consumer(), scale_log2=params.scale_log2,
        tidx=tidx)


@cute.jit
def consume_for_queries(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, smem: SideSmem, pipes: SidePipelines,
                        tile: Tile):
    """dQ of a tile of queries. Runs on: consumer warpgroups."""
    tidx = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["consume"].warps[0]
    side = make_one_side(cfg, params, mmas, smem, pipes, tidx)
    visible = Visibility(cfg, params.window, tile)
    mask, blocks = visible.of_thread(tidx), visible.tiles()
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
    store_own_rows(cfg, params, mmas, smem, side.acc_G, (tile.m_block, tile.offset_q, tile.seqlen_q), tile.head,
                   tile.batch, tidx)


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
    for _ in cutlass.range(params.group, unroll=1):
        for m_block in cutlass.range(queries.m_block_min, queries.m_block_full_min, unroll=1):
            side.step(mask, m_block, tile.seqlen_q - m_block * cfg.tile_m, is_masked=True)
        for m_block in cutlass.range(queries.m_block_full_min, queries.m_block_full_max, unroll=1):
            side.step(mask, m_block, tile.seqlen_q - m_block * cfg.tile_m, is_masked=False)
        if const_expr(cfg.is_local):
            for m_block in cutlass.range(queries.m_block_full_max, queries.m_block_max, unroll=1):
                side.step(mask, m_block, tile.seqlen_q - m_block * cfg.tile_m, is_masked=True)
    store_own_rows(cfg, params, mmas, smem, side.acc_G, (tile.n_block, tile.offset_k, tile.seqlen_k), tile.kv_head,
                   tile.batch, tidx)


@cute.jit
def store_own_rows(cfg: OneSideConfig, params: SideParams, mmas: SideMmas, smem: SideSmem, acc: cute.Tensor,
                   where: tuple, head: Int32, batch: Int32, tidx: Int32):
    """The gradient -> x's slot -> rows below the sequence's length. where: (block, first row, rows of the sequence)."""
    (block, offset, seqlen), wg_idx = where, tidx // 128
    if const_expr(cfg.side != "dv"):
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = params.scale * acc[i]
    rG = cute.make_rmem_tensor_like(acc, element_type(cfg))
    convert(acc, rG)
    stmatrix = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), element_type(cfg))
    thread_copy = cute.make_tiled_copy_C(stmatrix, mmas.gradient).get_slice(tidx)
    sync_warpgroup(wg_idx)                 # all of it has read its rows of x
    cute.copy(thread_copy, thread_copy.retile(rG), thread_copy.partition_D(smem.sX[None, None, 0]))
    sync_warpgroup(wg_idx)
    shape, part = (ROWS_PER_WARPGROUP, cfg.head_dim), block * cfg.num_consumer_wgs + wg_idx
    gG = cute.local_tile(rows_from(cfg, offset, params.mG[None, None, head, batch]), shape, (part, 0))
    sG = cute.local_tile(smem.sX[None, None, 0], shape, (wg_idx, 0))
    store_used_rows(cfg, sG, gG, seqlen - part * ROWS_PER_WARPGROUP, tidx % 128, 128)
