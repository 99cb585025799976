"""K and V that are FP8 in memory where Q is not: a warp role of the decode kernel widens them. Pure Python."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_CACHE_HEAD_DIMS
from .rings import WARP, WARPS_PER_WARPGROUP, Ring, Role

NUM_WIDEN_WARPS = 4  # of K, and of V: a warpgroup each, which then do not wait for one another
# Registers per thread after setmaxnreg: of the loading warpgroup, the widening ones and the consumers.
LOAD_REGISTERS, WIDEN_REGISTERS, CONSUME_REGISTERS = 40, 112, 240


@dataclass(frozen=True, kw_only=True)
class StoredFields:
    """Fields of every kernel's config.

    kv_dtype         of K and V in memory, "fp8_e4m3" with another dtype; None: dtype
    num_wide_slots   of K, and of V, in 16 bit, beside the rings of what is stored; 0 without kv_dtype
    """

    kv_dtype: str | None = None
    num_wide_slots: int = 0

    uses_setmaxnreg = False  # warpgroups have unlike numbers of registers

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    def stored_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        is_known = self.kv_dtype == FP8 and not self.is_fp8 and self.splits_keys
        dims = self.head_dim in FP8_CACHE_HEAD_DIMS and not self.head_dim_v and not self.is_padded
        return (
            (
                not self.widens or is_known,
                f"kv_dtype={self.kv_dtype!r}: must be None, or {FP8!r} in the decode kernel with another dtype",
            ),
            (not self.widens or dims, f"kv_dtype: only with head_dim of {FP8_CACHE_HEAD_DIMS}, of K and of V"),
            (not self.widens or self.tile_n % WARP == 0, f"tile_n={self.tile_n}: must be a multiple of {WARP}"),
            (
                (self.num_wide_slots > 0) == self.widens,
                f"num_wide_slots={self.num_wide_slots}: must be at least 1 with kv_dtype, else 0",
            ),
        )

    @property
    def widens(self) -> bool:
        """K and V are FP8 in memory and of gemm_dtype in the GEMMs (kernels/common/widen.py)."""
        return self.kv_dtype is not None

    @property
    def has_descales(self) -> bool:
        """What is stored of K and V is real / descale."""
        return self.is_fp8 or self.widens

    @property
    def gemm_dtype(self) -> str:
        """Of the operands of the GEMMs. E4M3 numbers are FP16 numbers, into which one instruction takes two, into BF16
        four; BF16 queries are scaled row by row to be FP16 (kernels/decode/queries.py), and P has 3 bits more."""
        return "fp16" if self.widens else self.dtype

    @property
    def stored_dtype(self) -> str:
        """Of K and V in memory."""
        return self.kv_dtype or self.dtype

    @property
    def stored_bytes(self) -> int:
        """Of an element of K or V in memory."""
        return ELEMENT_BYTES.get(self.stored_dtype, 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token and KV head."""
        return (self.dim_qk + self.dim_v) * self.stored_bytes

    @property
    def k_slot_bytes(self) -> int:
        """A slot of the K ring."""
        return self.tile_n * self.dim_qk * self.stored_bytes

    @property
    def v_slot_bytes(self) -> int:
        """A slot of the V ring, and of transposed V."""
        return self.tile_n * self.dim_v * self.stored_bytes

    @property
    def stored_name(self) -> str:
        """The element type of K and V in a name, where it is not dtype."""
        return f"_kv_{self.kv_dtype}" if self.widens else ""

    @property
    def registers(self) -> tuple[int, int]:
        """(load, consume) registers per thread after setmaxnreg, where there is one."""
        return LOAD_REGISTERS, CONSUME_REGISTERS

    @property
    def widening_roles(self) -> tuple[Role, ...]:
        """Who consumes, who widens K and who V, who loads, and the rest of the loading warpgroup; () without."""
        if not self.widens:
            return ()
        first = self.num_consumer_warps
        second, loader = first + NUM_WIDEN_WARPS, first + 2 * NUM_WIDEN_WARPS
        return (
            Role("consume", range(first), CONSUME_REGISTERS),
            Role("widen_k", range(first, second), WIDEN_REGISTERS),
            Role("widen_v", range(second, loader), WIDEN_REGISTERS),
            Role("load", range(loader, loader + 1), LOAD_REGISTERS),
            Role("retire", range(loader + 1, loader + WARPS_PER_WARPGROUP), LOAD_REGISTERS),
        )

    @property
    def num_kv_readers(self) -> int:
        """Warps that give a slot of the K or V ring back."""
        return NUM_WIDEN_WARPS if self.widens else self.num_consumer_warps

    @property
    def wide_rings(self) -> tuple[Ring, ...]:
        """K and V in gemm_dtype; () where they are stored so."""
        dims = (("k", self.dim_qk), ("v", self.dim_v)) if self.widens else ()
        return tuple(
            Ring(
                f"wide_{name}",
                self.num_wide_slots,
                self.tile_n * columns * self.element_bytes,
                NUM_WIDEN_WARPS,
                self.num_consumer_warps,
                f"{name.upper()} in {self.gemm_dtype}",
            )
            for name, columns in dims
        )
