"""Attention of 512 columns of V for sm_90a: MLA decode, many query heads over one K of 576 columns whose first 512 are
V, or which come in two parts, K of 64 columns and V; and heads of 512, with K and V of their own.

The decode kernel's splits, clusters and merges. O of an M tile, 64 x 512, has the registers of two warpgroups: each
has half of the columns. The first one computes S and P, in registers for its own PV and through shared memory for that
of the second one.
"""
from dataclasses import fields

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from ...planning.config import DECODE_ARGUMENTS, ROWS_PER_WARPGROUP
from ...planning.rings import by_name
from ..common.cluster import sync_cluster
from ..common.entry import flat_entry
from ..common.keys_values import Operand, key_value_operand
from ..common.layout import element_type, smem_ring, tensor_view, transposed
from ..common.pages import ring_of_boxes
from ..common.tma import EVICT_NORMAL, kv_policy
from ..decode.bundles import DecodeLayouts, DecodeParams, DecodePipelines
from ..decode.kernel import FlashAttentionDecode
from ..decode.split import SplitGrid, SplitWork
from .bundles import MlaLayouts, MlaMmas, MlaParams, MlaSmem
from .consume import consume_split
from .load import load


@flat_entry(DECODE_ARGUMENTS)
class FlashAttentionMla(FlashAttentionDecode):
    """The MLA kernel of one config. Compile `__call__`: its parameters are DECODE_ARGUMENTS, in order."""

    # ---- host side: traced once per config, runs at every launch ------------------------------
    def layouts(self) -> MlaLayouts:
        """Of shared memory."""
        cfg, element = self.cfg, element_type(self.cfg)
        sK, sV = (ring_of_boxes(cfg, cfg.tile_n, columns, cfg.num_kv_stages) for columns in (cfg.dim_qk, cfg.dim_v))
        return MlaLayouts(sQ=smem_ring(element, cfg.tile_m, cfg.dim_qk, 1), sK=sK, sV=sK if cfg.has_v_in_k else sV,
                          sVt=None, wide_K=None, wide_V=None, sP=smem_ring(element, cfg.tile_m, cfg.tile_n, 1),
                          sQv=smem_ring(element, cfg.tile_m, cfg.dim_v, 1) if cfg.has_qv else None)

    def operands(self, a, layouts: DecodeLayouts, batches_k: Int32) -> tuple[Operand, Operand]:
        """K and V; where V lies in K, K twice: V's pointer and strides are not looked at."""
        if not self.cfg.has_v_in_k:
            return super().operands(a, layouts, batches_k)
        k = key_value_operand(self.cfg, a, "k", (a.seqlen_k, self.cfg.dim_qk, a.num_heads_k, batches_k), layouts.sK)
        return k, k

    def extended(self, params: DecodeParams, a, batches: Int32) -> MlaParams:
        """With the second part of Q, if there is one."""
        mQv = None
        if self.cfg.has_qv:
            mQv = tensor_view(a, "q_v", (a.seqlen_q, self.cfg.dim_v, a.num_heads, batches))
        return MlaParams(**{field.name: getattr(params, field.name) for field in fields(params)}, mQv=mQv)

    @cute.jit
    def policy(self, grid: SplitGrid, num_bytes: Int64) -> Int64:
        """L2 policy of K: other M tiles of the same head read it soon."""
        policy = kv_policy(num_bytes)
        if grid.num_m_blocks.divisor * grid.groups_per_kv_head.divisor > 1:
            policy = Int64(EVICT_NORMAL)
        return policy

    def mmas(self) -> MlaMmas:
        """The GEMMs."""
        cfg, element, one = self.cfg, element_type(self.cfg), (1, 1, 1)
        half = ROWS_PER_WARPGROUP, cfg.dim_v // cfg.num_consumer_wgs
        pv = element, element, OperandMajorMode.K, OperandMajorMode.MN, Float32, one, half
        return MlaMmas(
            qk=sm90.make_trivial_tiled_mma(element, element, OperandMajorMode.K, OperandMajorMode.K, Float32, one,
                                           (ROWS_PER_WARPGROUP, cfg.tile_n)),
            pv=sm90.make_trivial_tiled_mma(*pv, warpgroup.OperandSource.RMEM),
            follow=sm90.make_trivial_tiled_mma(*pv))

    # ---- device side --------------------------------------------------------------------------
    @cute.jit
    def play(self, params: MlaParams, mmas: MlaMmas, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork,
             warp_idx: Int32):
        """Warps 0-7 consume, warp 8 loads; 9-11 complete its warpgroup, which registers are dealt out to."""
        roles = by_name(self.cfg.roles)
        if warp_idx >= roles["load"].warps[0]:
            cute.arch.setmaxregister_decrease(roles["load"].registers)
            if warp_idx == roles["load"].warps[0]:
                load(self.cfg, params, smem, pipes, work)
            sync_cluster()      # as the consumers do, once
        else:
            cute.arch.setmaxregister_increase(roles["consume"].registers)
            consume_split(self.cfg, params, mmas, smem, pipes, work)

    @cute.jit
    def allocate(self, layouts: MlaLayouts):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg, rings = self.cfg, by_name(self.cfg.rings)
        allocator = cutlass.memory.SmemAllocator()
        bars = {name: allocator.allocate_array(Int64, 2 * ring.slots) for name, ring in rings.items() if ring.full}
        partials_arrived = allocator.allocate_array(Int64, 1)
        small = lambda element, size: allocator.allocate_tensor(element, cute.make_layout(size), byte_alignment=16)
        sArrived, sPartialLSE, sFactors = small(Int32, 1), small(Float32, cfg.partial_lines), small(Float32, cfg.tile_m)
        tensor = lambda layout: allocator.allocate_tensor(
            element_type(cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sQ = tensor(layouts.sQ)
        sQv = tensor(layouts.sQv) if const_expr(cfg.has_qv) else None
        sK = tensor(layouts.sK)
        if const_expr(cfg.has_v_in_k):
            sV = cute.composition(sK, (cute.make_layout(cfg.tile_n), cute.make_layout(cfg.dim_v),
                                       cute.make_layout(cfg.num_kv_stages)))
        else:
            sV = tensor(layouts.sV)
        sP = tensor(layouts.sP)
        sPartial = cute.make_tensor(cute.recast_ptr(sQ.iterator, dtype=Float32), cute.make_layout(
            (cfg.partial_lines, cfg.dim_v), stride=(cfg.dim_v, 1)))
        smem = MlaSmem(partials_arrived, sArrived, sPartialLSE, sQ, sK, sV, None, None, transposed(sV), sPartial, sP,
                       sFactors, sQv)

        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        ring_of = lambda ring: pipeline.PipelineTmaAsync.create(
            num_stages=ring.slots, producer_group=group(ring.full), consumer_group=group(ring.empty),
            barrier_storage=bars[ring.name], tx_count=cfg.tx_bytes[ring.name], defer_sync=True)
        k = ring_of(rings["k"])
        v = ring_of(rings["v"]) if const_expr("v" in bars) else k
        if cute.arch.thread_idx()[0] == 0:
            cute.arch.mbarrier_init(partials_arrived, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, DecodePipelines(k=k, v=v, wide_k=k, vt=v)
