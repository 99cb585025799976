"""FlashAttention-3 forward for sm_90a: a persistent grid; load, store and schedule warps, 1-3 consumer warpgroups."""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import cpasync

from ...planning.config import FORWARD_ARGUMENTS, FwdConfig
from ...planning.rings import by_name
from ...planning.strategies import Output
from ..common.arithmetic import ceil_div, minimum
from ..common.block_list import BlockLists
from ..common.block_range import Window
from ..common.entry import flat_entry
from ..common.dropout import Dropout
from ..common.fp8 import Descales
from ..common.keys_values import KeyPlaces, key_value_operand, key_value_ring, with_descriptors
from ..common.layout import dims_of, element_type, lse_view, out_type, smem_ring, tensor_view, transposed, view_as
from ..common.pages import ring_of_boxes
from ..common.ragged import UNLIMITED, RaggedBatch
from ..common.row_end import Sinks
from ..common.scores import ScoreTransform
from ..common.sequences import Sequences, is_present
from ..common.tile_ring import entry_ints
from ..common.tiles import Tile, with_packed_heads
from ..common.tma import tma_load, tma_store
from ..common.wgmma import Mmas, make_mmas
from .bundles import FwdLayouts, FwdParams, FwdPipelines, FwdSmem
from .consume import consume
from .load import load
from .order import TileGrid, heads_per_section
from .schedule import schedule
from .store import store
from .transpose_role import transpose


