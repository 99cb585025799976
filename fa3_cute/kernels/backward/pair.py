"""The backward kernel of dK and dV (planning/pair.py).

Of a CTA's 64 keys one warpgroup computes S^T, P^T and dV, the other dP^T, dS^T and dK, for which it is handed P^T
through shared memory:

    values   S^T  = K Q^T     P^T  = exp(scale S^T - LSE)    dV += P^T dO
    keys     dP^T = V dO^T    dS^T = P^T (dP^T - D)          dK += dS^T Q

Each fills the gaps of the other's GEMMs, up to num_p_stages tiles apart.
"""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.one_side import PREPARED_ROWS
from ...planning.pair import PAIR_ARGUMENTS, PairConfig
from ...planning.rings import by_name
from ..common.arithmetic import LOG2_E
from ..common.block_range import Window
from ..common.entry import flat_entry
from ..common.layout import element_type, tensor_view
from ..common.sequences import Sequences
from ..common.tma import tma_load
from .blocks import Extents, KeyTile
from .pair_bundles import PairLayouts, PairMmas, PairParams, PairPipelines, PairSmem
from .pair_consume import consume_keys, consume_values
from .pair_load import load
from .place import find_place


@flat_entry(PAIR_ARGUMENTS)
class PairBackward:
    """The kernel of one config. Compile `__call__`: its parameters are PAIR_ARGUMENTS, in order."""

    def __init__(self, cfg: PairConfig):
        self.cfg = cfg

    @cute.jit
    def launch(self, a):
        """dV = P^T dO, dK = scale dS^T Q; dS = P (dP - D), P = exp(scale S - LSE), dP = dO V^T"""
        cfg, sequences, layouts = self.cfg, Sequences.create(a), PairLayouts.create(self.cfg)
        shapes = Extents.create(cfg, a, sequences, PREPARED_ROWS)
        params = PairParams(
            q=tma_load(tensor_view(a, "q", shapes.q), layouts.sQ, cfg.tile_m),
            do=tma_load(tensor_view(a, "dout", shapes.do), layouts.sdO, cfg.tile_m),
            k=tma_load(tensor_view(a, "k", shapes.k), layouts.sK, cfg.tile_n),
            v=tma_load(tensor_view(a, "v", shapes.v), layouts.sV, cfg.tile_n),
            mdK=tensor_view(a, "dk", shapes.k), mdV=tensor_view(a, "dv", shapes.v),
            shift=cute.make_tensor(a.shift, shapes.vector), delta=cute.make_tensor(a.delta, shapes.vector),
            window=Window.create(cfg, a), sequences=sequences, q_blocks=shapes.q_blocks, k_blocks=shapes.k_blocks,
            num_heads_k=a.num_heads_k, group=a.num_heads // a.num_heads_k, scale=a.softmax_scale,
            scale_log2=a.softmax_scale * Float32(LOG2_E))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, layouts, make_pair_mmas(cfg)).launch(
            grid=(shapes.k_blocks.num_blocks * a.num_heads_k, 1, 1), block=(cfg.num_threads, 1, 1),
            min_blocks_per_mp=1, stream=a.stream)

    @cute.kernel
    def kernel(self, params: PairParams, layouts: PairLayouts, mmas: PairMmas):
        """Warp 0 loads, warps 1 to 3 retire; a warpgroup consumes for dV, another for dK."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (params.q, params.do, params.k, params.v):
                cpasync.prefetch_descriptor(operand.atom)
        smem, pipes = self.allocate(layouts)
        tile, is_there = self.find_tile(params)
        roles = by_name(cfg.roles)
        if warp_idx < roles["values"].warps[0]:
            cute.arch.setmaxregister_decrease(roles["load"].registers)
            if is_there and warp_idx == 0:
                load(cfg, params, smem, pipes, tile)
        else:
            cute.arch.setmaxregister_increase(roles["values"].registers)
            if is_there:
                if warp_idx < roles["keys"].warps[0]:
                    consume_values(cfg, params, mmas, smem, pipes, tile)
                else:
                    consume_keys(cfg, params, mmas, smem, pipes, tile)

    @cute.jit
    def find_tile(self, params: PairParams):
        """(KeyTile, whether it has a row). Runs on: whole warps."""
        cfg = self.cfg
        at = find_place(cfg, params.sequences, params.k_blocks, (params.num_heads_k, params.group),
                        cute.arch.block_idx()[0], in_sections=cfg.is_causal, is_reversed=False)
        tile = KeyTile(at.block, at.head, at.batch, at.offset_q, at.seqlen_q, at.offset_k, at.seqlen_k,
                       params.q_blocks.first(at.sequence), at.sequence)
        return tile, at.block * cfg.tile_n < at.seqlen_k

    @cute.jit
    def allocate(self, layouts: PairLayouts):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg = self.cfg
        allocator = cutlass.memory.SmemAllocator()
        rings = by_name(cfg.rings)
        bars = {name: allocator.allocate_array(Int64, 2 * rings[name].slots) for name in ("k", "v", "q", "do", "p")}
        tensor = lambda layout: allocator.allocate_tensor(
            element_type(cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)
        floats = lambda size, slots: allocator.allocate_tensor(
            Float32, cute.make_layout((size, slots)), byte_alignment=128)
        sK, sV, sQ, sdO = (tensor(layout) for layout in (layouts.sK, layouts.sV, layouts.sQ, layouts.sdO))
        smem = PairSmem(sK=sK, sV=sV, sQ=sQ, sdO=sdO, sP=floats(cfg.tile_n * cfg.tile_m, cfg.num_p_stages),
                        sShift=floats(cfg.tile_m, cfg.num_q_stages), sDelta=floats(cfg.tile_m, cfg.num_do_stages))
        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        facts = lambda name: {
            "num_stages": rings[name].slots, "producer_group": group(rings[name].full),
            "consumer_group": group(rings[name].empty), "barrier_storage": bars[name], "defer_sync": True}
        tma_ring = lambda name, more: pipeline.PipelineTmaAsync.create(
            **facts(name), tx_count=rings[name].slot_bytes + more)
        rows = 4 * cfg.tile_m
        pipes = PairPipelines(k=tma_ring("k", 0), v=tma_ring("v", 0), q=tma_ring("q", rows), do=tma_ring("do", rows),
                              p=pipeline.PipelineAsync.create(**facts("p")))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, pipes


def make_pair_mmas(cfg: PairConfig) -> PairMmas:
    """Both operands of the scores lie in shared memory; Q and dO are read MN-major from the same slots."""
    element = element_type(cfg)
    k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
    gradient = lambda columns: sm90.make_trivial_tiled_mma(
        element, element, k_major, mn_major, Float32, (1, 1, 1), (ROWS_PER_WARPGROUP, columns),
        warpgroup.OperandSource.RMEM)
    return PairMmas(
        sm90.make_trivial_tiled_mma(element, element, k_major, k_major, Float32, (1, 1, 1),
                                    (ROWS_PER_WARPGROUP, cfg.tile_m)),
        gradient(cfg.dim_v), gradient(cfg.dim_qk))
