"""Bundles that cross host jit -> device kernel -> role. All frozen: nothing in here ever advances.

Units: scores are raw q.k; softmax_scale_log2 = softmax_scale * log2(e), so that exp(softmax_scale * s) is
exp2(softmax_scale_log2 * s); LSE is a natural logarithm, -inf for a row that sees no key; lengths are in tokens.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from ..common.block_list import BlockLists
from ..common.block_range import Window
from ..common.dropout import Dropout
from ..common.fp8 import Descales
from ..common.keys_values import KeyPlaces, Operand
from ..common.ragged import RaggedBatch
from ..common.row_end import Sinks
from ..common.scores import ScoreTransform
from ..common.sequences import Sequences
from ..common.tma import TmaOperand
from .order import TileGrid


@dataclass(frozen=True)
class FwdParams:
    """Run-time arguments of the forward kernel (device side)."""
    q: TmaOperand                  # (seqlen_q, dim_qk, num_heads,   batch), or tiles.with_packed_heads
    k: Operand                     # (seqlen_k, dim_qk, num_heads_k, batch), or pages
    v: Operand                     # (seqlen_k, dim_v,  num_heads_k, batch)
    o: Optional[TmaOperand]        # (seqlen_q, dim_v,  num_heads,   batch), or so; None where consumers store
    mO: cute.Tensor                # the same tensor, for tiles that end within the next sequence's rows
    mLSE: Optional[cute.Tensor]    # (seqlen_q, num_heads, batch) f32; None unless cfg.has_lse
    descales: Optional[Descales]   # None unless cfg.is_fp8
    scores: ScoreTransform
    sinks: Sinks
    dropout: Optional[Dropout]     # None unless cfg.has_dropout
    block_lists: Optional[BlockLists]      # None unless cfg.has_block_lists
    window: Window                 # used if cfg.is_local
    grid: TileGrid                 # used unless cfg.is_varlen
    sequences: Sequences | RaggedBatch     # used if cfg.is_varlen
    places: Optional[KeyPlaces]    # None unless cfg.is_ragged
    tile_counter: cute.Tensor      # (1,) int32; see schedule.py
    num_heads: Int32               # groups of them, if heads are packed
    num_heads_k: Int32


@dataclass(frozen=True)
class FwdLayouts:
    """Staged, swizzled shared-memory layouts."""
    sQ: cute.ComposedLayout        # (tile_m, dim_qk, num_q_stages): Q in
    sO: Optional[cute.ComposedLayout]      # (tile_m, dim_v, num_o_slots): O out; None where consumers store it
    sK: cute.ComposedLayout        # (tile_n, dim_qk, num_kv_stages)
    sV: cute.ComposedLayout        # (tile_n, dim_v, num_kv_stages)
    sVt: Optional[cute.ComposedLayout]     # (dim_v, tile_n, num_kv_stages): V^T; None unless cfg.values.is_transposed


@dataclass(frozen=True)
class FwdSmem:
    """Shared-memory tensors, in layout order."""
    sO: Optional[cute.Tensor]      # O until the store has read it: the Q ring's slots, or FP8's own
    sQ: cute.Tensor                # aliases sO: a warpgroup overwrites rows that it has read; FP8: memory of its own
    sK: cute.Tensor
    sV: cute.Tensor
    sVt: cute.Tensor               # (dim_v, tile_n, num_kv_stages): a view of sV, or its own if cfg.values.has_ring
    sTiles: cute.Tensor            # (entry_ints(Tile), tile slots) int32
    sMask: Optional[cute.Tensor]   # bytes of all consumer warps; None unless cfg.stages_mask


@dataclass(frozen=True)
class FwdPipelines:
    """Barrier arrays only; each role makes its own producer or consumer, whose state stays a local variable."""
    q: pipeline.PipelineTmaAsync   # load warp -> consumers; emptied by the store warp
    k: pipeline.PipelineTmaAsync   # load warp -> consumers
    v: pipeline.PipelineTmaAsync   # load warp -> consumers, or the transpose warps if cfg.values.has_ring
    vt: pipeline.PipelineAsync     # v, or transpose warps -> consumers if cfg.values.has_ring
    o: pipeline.PipelineAsync      # consumers -> store warp; only its full half where O is in Q's slot
    tiles: pipeline.PipelineAsync  # schedule warp -> load, store and transpose warps, consumers
