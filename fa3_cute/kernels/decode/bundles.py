"""Bundles that cross host jit -> device kernel -> role, in the units of forward/bundles.py. All frozen."""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64

from ..common.block_range import Window
from ..common.dropout import Dropout
from ..common.fp8 import Descales
from ..common.keys_values import KeyPlaces, Operand
from ..common.row_end import Sinks
from ..common.scores import ScoreTransform
from ..common.sequences import UsedLengths
from .new_rows import NewRows
from .ragged import RaggedGrid
from .split import SplitGrid, SplitScratch


@dataclass(frozen=True)
class DecodeParams:
    """Run-time arguments of the decode kernel (device side)."""
    k: Operand                     # (seqlen_k, dim_qk, num_heads_k, batch), or pages
    v: Operand                     # (seqlen_k, dim_v, num_heads_k, batch)
    mQ: cute.Tensor                # (seqlen_q, dim_qk, num_heads, batch)
    mO: cute.Tensor                # (seqlen_q, dim_v, num_heads, batch)
    mLSE: cute.Tensor              # (seqlen_q, num_heads, batch) f32; may be null
    lengths: UsedLengths           # unless cfg.is_ragged
    places: Optional[KeyPlaces]    # None unless cfg.is_ragged
    descales: Optional[Descales]   # None unless cfg.has_descales
    scratch: SplitScratch
    scores: ScoreTransform
    sinks: Sinks
    dropout: Optional[Dropout]     # None unless cfg.has_dropout
    window: Window                 # used if cfg.is_local
    grid: SplitGrid
    ragged: Optional[RaggedGrid]   # None unless cfg.is_ragged
    num_clusters: Int32            # num_splits / cluster_size
    kv_policy: Int64               # L2 policy of the K and V loads
    new_rows: Optional[NewRows] = None     # None where the kernel appends nothing

    @property
    def turns_queries(self) -> bool:
        """Q is turned on its way to shared memory."""
        return self.new_rows is not None and self.new_rows.rotary is not None


@dataclass(frozen=True)
class DecodeLayouts:
    """Staged, swizzled shared-memory layouts."""
    sQ: Optional[cute.ComposedLayout]      # (tile_m, dim_qk, 1); None if cfg.has_q_in_registers
    sK: cute.ComposedLayout        # (tile_n, dim_qk, num_kv_stages)
    sV: cute.ComposedLayout        # (tile_n, dim_v, num_kv_stages)
    sVt: Optional[cute.ComposedLayout]     # (dim_v, tile_n, num_kv_stages): V^T; None unless cfg.values.is_transposed
    wide_K: Optional[cute.ComposedLayout]  # (tile_n, dim_qk, num_wide_slots); None unless cfg.widens
    wide_V: Optional[cute.ComposedLayout]  # (tile_n, dim_v, num_wide_slots), as wide_K


@dataclass(frozen=True)
class DecodeSmem:
    """Shared-memory tensors, in layout order."""
    partials_arrived: cute.Pointer # mbarrier: all rows that this CTA owns are here
    sArrived: cute.Tensor          # (1,) int32: how many CTAs had arrived at the item before this one
    sPartialLSE: cute.Tensor       # (partial_lines,) f32, as sPartial
    sQ: Optional[cute.Tensor]
    sK: cute.Tensor
    sV: cute.Tensor
    wide_K: Optional[cute.Tensor]  # None unless cfg.widens, as wide_V
    wide_V: Optional[cute.Tensor]
    sVt: cute.Tensor               # (dim_v, tile_n, slot): sV itself or wide_V; FP8 is transposed within its slot
    # (partial_lines, dim_v) f32: line row / cluster_size * cluster_size + r holds row `row` of the CTA of rank r.
    # Aliases sK and, if need be, sV, once all CTAs of the cluster have read all of theirs (send_partial).
    sPartial: cute.Tensor


@dataclass(frozen=True)
class DecodePipelines:
    """Barrier arrays only, as FwdPipelines."""
    k: pipeline.PipelineTmaAsync   # load warp -> consumers, or widening warps
    v: pipeline.PipelineTmaAsync   # load warp -> consumers, or widening warps
    wide_k: pipeline.PipelineAsync # k, or widening warps -> consumers
    vt: pipeline.PipelineAsync     # v, or widening warps -> consumers: what PV reads
