"""Bundles of the backward kernels of one gradient: as bundles.py, all frozen."""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32

from ...planning.one_side import OneSideConfig
from ..common.block_range import Window
from ..common.dropout import Dropout
from ..common.layout import element_type, smem_ring
from ..common.sequences import Sequences
from ..common.tma import TmaOperand
from .blocks import Blocks
from .scores import BiasGradient, Scores


@dataclass(frozen=True)
class SideParams:
    """Run-time arguments (device side)."""
    x: TmaOperand
    x2: TmaOperand
    y: TmaOperand
    y2: TmaOperand
    mG: cute.Tensor                # the gradient, as x, or dV as x2
    shift: cute.Tensor             # (padded rows of queries, num_heads) f32, see prepare.py
    delta: cute.Tensor
    window: Window
    sequences: Sequences
    q_blocks: Blocks               # of the prepare kernel: a sequence's vectors start with one of PREPARED_ROWS rows
    blocks: Blocks                 # of the CTA's side
    num_heads: Int32               # of the CTA's side
    section: Int32                 # heads whose blocks run side by side, see place.py
    group: Int32                   # query heads of a KV head
    scale: Float32
    scale_log2: Float32
    scores: Optional[Scores]       # None unless cfg.transforms_scores or cfg.attn_mask
    d_bias: Optional[BiasGradient]     # None if cfg.has_gradient
    dropout: Optional[Dropout]     # None unless cfg.has_dropout


@dataclass(frozen=True)
class SideMmas:
    """The GEMMs, over all consumer warpgroups."""
    scores: cute.TiledMma          # S and dP, or their transposes
    gradient: cute.TiledMma        # with P or dS in registers


@dataclass(frozen=True)
class SideLayouts:
    """Staged, swizzled shared-memory layouts."""
    sX: cute.ComposedLayout        # (tile_rows, dim_qk, 1)
    sX2: cute.ComposedLayout       # (tile_rows, dim_v, 1)
    sY: cute.ComposedLayout        # (tile_columns, dim_qk, num_y_stages)
    sY2: cute.ComposedLayout       # (tile_columns, dim_v, num_y2_stages)

    @staticmethod
    def create(cfg: OneSideConfig) -> "SideLayouts":
        """Of a config."""
        ring = lambda rows, columns, slots: smem_ring(element_type(cfg), rows, columns, slots)
        return SideLayouts(ring(cfg.tile_rows, cfg.dim_qk, 1), ring(cfg.tile_rows, cfg.dim_v, 1),
                           ring(cfg.tile_columns, cfg.dim_qk, cfg.num_y_stages),
                           ring(cfg.tile_columns, cfg.dim_v, cfg.num_y2_stages))


@dataclass(frozen=True)
class SideSmem:
    sX: cute.Tensor                # the gradient at the end
    sX2: cute.Tensor
    sY: cute.Tensor
    sY2: cute.Tensor
    sShift: Optional[cute.Tensor]  # None if the CTA's rows are queries
    sDelta: Optional[cute.Tensor]


@dataclass(frozen=True)
class SidePipelines:
    x: pipeline.PipelineTmaAsync
    y: pipeline.PipelineTmaAsync
    y2: pipeline.PipelineTmaAsync
