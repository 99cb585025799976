"""The backward kernel of dK and dV (planning/pair.py).

Of a CTA's 64 keys one warpgroup computes S^T, P^T and dV, the other dP^T, dS^T and dK, for which it is handed P^T
through shared memory:

    values   S^T  = K Q^T     P^T  = exp(scale S^T - LSE)    dV += P^T dO
    keys     dP^T = V dO^T    dS^T = P^T (dP^T - D)          dK += dS^T Q

Each fills the gaps of the other's GEMMs, up to num_p_stages tiles apart.
"""
import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync

from ...planning.one_side import PREPARED_ROWS
from ...planning.pair import PAIR_ARGUMENTS, PairConfig
from ...planning.rings import by_name
from ..common.entry import flat_entry
from ..common.layout import tensor_view
from ..common.sequences import Sequences
from .blocks import Extents
from .frame import SharedMemory, gradient_mma, publish_barriers, scores_mma, shared_params
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
        params = PairParams(**shared_params(cfg, a, sequences, shapes, layouts),
                            mdK=tensor_view(a, "dk", shapes.k), mdV=tensor_view(a, "dv", shapes.v))
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
        at = find_place(cfg, params.sequences, params.k_blocks, params.num_heads_k, params.section,
                        cute.arch.block_idx()[0], in_sections=cfg.is_causal, is_reversed=False)
        return at.keys(params.q_blocks), at.block * cfg.tile_n < at.seqlen_k

    @cute.jit
    def allocate(self, layouts: PairLayouts):
        """Carve shared memory; initialise and publish the mbarriers."""
        memory = SharedMemory(self.cfg, ("k", "v", "q", "do", "p"))
        sK, sV, sQ, sdO = (memory.tensor(layout) for layout in (layouts.sK, layouts.sV, layouts.sQ, layouts.sdO))
        smem = PairSmem(sK=sK, sV=sV, sQ=sQ, sdO=sdO, sP=memory.floats("p"), sShift=memory.floats("shift"),
                        sDelta=memory.floats("delta"))
        pipes = PairPipelines(k=memory.tma_ring("k"), v=memory.tma_ring("v"), q=memory.tma_ring("q", "shift"),
                              do=memory.tma_ring("do", "delta"), p=memory.ring("p"))
        publish_barriers()
        return smem, pipes


def make_pair_mmas(cfg: PairConfig) -> PairMmas:
    """Each of one warpgroup."""
    return PairMmas(scores_mma(cfg, 1, cfg.tile_m), gradient_mma(cfg, 1, cfg.dim_v), gradient_mma(cfg, 1, cfg.dim_qk))
