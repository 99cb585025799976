"""MLA decode: the config of its kernel. Pure Python.

K has 576 columns, of one head; V is the first 512 of them, so that a tile of K is loaded once and read twice.
"""

from dataclasses import dataclass
from functools import cache, cached_property

from ..contract.formats import MLA_DIMS
from .config import DecodeConfig
from .decode_rows import MLA_ROW
from .rings import WARPS_PER_WARPGROUP, Ring, Role
from .score_features import FEATURES
from .tables import DENSE, KeySource, interned


@dataclass(frozen=True)
class MlaConfig(DecodeConfig):
    """Compile-time choices of one MLA decode kernel: a DecodeConfig whose V lies in K, with two consumer warpgroups
    that have half of the columns of O each."""

    num_consumer_wgs = 2
    kernel_class = "mla", "FlashAttentionMla"

    def dim_rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            ((self.head_dim, self.head_dim_v) == MLA_DIMS, f"head_dim, head_dim_v: must be {MLA_DIMS}"),
            (not (self.is_fp8 or self.is_padded), "FP8 and is_padded: not with V in K"),
        )

    def rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            *super().rules(),
            (not self.reads_rows, "page_box: TMA alone brings K"),
            (not any(getattr(self, field) for field in FEATURES), f"{', '.join(FEATURES)}: not with V in K"),
        )

    @property
    def name(self) -> str:
        return "mla_" + super().name

    @property
    def uses_setmaxnreg(self) -> bool:
        return True

    @property
    def kv_bytes_per_token(self) -> int:
        return self.dim_qk * self.element_bytes

    @property
    def kv_ring_bytes(self) -> int:
        """What partial results may lie over: Q and the K ring."""
        return self.q_slot_bytes + self.num_kv_stages * self.k_slot_bytes

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The consumers come first; of the last warpgroup one warp loads."""
        warps = self.num_consumer_warps
        return Role("consume", range(warps), 232), Role("load", range(warps, warps + WARPS_PER_WARPGROUP), 40)

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """As DecodeConfig's; p is handed from one warpgroup to the other by named barriers."""
        warps = self.num_consumer_warps
        return (
            Ring("q", 1, self.q_slot_bytes, 0, 0, "Q"),
            Ring("k", self.num_kv_stages, self.k_slot_bytes, self.num_kv_arrivals, warps, "K, V in it"),
            Ring("p", 1, self.tile_m * self.tile_n * self.element_bytes, 0, 0, "P"),
        )


@cache
def mla_config(dtype: str, is_local: bool, out_dtype: str | None = None, source: KeySource = DENSE) -> MlaConfig:
    """The config that serves an MLA problem; is_local: of a causal mask."""
    row = MLA_ROW
    fields = source.fields(row.tile_n)
    sizes = row.tile_n, row.num_kv_stages, row.ctas_per_sm
    return interned(MlaConfig(dtype, MLA_DIMS[0], is_local, *sizes, out_dtype, head_dim_v=MLA_DIMS[1], **fields))
