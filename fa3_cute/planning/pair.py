"""PairConfig: a backward kernel of dK and dV, for head dims whose three gradients do not fit one CTA. Pure Python.

A CTA has 64 keys. One of its warpgroups has S, P and dV, the other dP, dS and dK: both gradients of 256 columns fit
their registers, and of the 5 GEMMs of a backward pass S and dP alone are computed again, for dQ.
"""

from dataclasses import dataclass
from functools import cached_property

from .backward import BACKWARD_ARGUMENTS, FLOAT_BYTES, ONLY_OF_SUMS, GradientFields
from .config import ROWS_PER_WARPGROUP, SMEM_BYTES_PER_CTA
from .rings import WARPS_PER_WARPGROUP, Ring, Role

PAIR_ARGUMENTS = tuple(
    (name, kind)
    for name, kind in BACKWARD_ARGUMENTS
    if name not in {*ONLY_OF_SUMS, "dq", "d_bias"} and not name.startswith("dq_")
)


@dataclass(frozen=True)
class PairConfig(GradientFields):
    """Compile-time choices.

    tile_m         queries of a tile
    num_*_stages   slots of Q, dO and P
    head_dim_v ..  of DimFields
    """

    dtype: str
    head_dim: int
    mask: str
    is_varlen: bool
    tile_m: int
    num_do_stages: int = 2
    num_p_stages: int = 2

    num_q_stages = 2
    tile_n = ROWS_PER_WARPGROUP  # keys of a CTA
    is_dq_behind = False
    is_deterministic = False  # there is no order to keep
    page_box = 0

    def __post_init__(self):
        if self.smem_bytes > SMEM_BYTES_PER_CTA:
            raise ValueError(f"{self.name}: {self.smem_bytes} bytes of shared memory: a CTA has {SMEM_BYTES_PER_CTA}")

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        flags = "_varlen" * self.is_varlen + self.feature_names
        return f"bwd_dkdv_{self.dtype}_{self.dims_name}_{self.mask}{flags}_{self.tile_m}x{self.tile_n}"

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """Who does what."""
        producer, consumer = self.registers
        first, last = WARPS_PER_WARPGROUP, WARPS_PER_WARPGROUP + self.num_consumer_warps
        middle = first + WARPS_PER_WARPGROUP
        return (
            Role("load", range(1), producer),
            Role("values", range(first, middle), consumer),
            Role("keys", range(middle, last), consumer),
        )

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """In the order of their slots in shared memory. One lane of a warp arrives where warps are counted."""
        warps, row, row_v = WARPS_PER_WARPGROUP, self.dim_qk * 2, self.dim_v * 2
        readers, vector = self.num_consumer_warps, FLOAT_BYTES * self.tile_m
        return (
            Ring("k", 1, self.tile_n * row, 1, warps, "K"),
            Ring("v", 1, self.tile_n * row_v, 1, warps, "V"),
            Ring("q", self.num_q_stages, self.tile_m * row, 1, readers, "Q"),
            Ring("do", self.num_do_stages, self.tile_m * row_v, 1, readers, "dO"),
            Ring("p", self.num_p_stages, self.tile_n * vector, warps, warps, "P"),
            Ring("shift", self.num_q_stages, vector, 0, 0, "shift"),
            Ring("delta", self.num_do_stages, vector, 0, 0, "delta"),
        )
