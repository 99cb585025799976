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
from ...planning.rings import WARP, by_name
from ..common.arithmetic import maximum, minimum
from ..common.block_range import Window, split_range
from ..common.cluster import sync_cluster
from ..common.entry import flat_entry
from ..common.dropout import Dropout
from ..common.fp8 import Descales
from ..common.keys_values import (
    KeyPlaces, Operand, capacity, key_value_operand, key_value_ring, with_descriptors
)
from ..common.layout import dims_of, lse_view, operand_type, smem_ring, stored_type, tensor_view, transposed, view_as
from ..common.pages import ring_of_boxes
from ..common.ragged import RaggedBatch
from ..common.row_end import Sinks
from ..common.scores import ScoreTransform
from ..common.sequences import UsedLengths, is_present
from ..common.tiles import Tile
from ..common.tma import kv_policy
from ..common.visibility import Visibility
from ..common.widen import WideRing
from ..common.wgmma import Mmas, make_mmas
from .bundles import DecodeLayouts, DecodeParams, DecodePipelines, DecodeSmem
from .consume import consume_split
from .load import load_split
from .ragged import Dealer, RaggedGrid
from .split import SplitGrid, SplitScratch, SplitWork, place_of, rows_of
from .widen_role import widen_split


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
        cfg, layouts = self.cfg, self.layouts()
        grid = SplitGrid.create(cfg.tile_m, a.batch_size, a.seqlen_q, a.num_heads, a.num_heads // a.num_heads_k,
                                a.packed_heads, a.num_splits, a.cluster_size)
        batches = batches_k = a.batch_size
        places, ragged, num_ctas = None, None, grid.num_items * a.num_splits
        num_tokens = Int64(a.batch_size) * a.seqlen_k        # of K and V that the call may read
        if const_expr(cfg.is_ragged):
            batch = self.batch(a)
            batches = Int32(1) if batch.is_packed() else a.batch_size
            batches_k = Int32(1) if is_present(batch.arrays.cu_seqlens_k) else a.batch_size_k
            places, ragged = KeyPlaces.create(cfg, a, batch), RaggedGrid.create(a)
            num_ctas = a.num_clusters * a.cluster_size
            num_tokens = minimum(num_tokens, Int64(a.num_pages) * a.page_size) if a.page_size > 0 else num_tokens
        dim_qk, dim_v = dims_of(cfg, a)
        mQ, mO = (tensor_view(a, name, (a.seqlen_q, columns, a.num_heads, batches))
                  for name, columns in (("q", dim_qk), ("out", dim_v)))
        k, v = self.operands(a, layouts, batches_k)
        num_clusters = a.num_splits // a.cluster_size
        params = DecodeParams(
            k=k, v=v, mQ=mQ, mO=mO, mLSE=lse_view(a, batches), lengths=UsedLengths.create(a), places=places,
            descales=Descales.create(a) if const_expr(cfg.has_descales) else None,
            scratch=self.scratch(grid, num_clusters, a),
            scores=ScoreTransform.create(cfg, a), sinks=Sinks.create(a), dropout=Dropout.create(cfg, a),
            window=Window.create(cfg, a),
            grid=grid, ragged=ragged, num_clusters=num_clusters,
            kv_policy=self.policy(grid, num_tokens * a.num_heads_k * cfg.kv_bytes_per_token))
        self.kernel.set_name_prefix(f"fa3_cute_{cfg.name}", remove_cutlass_symbol=True, keep_mangled_name=False)
        self.kernel(self.extended(params, a, batches), layouts, self.mmas()).launch(
            grid=(num_ctas, 1, 1), block=(cfg.num_threads, 1, 1), cluster=(a.cluster_size, 1, 1),
            smem=a.smem_bytes, min_blocks_per_mp=cfg.ctas_per_sm, preferred_smem_carveout=100, use_pdl=True,
            stream=a.stream)

    def layouts(self) -> DecodeLayouts:
        """Of shared memory."""
        cfg = self.cfg
        ring = partial(smem_ring, operand_type(cfg))
        return DecodeLayouts(
            sQ=None if cfg.has_q_in_registers else ring(cfg.tile_m, cfg.dim_qk, 1),
            sK=ring_of_boxes(cfg, cfg.tile_n, cfg.dim_qk, cfg.num_kv_stages),
            sV=ring_of_boxes(cfg, cfg.tile_n, cfg.dim_v, cfg.num_kv_stages),
            sVt=ring(cfg.dim_v, cfg.tile_n, cfg.num_kv_stages) if cfg.values.is_transposed else None,
            wide_K=ring(cfg.tile_n, cfg.dim_qk, cfg.num_wide_slots) if cfg.widens else None,
            wide_V=ring(cfg.tile_n, cfg.dim_v, cfg.num_wide_slots) if cfg.widens else None)

    def operands(self, a, layouts: DecodeLayouts, batches_k: Int32) -> tuple[Operand, Operand]:
        """K and V."""
        dim_qk, dim_v = dims_of(self.cfg, a)
        return tuple(key_value_operand(self.cfg, a, name, (a.seqlen_k, columns, a.num_heads_k, batches_k), layout)
                     for name, columns, layout in (("k", dim_qk, layouts.sK), ("v", dim_v, layouts.sV)))

    def batch(self, a) -> RaggedBatch:
        """The sequences, where they are of unlike lengths."""
        return RaggedBatch.create(self.cfg, a, Int32(0), a.decode_queries)

    def extended(self, params: DecodeParams, a, batches: Int32) -> DecodeParams:
        """The arguments with what a kind of this kernel has besides."""
        return params

    def policy(self, grid: SplitGrid, num_bytes: Int64) -> Int64:
        """L2 policy of K and V that are num_bytes together."""
        return kv_policy(num_bytes)

    def mmas(self) -> Mmas:
        """The GEMMs."""
        return make_mmas(self.cfg)

    def scratch(self, grid: SplitGrid, clusters: Int32, a) -> SplitScratch:
        """The scratch memory as tensors: O, and behind it LSE; `clusters` work on one item."""
        dim_v, aligned = self.cfg.dim_v, partial(cute.assume, divby=self.cfg.dim_v)       # for 16-byte accesses
        num_items, rows = grid.num_items, minimum(grid.num_rows, self.cfg.tile_m)
        per_item = Int64(clusters) * rows
        if const_expr(self.cfg.is_ragged):
            num_items, rows, per_item = a.num_partials, a.partial_rows, Int64(a.partial_rows)
        O = cute.make_tensor(a.partials, cute.make_layout(
            (num_items, clusters, rows, dim_v),
            stride=(aligned(per_item * dim_v), aligned(rows * dim_v), dim_v, 1)))
        LSE = cute.make_tensor(a.partials + num_items * per_item * dim_v, cute.make_layout(
            (num_items, clusters, rows), stride=(per_item, rows, 1)))
        num_counts = num_items * grid.cluster_size.divisor
        return SplitScratch(O, LSE, cute.make_tensor(a.arrivals, cute.make_layout(num_counts)))

    # ---- device side --------------------------------------------------------------------------
    @cute.kernel
    def kernel(self, params: DecodeParams, layouts: DecodeLayouts, mmas: Mmas):
        """Warps 0-3 consume, warp 4 loads; where K and V are widened, warps 4-7 and 8-11 do that, and warp 12
        loads."""
        cfg = self.cfg
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        load_warp = by_name(cfg.roles)["load"].warps[0]
        if warp_idx == load_warp:
            for operand in with_descriptors(params.k, params.v):
                cpasync.prefetch_descriptor(operand.atom)
        smem, pipes = self.allocate(layouts)
        work = self.work_of(params, cute.arch.block_idx()[0])
        if const_expr(cfg.is_ragged):
            if work.num_clusters > 0:
                self.play(params, mmas, smem, pipes, work, warp_idx)
            elif const_expr(params.new_rows is not None):
                self.append_alone(params, smem, work, warp_idx)
        else:
            self.play(params, mmas, smem, pipes, work, warp_idx)

    @cute.jit
    def play(self, params: DecodeParams, mmas: Mmas, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork,
             warp_idx: Int32):
        """The warp's role."""
        if const_expr(self.cfg.widens):
            self.play_widening(params, mmas, smem, pipes, work)
        elif warp_idx == by_name(self.cfg.roles)["load"].warps[0]:
            load_split(self.cfg, params, smem, pipes, work)
            sync_cluster()      # as the consumers do, once
        else:
            consume_split(self.cfg, params, mmas, smem, pipes, work)

    @cute.jit
    def play_widening(self, params: DecodeParams, mmas: Mmas, smem: DecodeSmem, pipes: DecodePipelines,
                      work: SplitWork):
        """The same where K and V are widened; a warpgroup decides on its registers."""
        cfg, roles = self.cfg, by_name(self.cfg.roles)
        tidx, first = cute.arch.thread_idx()[0], {name: role.warps[0] for name, role in roles.items()}
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx < first["widen_k"]:
            cute.arch.setmaxregister_increase(roles["consume"].registers)
            consume_split(cfg, params, mmas, smem, pipes, work)
        else:
            if warp_idx < first["load"]:
                cute.arch.setmaxregister_decrease(roles["widen_k"].registers)
                if warp_idx < first["widen_v"]:
                    widen_split(cfg, smem.sK, smem.wide_K, pipes.k, pipes.wide_k, work, tidx - WARP * first["widen_k"])
                else:
                    widen_split(cfg, smem.sV, smem.wide_V, pipes.v, pipes.vt, work, tidx - WARP * first["widen_v"])
            else:
                cute.arch.setmaxregister_decrease(roles["load"].registers)
                if warp_idx == first["load"]:
                    load_split(cfg, params, smem, pipes, work)
            sync_cluster()      # as the consumers do, once

    @cute.jit
    def work_of(self, params: DecodeParams, index: Int32) -> SplitWork:
        """What CTA `index` works on. Waits for the kernel before this one on the stream: below, memory is read."""
        if const_expr(self.cfg.is_ragged):
            return self.ragged_work_of(params, index)
        cfg, grid = self.cfg, params.grid
        packed_heads = grid.packed_heads.divisor
        item, split, m_block, group, batch = place_of(grid, index)
        cluster, rank = divmod(split, grid.cluster_size)
        kv_head = group // grid.groups_per_kv_head
        cute.arch.griddepcontrol_wait()
        seqlen_q, seqlen_k = params.lengths.of(batch, params.mQ.shape[0], capacity(params.k))
        tile = Tile(m_block, group * packed_heads, kv_head, batch, Int32(0), seqlen_q, Int32(0), seqlen_k, batch)
        tiles = Visibility(cfg, params.window, tile, grid.packed_heads).tiles()
        rows = rows_of(cfg, grid, tile, rank)
        blocks = split_range(tiles, split, grid.num_splits)
        return SplitWork(tile, blocks, item, params.num_clusters, cluster, rank, *rows)

    @cute.jit
    def ragged_work_of(self, params: DecodeParams, index: Int32) -> SplitWork:
        """`work_of` in a ragged batch; of no clusters if there is nothing to do."""
        cfg, grid, ragged, batch = self.cfg, params.grid, params.ragged, params.places.batch
        packed_heads = grid.packed_heads.divisor
        cluster_index, rank = divmod(index, grid.cluster_size)
        if const_expr(cfg.page_box):
            params.places.pages.prefetch(index)
        cute.arch.griddepcontrol_wait()
        place = Dealer(cfg, batch, ragged, grid.packed_heads, grid.num_groups).find(cluster_index)
        tile = Tile(place.m_block, place.group * packed_heads, place.group // grid.groups_per_kv_head,
                    batch.batch_coordinate(place.sequence), place.offset_q, place.seqlen_q, place.offset_k,
                    place.seqlen_k, batch.number(place.sequence))
        tiles = Visibility(cfg, params.window, tile, grid.packed_heads).tiles()
        blocks = ragged.part(tiles, place.cluster * grid.cluster_size.divisor + rank,
                             maximum(place.num_clusters, 1) * grid.cluster_size.divisor)
        return SplitWork(tile, blocks, place.first, place.num_clusters, place.cluster, rank,
                         *rows_of(cfg, grid, tile, rank))

    @cute.jit
    def allocate(self, layouts: DecodeLayouts):
        """Carve shared memory; initialise and publish the mbarriers. cfg.rings has the arrival counts."""
        cfg = self.cfg
        allocator = cutlass.memory.SmemAllocator()
        rings = by_name(cfg.rings)
        bars = {name: allocator.allocate_array(Int64, 2 * ring.slots) for name, ring in rings.items() if ring.full}
        partials_arrived = allocator.allocate_array(Int64, 1)
        sArrived = allocator.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)
        sPartialLSE = allocator.allocate_tensor(Float32, cute.make_layout(cfg.partial_lines), byte_alignment=16)
        tensor = lambda layout, element: allocator.allocate_tensor(
            element, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sQ = tensor(layouts.sQ, operand_type(cfg)) if const_expr(not cfg.has_q_in_registers) else None
        sK, sV = (tensor(layout, stored_type(cfg)) for layout in (layouts.sK, layouts.sV))
        wide_K, wide_V = (tensor(layout, operand_type(cfg)) if const_expr(cfg.widens) else None
                          for layout in (layouts.wide_K, layouts.wide_V))
        is_transposed, wgmma_V = cfg.values.is_transposed, wide_V if const_expr(cfg.widens) else sV
        sVt = view_as(sV, layouts.sVt, operand_type(cfg)) if const_expr(is_transposed) else transposed(wgmma_V)
        sPartial = cute.make_tensor(cute.recast_ptr(sK.iterator, dtype=Float32), cute.make_layout(
            (cfg.partial_lines, cfg.dim_v), stride=(cfg.dim_v, 1)))
        smem = DecodeSmem(partials_arrived, sArrived, sPartialLSE, sQ, sK, sV, wide_K, wide_V, sVt, sPartial)

        group = lambda arrivals: pipeline.CooperativeGroup(pipeline.Agent.Thread, arrivals)
        facts = lambda name: {
            "num_stages": rings[name].slots, "producer_group": group(rings[name].full),
            "consumer_group": group(rings[name].empty), "barrier_storage": bars[name], "defer_sync": True}
        v, k = key_value_ring(cfg, layouts.sV, **facts("v")), key_value_ring(cfg, layouts.sK, **facts("k"))
        wide_k, vt = k, v
        if const_expr(cfg.widens):
            wide_k, vt = WideRing.create(**facts("wide_k")), WideRing.create(**facts("wide_v"))
        pipes = DecodePipelines(k=k, v=v, wide_k=wide_k, vt=vt)
        if cute.arch.thread_idx()[0] == 0:
            cute.arch.mbarrier_init(partials_arrived, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return smem, pipes
