"""Bundles of the MLA kernel, besides those of decode/bundles.py. All frozen."""
from dataclasses import dataclass
from typing import Optional

import cutlass.cute as cute

from ..common.wgmma import Mmas
from ..decode.bundles import DecodeLayouts, DecodeParams, DecodeSmem


@dataclass(frozen=True)
class MlaParams(DecodeParams):
    """Run-time arguments of the kernel (device side)."""
    mQv: Optional[cute.Tensor] = None              # (seqlen_q, dim_v, num_heads, batch); None unless cfg.has_qv


@dataclass(frozen=True)
class MlaMmas(Mmas):
    """S = Q K^T, and O += P V of a warpgroup's half of V's columns: P in registers, and in shared memory."""
    follow: Optional[cute.TiledMma] = None


@dataclass(frozen=True)
class MlaLayouts(DecodeLayouts):
    """Staged, swizzled shared-memory layouts; V that lies in K has that of the columns of K."""
    sP: Optional[cute.ComposedLayout] = None       # (tile_m, tile_n, 1)
    sQv: Optional[cute.ComposedLayout] = None      # (tile_m, dim_v, 1); None unless cfg.has_qv


@dataclass(frozen=True)
class MlaSmem(DecodeSmem):
    """Shared-memory tensors; sV, sVt: its own ring or V's columns of sK. sPartial aliases all but sP."""
    sP: Optional[cute.Tensor] = None               # (tile_m, tile_n, 1)
    sFactors: Optional[cute.Tensor] = None         # (tile_m,) f32: what a row of O is to be multiplied with
    sQv: Optional[cute.Tensor] = None              # (tile_m, dim_v, 1); None unless cfg.has_qv
