"""K and V that are FP8 in memory where Q is not: a warp role of the decode kernel widens them. Pure Python."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_CACHE_HEAD_DIMS
from .rings import WARP, WARPS_PER_WARPGROUP, Ring, Role

NUM_WIDEN_WARPS = 4  # of K, and of V: a warpgroup each, which then do not wait for one another
# Registers per thread after setmaxnreg: of the loading warpgroup, the widening ones and the consumers.
LOAD_REGISTERS, WIDEN_REGISTERS, CONSUME_REGISTERS = 24, 112, 240


@dataclass(frozen=True, kw_only=True)
class StoredFields:
    """Fields of every kernel's config.

    kv_dtype         of K and V in memory, "fp8_e4m3" with another dtype; None: dtype
    num_wide_slots   of K, and of V, in dtype, beside the rings of what is stored; 0 without kv_dtype
    """

    kv_dtype: str | None = None
    num_wide_slots: int = 0

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
        """K and V are FP8 in memory and of dtype in the GEMMs (kernels/common/widen.py)."""
        return self.kv_dtype is not None

    @property
    def has_descales(self) -> bool:
        """What is stored of K and V is real / descale."""
        return self.is_fp8 or self.widens

    @property
    def stored_dtype(self) -> str:
        """Of K and V in memory."""
        return self.kv_dtype or self.dtype

    @property
    def stored_bytes(self) -> int:
        """Of an element of K or V in memory."""
        return ELEMENT_BYTES.get(self.stored_dtype, 2)

    @property
    def stored_name(self) -> str:
        """The element type of K and V in a name, where it is not dtype."""
        return f"_kv_{self.kv_dtype}" if self.widens else ""

    @property
    def uses_setmaxnreg(self) -> bool:
        """Warpgroups have unlike numbers of registers; the forward kernel's always."""
        return self.widens

    @property
    def registers(self) -> tuple[int, int]:
        """(load, consume) registers per thread after setmaxnreg, where there is one."""
        return LOAD_REGISTERS, CONSUME_REGISTERS

    @property
    def widening_roles(self) -> tuple[Role, ...]:
        """Behind the consumers: who widens K and who V, who loads, and the rest of the loading warpgroup."""
        first = self.num_consumer_warps
        second, loader = first + NUM_WIDEN_WARPS, first + 2 * NUM_WIDEN_WARPS
        return (
            Role("widen_k", range(first, second), WIDEN_REGISTERS),
            Role("widen_v", range(second, loader), WIDEN_REGISTERS),
            Role("load", range(loader, loader + 1), LOAD_REGISTERS),
            Role("retire", range(loader + 1, loader + WARPS_PER_WARPGROUP), LOAD_REGISTERS),
        )

    @property
    def wide_rings(self) -> tuple[Ring, ...]:
        """K and V in dtype; () where they are stored so."""
        dims = (("k", self.dim_qk), ("v", self.dim_v)) if self.widens else ()
        return tuple(
            Ring(
                f"wide_{name}",
                self.num_wide_slots,
                self.tile_n * columns * self.element_bytes,
                NUM_WIDEN_WARPS,
                self.num_consumer_warps,
                f"{name.upper()} in {self.dtype}",
            )
            for name, columns in dims
        )
