"""Attention of 512 columns of V, MLA decode and heads of 512: the config of its kernel. Pure Python.

MLA's K has 576 columns and V is the first 512 of them, so that a tile of K is loaded once and read twice; or K has 64
columns, Q as many, and what Q has besides meets V. Heads of 512 have K and V of their own.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

from ..contract.arguments import DECODE_ENTRIES, DECODE_QV_ENTRY
from ..contract.formats import MLA_DIMS, QV_DIMS, WIDE_DIMS
from .config import DecodeConfig
from .decode_rows import WIDE
from .rings import WARPS_PER_WARPGROUP, Ring, Role
from .score_features import FEATURES
from .tables import DENSE, KeySource, interned


@dataclass(frozen=True)
class MlaConfig(DecodeConfig):
    """Compile-time choices of one kernel of 512 columns of V: a DecodeConfig with two consumer warpgroups that have
    half of the columns of O each. head_dim, head_dim_v: of WIDE_DIMS."""

    num_consumer_wgs = 2
    entries = DECODE_ENTRIES | {"qv": DECODE_QV_ENTRY}
    kernel_class = "mla", "FlashAttentionMla"

    @property
    def has_v_in_k(self) -> bool:
        """V is the first columns of K."""
        return (self.dim_qk, self.dim_v) == MLA_DIMS

    @property
    def has_qv(self) -> bool:
        """Q has a second part, of as many columns as V, which its scores are of too."""
        return (self.dim_qk, self.dim_v) == QV_DIMS

    @property
    def shares_slots(self) -> bool:
        """K and V of a tile are one slot: what reads V for P V has read it for S."""
        return self.has_v_in_k or self.has_qv

    @property
    def entry_name(self) -> str:
        return "qv" if self.has_qv else super().entry_name

    def dim_rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            ((self.dim_qk, self.dim_v) in WIDE_DIMS, f"head_dim, head_dim_v: must be of {WIDE_DIMS}"),
            (not (self.is_fp8 or self.is_padded), "FP8 and is_padded: not with 512 columns of V"),
        )

    def rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            *super().rules(),
            (not (self.reads_rows or self.has_leftpad), "page_box, has_leftpad: TMA alone brings K, in whole tiles"),
            (not any(getattr(self, field) for field in FEATURES), f"{', '.join(FEATURES)}: not with 512 columns of V"),
        )

    @property
    def name(self) -> str:
        return "mla_" + super().name

    @property
    def uses_setmaxnreg(self) -> bool:
        return True

    @property
    def kv_bytes_per_token(self) -> int:
        return self.dim_qk * self.element_bytes if self.has_v_in_k else super().kv_bytes_per_token

    @property
    def kv_ring_bytes(self) -> int:
        """What partial results may lie over: Q and the rings of K and V."""
        return sum(ring.nbytes for ring in self.rings if ring.name != "p")

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The consumers come first; of the last warpgroup one warp loads."""
        warps = self.num_consumer_warps
        return Role("consume", range(warps), 232), Role("load", range(warps, warps + WARPS_PER_WARPGROUP), 40)

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """As DecodeConfig's; p is handed from one warpgroup to the other by named barriers. Slots of both warpgroups
        are given back by all warps, those of S alone by the first one's."""
        warps, filled = self.num_consumer_warps, self.num_kv_arrivals
        own_k, own_v = (WARPS_PER_WARPGROUP, (filled, warps)) if not self.shares_slots else (warps, (0, 0))
        q_v = Ring("q_v", 1, self.tile_m * self.dim_v * self.element_bytes, 0, 0, "Q beside V")
        v = Ring("v", self.num_kv_stages, self.v_slot_bytes, *own_v, "V")
        return (
            Ring("q", 1, self.q_slot_bytes, 0, 0, "Q"),
            *[q_v] * self.has_qv,
            Ring("k", self.num_kv_stages, self.k_slot_bytes, filled, own_k, "K, V in it" if self.has_v_in_k else "K"),
            *[v] * (not self.has_v_in_k),
            Ring("p", 1, self.tile_m * self.tile_n * self.element_bytes, 0, 0, "P"),
        )

    @property
    def tx_bytes(self) -> dict[str, int]:
        """That TMA brings to a slot of the rings that have mbarriers."""
        k = self.k_slot_bytes + self.v_slot_bytes * self.has_qv
        return {"k": k, "v": self.v_slot_bytes}


@cache
def mla_config(
    dtype: str,
    is_local: bool,
    out_dtype: str | None = None,
    source: KeySource = DENSE,
    dims: tuple[int, int] = MLA_DIMS,
) -> MlaConfig:
    """The config that serves a problem of such columns of Q and K, and of V; is_local: of a causal mask."""
    row, (head_dim, dim_v) = WIDE[dims], dims
    fields = source.fields(row.tile_n)
    sizes, own = (row.tile_n, row.num_kv_stages, row.ctas_per_sm), dim_v if dim_v != head_dim else 0
    return interned(MlaConfig(dtype, head_dim, is_local, *sizes, out_dtype, head_dim_v=own, **fields))


def all_mla_configs(source: KeySource = DENSE) -> list[MlaConfig]:
    """Every config of keys that lie in one place, O of Q's type."""
    choices = product(WIDE_DIMS, ("fp16", "bf16"), (False, True))
    return [mla_config(dtype, is_local, None, source, dims) for dims, dtype, is_local in choices]
