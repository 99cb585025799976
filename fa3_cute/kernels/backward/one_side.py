"""The backward kernel of one gradient (planning/one_side.py).

x, x2 are the CTA's own rows, y, y2 tiles of the other side:

    dQ     x = Q, x2 = dO    y = K, y2 = V      S  = Q K^T    dP  = dO V^T    dQ += dS K
    dK     x = K, x2 = V     y = Q, y2 = dO     S^T = K Q^T   dP^T = V dO^T   dK += dS^T Q
    dV     x = K             y = Q, y2 = dO     S^T = K Q^T                   dV += P^T dO
    d_bias as dQ, whose dS it writes

Each warpgroup has 64 rows and waits for no other: their GEMMs fill one another's gaps.
"""
import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr
from cutlass.cute.nvgpu import cpasync

from ...planning.one_side import ONE_SIDE_ARGUMENTS, PREPARED_ROWS, OneSideConfig
from ...planning.rings import by_name
from ..common.arithmetic import LOG2_E
from ..common.block_range import Window
from ..common.dropout import Dropout
from ..common.entry import flat_entry
from ..common.layout import tensor_view
from ..common.sequences import Sequences
from ..common.tiles import Tile
from ..common.tma import tma_load
from ..common.visibility import Visibility
from .blocks import Extents, KeyTile, query_range
from .frame import SharedMemory, gradient_mma, publish_barriers, scores_mma
from .load import QueryTiles, load_heads, load_tile
from .one_side_bundles import SideLayouts, SideMmas, SideParams, SidePipelines, SideSmem
from .one_side_consume import consume_for_keys, consume_for_queries
from .place import find_place
from .scores import BiasGradient, Scores


