"""Bundles of the backward kernel of dK and dV: as bundles.py, all frozen."""
from dataclasses import dataclass

import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32

from ...planning.pair import PairConfig
from ..common.block_range import Window
from ..common.layout import element_type, smem_ring
from ..common.sequences import Sequences
from ..common.tma import TmaOperand
from .blocks import Blocks


@dataclass(frozen=True)
class PairParams:
    """Run-time arguments (device side); shapes as in bundles.BwdParams."""
    q: TmaOperand
    do: TmaOperand
    k: TmaOperand
    v: TmaOperand
    mdK: cute.Tensor
    mdV: cute.Tensor
    shift: cute.Tensor
    delta: cute.Tensor
    window: Window
    sequences: Sequences
    q_blocks: Blocks               # of the prepare kernel: a sequence's vectors start with one of PREPARED_ROWS rows
    k_blocks: Blocks
    section: Int32                 # heads whose blocks run side by side, see place.py
    num_heads_k: Int32
    group: Int32                   # query heads of a KV head
    scale: Float32
    scale_log2: Float32


@dataclass(frozen=True)
class PairMmas:
    """The four GEMMs, each of one warpgroup; keys are on M."""
    scores: cute.TiledMma          # S^T = K Q^T, and dP^T = V dO^T
    dv: cute.TiledMma              # dV += P^T dO, with P^T in registers
    dk: cute.TiledMma              # dK += dS^T Q, with dS^T in registers


@dataclass(frozen=True)
class PairLayouts:
    """Staged, swizzled shared-memory layouts."""
    sQ: cute.ComposedLayout        # (tile_m, dim_qk, num_q_stages)
    sdO: cute.ComposedLayout       # (tile_m, dim_v, num_do_stages)
    sK: cute.ComposedLayout        # (tile_n, dim_qk, 1)
    sV: cute.ComposedLayout        # (tile_n, dim_v, 1)

    @staticmethod
    def create(cfg: PairConfig) -> "PairLayouts":
        """Of a config."""
        ring = lambda rows, columns, slots: smem_ring(element_type(cfg), rows, columns, slots)
        return PairLayouts(
            ring(cfg.tile_m, cfg.dim_qk, cfg.num_q_stages), ring(cfg.tile_m, cfg.dim_v, cfg.num_do_stages),
            ring(cfg.tile_n, cfg.dim_qk, 1), ring(cfg.tile_n, cfg.dim_v, 1))


@dataclass(frozen=True)
class PairSmem:
    sK: cute.Tensor                # dK at the end
    sV: cute.Tensor                # dV at the end
    sQ: cute.Tensor
    sdO: cute.Tensor
    sP: cute.Tensor                # (tile_n * tile_m, num_p_stages) f32, in thread order
    sShift: cute.Tensor            # (tile_m, num_q_stages) f32
    sDelta: cute.Tensor            # (tile_m, num_do_stages) f32


@dataclass(frozen=True)
class PairPipelines:
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    q: pipeline.PipelineTmaAsync   # load warp -> consumers: Q and the rows' shift
    do: pipeline.PipelineTmaAsync  # the same: dO and the rows' delta
    p: pipeline.PipelineAsync      # warpgroup of dV -> warpgroup of dK
