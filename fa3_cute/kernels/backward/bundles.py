"""Bundles that cross host jit -> device kernel -> role. All frozen: nothing in here ever advances.

Letters: S = Q K^T (raw), P = exp(softmax_scale S - LSE), dP = dO V^T, D = rowsum(dO O) - dLSE, dS = P (dP - D).
"""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32

from ..common.block_range import Window
from ..common.sequences import Sequences
from ..common.tma import TmaOperand
from .blocks import Blocks
from .outgoing import Gradient
from .scores import Scores
from .shares import Shares
from .workspace import Sums


@dataclass(frozen=True)
class BwdMmas:
    """The five GEMMs, over all consumer warpgroups; keys are on M of the first three. Of split.py: make_split_mmas."""
    sdp: cute.TiledMma             # S^T = K Q^T and dP^T = V dO^T
    dkv: cute.TiledMma             # dV += P^T dO and dK += dS^T Q, with P^T and dS^T in registers
    dq: cute.TiledMma              # dQ = dS K, or dQ^T = K^T dS^T
    dkv_part: cute.TiledMma        # dkv and dq as one warpgroup has them
    dq_part: cute.TiledMma


@dataclass(frozen=True)
class BwdParams:
    """Run-time arguments of the main kernel (device side)."""
    q: TmaOperand                  # (seqlen_q, head_dim,   num_heads,   batch)
    do: TmaOperand                 # (seqlen_q, head_dim_v, num_heads,   batch)
    k: TmaOperand                  # (seqlen_k, head_dim,   num_heads_k, batch)
    v: TmaOperand                  # (seqlen_k, head_dim_v, num_heads_k, batch)
    dk: Gradient                   # as k
    dv: Gradient                   # as v
    dq: Gradient                   # as q
    shift: cute.Tensor             # (padded rows, num_heads) f32, see prepare.py
    delta: cute.Tensor             # (padded rows, num_heads) f32
    sums: Sums                     # of dQ, each block in thread order
    order: cute.Tensor             # (1, Q blocks, num_heads) int32: parts that CTAs have added, if deterministic;
                                   # else the first are Shares.is_left
    tile_counter: cute.Tensor      # (1) int32: places of the order that were taken, see schedule.py
    shares: Optional[Shares]       # None unless cfg.shares_tiles
    window: Window                 # used if cfg.is_local
    sequences: Sequences
    q_blocks: Blocks
    k_blocks: Blocks
    section: Int32                 # units whose tiles of keys run side by side, see planning/sections.py
    is_rising: Int32               # of deterministic tiles, see order.py
    num_behind: Int32              # places of the order between a tile of keys and the duty that belongs to it
    tail_split: Int32              # places that share a duty behind the last keys, see duties.py
    num_heads_k: Int32
    group: Int32                   # query heads of a KV head
    scale: Float32
    scale_log2: Float32
    scores: Optional[Scores]       # None unless cfg.transforms_scores


@dataclass(frozen=True)
class BwdLayouts:
    """Staged, swizzled shared-memory layouts."""
    sQ: cute.ComposedLayout        # (tile_m, head_dim, num_q_stages)
    sdO: cute.ComposedLayout       # (tile_m, head_dim, num_do_stages)
    sK: cute.ComposedLayout        # (tile_n, head_dim, 1)
    sV: cute.ComposedLayout        # (tile_n, head_dim, 1)
    sdS: cute.ComposedLayout       # (tile_m, tile_n, num_ds_stages), if split of P and of dS


@dataclass(frozen=True)
class BwdSmem:
    """Shared-memory tensors."""
    sTiles: cute.Tensor            # (entry_ints(key_tile_of(cfg)), TILE_SLOTS) int32
    sDuties: cute.Tensor           # (entry_ints(Duty), TILE_SLOTS) int32, of the same ring
    sQ: cute.Tensor
    sdO: cute.Tensor
    sK: cute.Tensor
    sV: cute.Tensor
    sdS: cute.Tensor               # if split P and dS; place 0 of what leaves at the end, see outgoing.py
    sdQ: cute.Tensor               # (dq_part, slots) f32, in thread order
    sShift: cute.Tensor           # (tile_m, num_q_stages) f32
    sDelta: cute.Tensor          # (tile_m, num_do_stages) f32


@dataclass(frozen=True)
class BwdPipelines:
    """Barrier arrays only; each role makes its own producer or consumer, whose state stays a local variable."""
    tiles: pipeline.PipelineAsync  # schedule warp -> every other role
    k: pipeline.PipelineTmaAsync   # load warp -> consumers, once per tile of keys that is loaded
    v: pipeline.PipelineTmaAsync   # the same
    q: pipeline.PipelineTmaAsync   # load warp -> consumers: Q and the rows' shift
    do: pipeline.PipelineTmaAsync  # load warp -> consumers: dO and the rows' delta
    ds: pipeline.PipelineAsync     # every consumer warp -> every consumer warp; of split.py products -> all
    p: Optional[pipeline.PipelineAsync]    # of split.py alone: scores -> scores and products
    dq: pipeline.PipelineAsync     # a slot per consumer warpgroup, filled in every round -> the warp that adds it