@flat_entry(ONE_SIDE_ARGUMENTS)
class OneSideBackward:
    """The kernel of one config. Compile `__call__`: its parameters are ONE_SIDE_ARGUMENTS, in order."""

    def __init__(self, cfg: OneSideConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """dQ = scale dS K, dK = scale dS^T Q or dV = P^T dO; dS = P (dP - D), P = exp(scale S - LSE), dP = dO V^T"""
        cfg, sequences, layouts = self.cfg, Sequences.create(a), SideLayouts.create(self.cfg)
        shapes = Extents.create(cfg, a, sequences, PREPARED_ROWS)
        names, own, other = ("q", "dout", "k", "v"), (shapes.q, shapes.do), (shapes.k, shapes.v)
        if const_expr(not cfg.is_of_queries):
            names, own, other = ("k", "v", "q", "dout"), (shapes.k, shapes.v), (shapes.q, shapes.do)
        x = tma_load(tensor_view(a, names[0], own[0]), layouts.sX, cfg.tile_rows)
        x2 = tma_load(tensor_view(a, names[1], own[1]), layouts.sX2, cfg.tile_rows)
        y = tma_load(tensor_view(a, names[2], other[0]), layouts.sY, cfg.tile_columns)
        y2 = tma_load(tensor_view(a, names[3], other[1]), layouts.sY2, cfg.tile_columns)
        blocks = shapes.q_blocks if const_expr(cfg.is_of_queries) else shapes.k_blocks
        num_heads = a.num_heads if const_expr(cfg.is_of_queries) else a.num_heads_k
        params = SideParams(
            x=x, x2=x2, y=y, y2=y2, mG=tensor_view(a, "gradient", own[1 if cfg.side == "dv" else 0]),
            shift=cute.make_tensor(a.shift, shapes.vector), delta=cute.make_tensor(a.delta, shapes.vector),
            window=Window.create(cfg, a), sequences=sequences, q_blocks=shapes.q_blocks, blocks=blocks,
            num_heads=num_heads, section=a.section, group=a.num_heads // a.num_heads_k, scale=a.softmax_scale,
            scale_log2=a.softmax_scale * Float32(LOG2_E), scores=Scores.create(cfg, a),
            d_bias=None if cfg.has_gradient else BiasGradient.create(a), dropout=Dropout.create(cfg, a))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, layouts, make_side_mmas(cfg)).launch(
            grid=(blocks.num_blocks * num_heads, 1, 1), block=(cfg.num_threads, 1, 1),
            min_blocks_per_mp=1, stream=a.stream)

    @cute.kernel
    def kernel(self, params: SideParams, layouts: SideLayouts, mmas: SideMmas):
        """Warp 0 loads, warps 1 to 3 retire; the other warpgroups consume."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (params.x, params.x2, params.y, params.y2):
                cpasync.prefetch_descriptor(operand.atom)
        smem, pipes = self.allocate(layouts)
        tile, sequence, is_there = self.find_tile(params)
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
                    consume_for_queries(cfg, params, mmas, smem, pipes, tile, sequence)
                else:
                    consume_for_keys(cfg, params, mmas, smem, pipes, tile)

    @cute.jit
    def find_tile(self, params: SideParams):
        """(KeyTile or Tile, sequence, whether it has a row). Runs on: whole warps."""
        cfg = self.cfg
        # Of dense causal queries the last ones first, which see most keys.
        at = find_place(cfg, params.sequences, params.blocks, params.num_heads, params.section,
                        cute.arch.block_idx()[0], cfg.is_causal,
                        is_reversed=cfg.is_of_queries and cfg.is_causal and not cfg.is_varlen)
        if const_expr(cfg.is_of_queries):
            # Tile.sequence: its first block among the prepared ones, which is all that is asked of it here
            first_q_block = params.q_blocks.first(at.sequence)
            tile = Tile(at.block, at.head, at.head // params.group, at.batch, at.offset_q, at.seqlen_q, at.offset_k,
                        at.seqlen_k, first_q_block)
            is_there = at.block * cfg.tile_rows < at.seqlen_q
        else:
            tile = at.keys(params.q_blocks)
            is_there = at.block * cfg.tile_rows < at.seqlen_k
        return tile, at.sequence, is_there

    @cute.jit
    def allocate(self, layouts: SideLayouts):
        """Carve shared memory; initialise and publish the mbarriers."""
        cfg, memory = self.cfg, SharedMemory(self.cfg, ("x", "y", "y2"))
        sX = memory.tensor(layouts.sX)
        sX2 = memory.tensor(layouts.sX2) if const_expr(cfg.has_dp) else sX
        sY, sY2 = memory.tensor(layouts.sY), memory.tensor(layouts.sY2)
        has_vectors = not cfg.is_of_queries
        smem = SideSmem(sX, sX2, sY, sY2, memory.floats("shift") if has_vectors else None,
                        memory.floats("delta") if has_vectors and cfg.has_dp else None)
        pipes = SidePipelines(x=memory.tma_ring("x", "x2"), y=memory.tma_ring("y", "shift"),
                              y2=memory.tma_ring("y2", "delta"))
        publish_barriers()
        return smem, pipes


def make_side_mmas(cfg: OneSideConfig) -> SideMmas:
    """Over all consumer warpgroups."""
    warpgroups = cfg.num_consumer_wgs
    return SideMmas(scores_mma(cfg, warpgroups, cfg.tile_columns), gradient_mma(cfg, warpgroups, cfg.dim_gradient))


# ---- load ------------------------------------------------------------------------------------------------------------


@cute.jit
def load_own_rows(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, where: tuple):
    """x and x2, once. where: as in load_tile."""
    slot = pipes.x.make_producer().acquire_and_advance()
    load_tile(cfg, params.x, smem.sX, where, slot)
    if const_expr(cfg.has_dp):
        load_tile(cfg, params.x2, smem.sX2, where, slot)


@cute.jit
def load_for_queries(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, tile: Tile):
    """Q and dO, then tiles of K and V from the last one down. Runs on: warp 0."""
    blocks = Visibility(cfg, params.window, tile).tiles()
    y_producer, y2_producer = pipes.y.make_producer(), pipes.y2.make_producer()
    if blocks.n_block_max > blocks.n_block_min:
        load_own_rows(cfg, params, smem, pipes, (tile.m_block, tile.offset_q, tile.head, tile.batch))
    for i in cutlass.range(blocks.n_block_max - blocks.n_block_min, unroll=1):
        where = blocks.n_block_max - 1 - i, tile.offset_k, tile.kv_head, tile.batch
        load_tile(cfg, params.y, smem.sY, where, y_producer.acquire_and_advance())
        load_tile(cfg, params.y2, smem.sY2, where, y2_producer.acquire_and_advance())


@cute.jit
def load_for_keys(cfg: OneSideConfig, params: SideParams, smem: SideSmem, pipes: SidePipelines, tile: KeyTile):
    """K and V, then of each query head of the group tiles of Q and dO with the rows' values. Runs on: warp 0."""
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if queries.m_block_max > queries.m_block_min:
        load_own_rows(cfg, params, smem, pipes, (tile.n_block, tile.offset_k, tile.kv_head, tile.batch))
    q = QueryTiles(cfg, params.y, smem.sY, pipes.y.make_producer(), params.shift, smem.sShift)
    do = QueryTiles(cfg, params.y2, smem.sY2, pipes.y2.make_producer(), params.delta, smem.sDelta)
    load_heads(cfg, params.group, tile, queries, q, do)
