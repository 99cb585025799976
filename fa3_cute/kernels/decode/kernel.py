"""Decode for sm_90a: few query rows over a long K and V, read by many CTAs whose partial results merge in the launch.

The same softmax, masks and main loop as the forward kernel; a CTA's work is one split of one M tile (split.py).
"""
from functools import partial

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from ...planning.config import DECODE_ARGUMENTS, DecodeConfig
from ...planning.rings import by_name
from ..common.arithmetic import maximum, minimum
from ..common.block_range import Window, split_range
from ..common.cluster import sync_cluster
from ..common.entry import flat_entry
from ..common.fp8 import Descales
from ..common.keys_values import capacity
from ..common.layout import element_type, lse_view, smem_ring, tensor_view, transposed, view_as
from ..common.scores import ScoreTransform
from ..common.sequences import UsedLengths
from ..common.tiles import Tile
from ..common.tma import kv_policy, tma_load
from ..common.visibility import Visibility
from ..common.wgmma import Mmas, make_mmas
from .bundles import DecodeLayouts, DecodeParams, DecodePipelines, DecodeSmem
from .consume import consume_split
from .load import load_split
from .split import SplitGrid, SplitScratch, SplitWork, place_of


@flat_entry(DECODE_ARGUMENTS)
class FlashAttentionDecode:
    """The decode kernel of one config. Compile `__call__`: its parameters are DECODE_ARGUMENTS, in order."""

    def __init__(self, cfg: DecodeConfig):
        self.cfg = cfg

    # ---- host side: traced once per config, runs at every launch ------------------------------
    @cute.jit
    def launch(self, a):
        """lse[b, h, i] = ln sum_j exp(softmax_scale q_i.k_j); out[b, i, h] = sum_j exp(softmax_scale q_i.k_j - lse) v_j

        Pointers and strides (in elements) as in fa3_cute.FlashAttentionParams. packed_heads divides the query heads per
        KV head, cluster_size (at most 16) divides num_splits; smem_bytes is at least cfg.smem_bytes. partials and
        arrivals: see split.SplitScratch.
        """
        cfg = self.cfg
        ring = partial(smem_ring, element_type(cfg))
        layouts = DecodeLayouts(
            sQ=ring(cfg.tile_m, cfg.dim_qk, 1), sK=ring(cfg.tile_n, cfg.dim_qk, cfg.num_kv_stages),
            sV=ring(cfg.tile_n, cfg.dim_v, cfg.num_kv_stages),
            sVt=ring(cfg.dim_v, cfg.tile_n, cfg.num_kv_stages) if cfg.values.is_transposed else None)
        grid = SplitGrid.create(cfg.tile_m, a.batch_size, a.seqlen_q, a.num_heads, a.num_heads // a.num_heads_k,
                                a.packed_heads, a.num_splits, a.cluster_size)
        mQ, mO = (tensor_view(a, name, (a.seqlen_q, columns, a.num_heads, a.batch_size))
                  for name, columns in (("q", cfg.dim_qk), ("out", cfg.dim_v)))
        mK, mV = (tensor_view(a, name, (a.seqlen_k, columns, a.num_heads_k, a.batch_size))
                  for name, columns in (("k", cfg.dim_qk), ("v", cfg.dim_v)))
        num_clusters = a.num_splits // a.cluster_size
        params = DecodeParams(
            k=tma_load(mK, layouts.sK, cfg.tile_n), v=tma_load(mV, layouts.sV, cfg.tile_n), mQ=mQ, mO=mO,
            mLSE=lse_view(a, a.batch_size), lengths=UsedLengths.create(a),
            descales=Descales.create(a) if const_expr(cfg.is_fp8) else None,
            scratch=self.scratch(grid, num_clusters, a.partials, a.arrivals),
            scores=ScoreTransform.create(cfg, a), window=Window(a.window_size_left, a.window_size_right),
            grid=grid, num_clusters=num_clusters,
            kv_policy=kv_policy(Int64(a.batch_size) * a.seqlen_k * a.num_heads_k * cfg.kv_bytes_per_token))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(params, layouts, make_mmas(cfg)).launch(
            grid=(grid.num_items * a.num_splits, 1, 1), block=(cfg.num_threads, 1, 1), cluster=(a.cluster_size, 1, 1),
            smem=a.smem_bytes, min_blocks_per_mp=cfg.ctas_per_sm, preferred_smem_carveout=100, use_pdl=True,
            stream=a.stream)

    def scratch(self, grid: SplitGrid, clusters: Int32, partials: cute.Pointer, arrivals: cute.Pointer) -> SplitScratch:
        """The scratch memory as tensors: O, and behind it LSE; `clusters` work on one item."""
        num_items, dim_v, rows = grid.num_items, self.cfg.dim_v, minimum(grid.num_rows, self.cfg.tile_m)
        per_item = Int64(clusters) * rows
        aligned = partial(cute.assume, divby=dim_v)       # for 16-byte accesses
        O = cute.make_tensor(partials, cute.make_layout(
            (num_items, clusters, rows, dim_v),
            stride=(aligned(per_item * dim_v), aligned(rows * dim_v), dim_v, 1)))
        LSE = cute.make_tensor(partials + num_items * per_item * dim_v, cute.make_layout(
            (num_items, clusters, rows), stride=(per_item, rows, 1)))
        num_counts = num_items * grid.cluster_size.divisor
        return SplitScratch(O, LSE, cute.make_tensor(arrivals, cute.make_layout(num_counts)))

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, params: DecodeParams, layouts: DecodeLayouts, mmas: Mmas):
        """Warps 0-3 consume, warp 4 loads."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        load_warp = by_name(cfg.roles)["load"].warps[0]
        if warp_idx == load_warp:
            cpasync.prefetch_descriptor(params.k.atom)
            cpasync.prefetch_descriptor(params.v.atom)
        smem, pipes = self.allocate(layouts)
        work = self.work_of(params, cute.arch.block_idx()[0])
        if warp_idx == load_warp:
            load_split(cfg, params, smem, pipes, work)
            sync_cluster()      # as the consumers do, once
        else:
            consume_split(cfg, params, mmas, smem, pipes, work)

    @cute.jit
    def work_of(self, params: DecodeParams, index: Int32) -> SplitWork:
        """What CTA `index` works on. Waits for the kernel before this one on the stream: below, memory is read."""
        cfg, grid = self.cfg, params.grid
        packed_heads = grid.packed_heads.divisor
        item, split, m_block, group, batch = place_of(grid, index)
        cluster, rank = divmod(split, grid.cluster_size)
        kv_head = group // grid.groups_per_kv_head
        cute.arch.griddepcontrol_wait()
        seqlen_q, seqlen_k = params.lengths.of(batch, params.mQ.shape[0], capacity(params.k))
        tile = Tile(m_block, group * packed_heads, kv_head, batch, Int32(0), seqlen_q, Int32(0), seqlen_k, batch)
        tiles = Visibility(cfg, params.window, tile, grid.packed_heads).tiles()
        num_rows = minimum(maximum(seqlen_q * packed_heads - m_block * cfg.tile_m, 0), cfg.tile_m)
        num_own_rows = (num_rows + grid.cluster_size.divisor - 1 - rank) // grid.cluster_size
        return SplitWork(tile, split_range(tiles, split, grid.num_splits), item, cluster, rank, num_rows, num_own_rows)

    @cute.jit
    def allocate(self, layouts: DecodeLayouts):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg = self.cfg
        allocator = cutlass.memory.SmemAllocator()
        k_bars, v_bars = (allocator.allocate_array(Int64, 2 * cfg.num_kv_stages) for _ in range(2))
        partials_arrived = allocator.allocate_array(Int64, 1)
        sArrived = allocator.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)
        sPartialLSE = allocator.allocate_tensor(Float32, cute.make_layout(cfg.partial_lines), byte_alignment=16)
        tensor = lambda layout: allocator.allocate_tensor(
            element_type(cfg), layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sQ, sK, sV = tensor(layouts.sQ), tensor(layouts.sK), tensor(layouts.sV)
        sVt = view_as(sV, layouts.sVt, element_type(cfg)) if const_expr(cfg.values.is_transposed) else transposed(sV)
        sPartial = cute.make_tensor(cute.recast_ptr(sK.iterator, dtype=Float32), cute.make_layout(
            (cfg.partial_lines, cfg.dim_v), stride=(cfg.dim_v, 1)))
        smem = DecodeSmem(partials_arrived, sArrived, sPartialLSE, sQ, sK, sV, sVt, sPartial)

        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        rings = by_name(cfg.rings)
        tma_ring = lambda name, bars, layout: pipeline.PipelineTmaAsync.create(
            num_stages=rings[name].slots, producer_group=group(rings[name].full),
            consumer_group=group(rings[name].empty), barrier_storage=bars, defer_sync=True,
            tx_count=cute.size_in_bytes(element_type(cfg), cute.select(layout, mode=[0, 1])))
        v = tma_ring("v", v_bars, layouts.sV)
        pipes = DecodePipelines(k=tma_ring("k", k_bars, layouts.sK), v=v, vt=v)
        if cute.arch.thread_idx()[0] == 0:
            cute.arch.mbarrier_init(partials_arrived, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, pipes