@flat_entry(FORWARD_ARGUMENTS)
class FlashAttentionForward:
    """The forward kernel of one config. Compile `__call__`: its parameters are FORWARD_ARGUMENTS, in order."""

    def __init__(self, cfg: FwdConfig):
        self.cfg = cfg

    # ---- host side: traced once per config, runs at every launch ------------------------------
    @cute.jit
    def launch(self, a):
        """lse[b, h, i] = ln sum_j exp(softmax_scale q_i.k_j); out[b, i, h] = sum_j exp(softmax_scale q_i.k_j - lse) v_j

        Pointers and strides (in elements) as in fa3_cute.FlashAttentionParams; num_sms CTAs at most are launched.
        """
        cfg, layouts, sequences, places = self.cfg, self.make_layouts(), Sequences.create(a), None
        batches = batches_k = a.batch_size
        if const_expr(cfg.is_varlen):
            batches = batches_k = Int32(1) if sequences.is_packed() else a.batch_size
        if const_expr(cfg.is_ragged):
            batches_k = Int32(1) if is_present(sequences.cu_seqlens_k) else a.batch_size_k
            sequences = RaggedBatch.create(cfg, a, a.decode_queries + 1, Int32(UNLIMITED))
            places = KeyPlaces.create(cfg, a, sequences)
        dim_qk, dim_v = dims_of(cfg, a)
        mQ, mO = (with_packed_heads(cfg, tensor_view(a, name, (a.seqlen_q, columns, a.num_heads, batches)))
                  for name, columns in (("q", dim_qk), ("out", dim_v)))
        k, v = (key_value_operand(cfg, a, name, (a.seqlen_k, columns, a.num_heads_k, batches_k), ring)
                for name, columns, ring in (("k", dim_qk, layouts.sK), ("v", dim_v, layouts.sV)))
        num_groups = a.num_heads // cfg.packed_heads if const_expr(cfg.packs_heads) else a.num_heads
        grid = TileGrid(
            num_m_blocks=ceil_div(a.seqlen_q, cfg.queries_per_tile), num_heads=num_groups, batch_size=a.batch_size,
            section=heads_per_section(num_groups * a.batch_size, num_groups // a.num_heads_k, a.seqlen_k,
                                      cfg.kv_bytes_per_token))
        num_tiles = grid.num_tiles()
        if const_expr(cfg.is_varlen):
            # The most that any lengths can make: packed sequences each end in a partial tile of their own.
            most = (a.seqlen_q // cfg.queries_per_tile + sequences.batch_size) * num_groups
            num_tiles = most if sequences.is_packed() else num_tiles
        rows = (cfg.packed_heads, cfg.queries_per_tile) if const_expr(cfg.packs_heads) else cfg.tile_m
        params = FwdParams(
            q=tma_load(mQ, layouts.sQ, rows), k=k, v=v, mO=mO,
            o=tma_store(mO, layouts.sO, rows) if const_expr(layouts.sO is not None) else None,
            mLSE=lse_view(a, batches) if const_expr(cfg.has_lse) else None,
            descales=Descales.create(a) if const_expr(cfg.is_fp8) else None,
            block_lists=BlockLists.create(a) if const_expr(cfg.has_block_lists) else None,
            scores=ScoreTransform.create(cfg, a), sinks=Sinks.create(a), dropout=Dropout.create(cfg, a),
            window=Window.create(cfg, a),
            grid=grid, sequences=sequences, places=places, num_heads=num_groups, num_heads_k=a.num_heads_k,
            tile_counter=cute.make_tensor(a.tile_counter, cute.make_layout(1)))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, layouts, make_mmas(cfg)).launch(
            grid=(minimum(num_tiles, a.num_sms), 1, 1), block=(cfg.num_threads, 1, 1),
            min_blocks_per_mp=1, stream=a.stream)   # without min_blocks_per_mp ptxas ignores setmaxnreg (C7508)

    def make_layouts(self) -> FwdLayouts:
        """Shared-memory layouts of the rings."""
        cfg, element = self.cfg, element_type(self.cfg)
        sVt = smem_ring(element, cfg.dim_v, cfg.tile_n, cfg.num_kv_stages) if cfg.values.is_transposed else None
        return FwdLayouts(sQ=smem_ring(element, cfg.tile_m, cfg.dim_qk, cfg.num_q_stages),
                          sO=None if cfg.output is Output.NOWHERE else smem_ring(
                              out_type(cfg), cfg.tile_m, cfg.dim_v, cfg.num_o_slots),
                          sK=ring_of_boxes(cfg, cfg.tile_n, cfg.dim_qk, cfg.num_kv_stages),
                          sV=ring_of_boxes(cfg, cfg.tile_n, cfg.dim_v, cfg.num_kv_stages), sVt=sVt)

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, params: FwdParams, layouts: FwdLayouts, mmas: Mmas):
        """Warp 0 loads, warp 1 stores, warp 2 schedules, warp 3 retires; FP8: warp 1 stores and schedules, 2 and 3
        transpose. The other warpgroups consume."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for operand in with_descriptors(params.q, params.k, params.v, *[params.o] * (params.o is not None)):
                cpasync.prefetch_descriptor(operand.atom)
        smem, pipes = self.allocate(layouts)
        roles = by_name(cfg.roles)
        if warp_idx < roles["consume"].warps[0]:
            cute.arch.setmaxregister_decrease(roles["load"].registers)
            if warp_idx == roles["load"].warps[0]:
                load(cfg, params, smem, pipes)
            if const_expr("store" in roles):
                if warp_idx == roles["store"].warps[0]:
                    store(cfg, params, smem, pipes)
            if warp_idx == roles["schedule"].warps[0]:
                schedule(cfg, params, smem, pipes)
            if const_expr("transpose" in roles):
                if warp_idx >= roles["transpose"].warps[0]:
                    transpose(cfg, params, smem, pipes)
        else:
            cute.arch.setmaxregister_increase(roles["consume"].registers)
            consume(cfg, params, mmas, smem, pipes)

    @cute.jit
    def allocate(self, layouts: FwdLayouts):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg = self.cfg
        allocator = cutlass.memory.SmemAllocator()
        rings = by_name(cfg.rings)
        names = ("q", "k", "v", "o", *["vt"] * cfg.values.has_ring, "tiles")
        bars = {name: allocator.allocate_array(Int64, 2 * rings[name].slots) for name in names}   # full and empty
        sTiles = allocator.allocate_tensor(
            Int32, cute.make_layout((entry_ints(Tile), rings["tiles"].slots)), byte_alignment=16)
        tensor = lambda layout, element=element_type(cfg): allocator.allocate_tensor(
            element, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        has_fewer = cfg.output is Output.IN_Q_SLOT and cfg.dim_v < cfg.dim_qk
        sO = None if const_expr(layouts.sO is None or has_fewer) else tensor(layouts.sO, out_type(cfg))
        shares = cfg.output is Output.IN_Q_SLOT and not has_fewer
        sQ = view_as(sO, layouts.sQ, element_type(cfg)) if const_expr(shares) else tensor(layouts.sQ)
        if const_expr(has_fewer):
            sO = view_as(sQ, layouts.sO, out_type(cfg))
        sK, sV = tensor(layouts.sK), tensor(layouts.sV)
        sVt = tensor(layouts.sVt) if const_expr(cfg.values.has_ring) else transposed(sV)
        sMask = None
        if const_expr(cfg.stages_mask):
            sMask = allocator.allocate_tensor(Uint8, cute.make_layout(rings["mask"].nbytes), byte_alignment=128)
        smem = FwdSmem(sQ=sQ, sO=sO, sK=sK, sV=sV, sVt=sVt, sTiles=sTiles, sMask=sMask)

        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        facts = lambda name: {
            "num_stages": rings[name].slots, "producer_group": group(rings[name].full),
            "consumer_group": group(rings[name].empty), "barrier_storage": bars[name], "defer_sync": True}
        kv_ring = lambda name, layout: key_value_ring(cfg, layout, **facts(name))
        v = vt = kv_ring("v", layouts.sV)
        if const_expr(cfg.values.has_ring):
            vt = pipeline.PipelineAsync.create(**facts("vt"))
        q = pipeline.PipelineTmaAsync.create(**facts("q"), tx_count=cfg.q_slot_bytes)
        pipes = FwdPipelines(
            q=q, k=kv_ring("k", layouts.sK), v=v, vt=vt,
            o=pipeline.PipelineAsync.create(**facts("o")), tiles=pipeline.PipelineAsync.create(**facts("tiles")))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, pipes
