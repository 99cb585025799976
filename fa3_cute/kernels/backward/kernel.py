"""FlashAttention-3 backward for sm_90a: a persistent grid; a CTA takes tiles of 64 keys per consumer warpgroup, past
each of which the Q tiles go that see them. Warps that load, schedule, add dQ to global memory and watch over what
leaves, two consumer warpgroups."""
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync

from ...planning.backward import BACKWARD_ARGUMENTS, BackwardConfig
from ...planning.config import ROWS_PER_WARPGROUP
from ...planning.rings import WARPS_PER_WARPGROUP, by_name
from ..common.arithmetic import minimum
from ..common.entry import flat_entry
from ..common.layout import element_type, smem_ring
from ..common.sequences import Sequences
from ..common.tile_ring import entry_ints
from .blocks import Extents, key_tile_of
from .bundles import BwdLayouts, BwdMmas, BwdParams, BwdPipelines, BwdSmem
from .consume import consume
from .duties import Duty
from .frame import SharedMemory, gradient_mma, publish_barriers, scores_mma, shared_params
from .load import load
from .outgoing import gradient_of, key_part, query_part
from .reduce import reduce_dq
from .schedule import ask_first, nothing_yet, schedule
from .scores import Scores
from .shares import Shares
from .split import make_split_mmas
from .split_consume import consume_split
from .watch import watch
from .workspace import Sums


@flat_entry(BACKWARD_ARGUMENTS)
class FlashAttentionBackward:
    """The main kernel of one config. Compile `__call__`: its parameters are BACKWARD_ARGUMENTS, in order."""

    def __init__(self, cfg: BackwardConfig):
        self.cfg = cfg

    # ---- host side: traced once per config, runs at every launch ------------------------------
    @cute.jit
    def launch(self, a):
        """dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K; dS = P (dP - D), P = exp(scale Q K^T - LSE), dP = dO V^T

        Pointers and strides (in elements) as in fa3_cute.BackwardParams. Where there is a query the prepare kernel runs
        before every launch: it zeroes counts, and a kernel that finds another call's there waits forever.
        """
        cfg, layouts, sequences = self.cfg, self.make_layouts(), Sequences.create(a)
        shapes = Extents.create(cfg, a, sequences, cfg.tile_m)
        q_blocks, k_blocks = shapes.q_blocks, shapes.k_blocks
        params = BwdParams(
            **shared_params(cfg, a, sequences, shapes, layouts),
            dk=gradient_of(a, "dk", "k", shapes.k, key_part(cfg)),
            dv=gradient_of(a, "dv", "v", shapes.v, key_part(cfg)),
            dq=gradient_of(a, "dq", "q", shapes.q, query_part(cfg)), sums=Sums.create(cfg, a),
            order=cute.make_tensor(a.order, cute.make_layout((1, q_blocks.num_blocks, a.num_heads))),
            tile_counter=cute.make_tensor(a.tile_counter, cute.make_layout(1)), is_rising=a.is_rising,
            num_behind=a.num_behind, tail_split=a.tail_split, scores=Scores.create(cfg, a),
            shares=Shares.create(cfg, a) if const_expr(cfg.shares_tiles) else None)
        num_places = k_blocks.num_blocks * a.num_heads_k - a.num_shared + a.num_parts + a.num_behind * a.tail_split
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, layouts, (make_split_mmas if cfg.is_split else make_bwd_mmas)(cfg)).launch(
            grid=(minimum(num_places, a.num_sms), 1, 1), block=(cfg.num_threads, 1, 1),
            min_blocks_per_mp=1,             # without it ptxas ignores setmaxnreg (C7508)
            use_pdl=True, stream=a.stream)

    def make_layouts(self) -> BwdLayouts:
        """Shared-memory layouts of the rings."""
        cfg, element = self.cfg, element_type(self.cfg)
        return BwdLayouts(sQ=smem_ring(element, cfg.tile_m, cfg.head_dim, cfg.num_q_stages),
                          sdO=smem_ring(element, cfg.tile_m, cfg.head_dim, cfg.num_do_stages),
                          sK=smem_ring(element, cfg.tile_n, cfg.head_dim, 1),
                          sV=smem_ring(element, cfg.tile_n, cfg.head_dim, 1),
                          sdS=smem_ring(element, cfg.tile_m, cfg.tile_n, cfg.num_ds_stages))

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, params: BwdParams, layouts: BwdLayouts, mmas: BwdMmas):
        """Warp 0 loads, warp 1 reduces dQ, warp 2 schedules, warp 3 watches; the other warpgroups consume."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in (params.q, params.do, params.k, params.v):
                cpasync.prefetch_descriptor(operand.atom)
        roles, has_queries, first = by_name(cfg.roles), params.sequences.rows_q > 0, nothing_yet(cfg)
        if has_queries & (warp_idx == roles["schedule"].warps[0]):
            first = ask_first(cfg, params)
        smem, pipes = self.allocate(layouts)
        is_early = (warp_idx == roles["load"].warps[0]) | (warp_idx == roles["schedule"].warps[0])
        if not (has_queries & is_early):     # see schedule.py; without queries there is no prepare kernel
            cute.arch.griddepcontrol_wait()
        if warp_idx < WARPS_PER_WARPGROUP:
            cute.arch.setmaxregister_decrease(roles["load"].registers)
            if warp_idx == roles["load"].warps[0]:
                load(cfg, params, smem, pipes)
            if warp_idx == roles["reduce"].warps[0]:
                reduce_dq(cfg, params, smem, pipes)
            if warp_idx == roles["schedule"].warps[0]:
                schedule(cfg, params, smem, pipes, first)
            if warp_idx == roles["watch"].warps[0]:
                watch(cfg, params, smem, pipes)
        elif const_expr(cfg.is_split):
            consume_split(cfg, params, mmas, smem, pipes)
        else:
            cute.arch.setmaxregister_increase(roles["consume"].registers)
            consume(cfg, params, mmas, smem, pipes)

    @cute.jit
    def allocate(self, layouts: BwdLayouts):
        """Carve shared memory; initialise and publish the mbarriers."""
        of_split = ("p",) if self.cfg.is_split else ()
        memory = SharedMemory(self.cfg, ("tiles", "k", "v", "q", "do", *of_split, "ds", "dq"))
        entries = cute.make_layout((entry_ints(key_tile_of(self.cfg)), memory.rings["tiles"].slots))
        sTiles = memory.allocator.allocate_tensor(Int32, entries, byte_alignment=16)
        entries = cute.make_layout((entry_ints(Duty), memory.rings["tiles"].slots))
        sDuties = memory.allocator.allocate_tensor(Int32, entries, byte_alignment=16)
        sK, sV, sQ, sdO, sdS = (memory.tensor(layout) for layout in (
            layouts.sK, layouts.sV, layouts.sQ, layouts.sdO, layouts.sdS))
        sdQ = memory.floats("dq", 1024)      # for what leaves, too
        smem = BwdSmem(sTiles=sTiles, sDuties=sDuties, sQ=sQ, sdO=sdO, sK=sK, sV=sV, sdS=sdS, sdQ=sdQ,
                       sShift=memory.floats("shift"), sDelta=memory.floats("delta"))
        pipes = BwdPipelines(
            tiles=memory.ring("tiles"), k=memory.tma_ring("k"), v=memory.tma_ring("v"),
            q=memory.tma_ring("q", "shift"), do=memory.tma_ring("do", "delta"), ds=memory.ring("ds"),
            p=memory.ring("p") if self.cfg.is_split else None, dq=memory.ring("dq"))
        publish_barriers()
        return smem, pipes


def make_bwd_mmas(cfg: BackwardConfig) -> BwdMmas:
    """Of the five GEMMs."""
    warpgroups = cfg.num_consumer_wgs
    return BwdMmas(sdp=scores_mma(cfg, warpgroups, cfg.tile_m), dkv=gradient_mma(cfg, warpgroups, cfg.head_dim),
                   dq=make_dq_mma(cfg, cfg.num_dq_wgs), dkv_part=gradient_mma(cfg, 1, cfg.head_dim),
                   dq_part=make_dq_mma(cfg, 1))


def make_dq_mma(cfg: BackwardConfig, warpgroups: int) -> cute.TiledMma:
    """Of dQ = dS K or dQ^T = K^T dS^T."""
    element, atoms = element_type(cfg), (warpgroups, 1, 1)
    k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
    majors, columns = (k_major, mn_major), cfg.head_dim
    if cfg.is_dq_transposed:
        majors, columns = (mn_major, k_major), cfg.tile_m
    return sm90.make_trivial_tiled_mma(element, element, *majors, Float32, atoms, (ROWS_PER_WARPGROUP, columns))
