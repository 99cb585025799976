"""OneSideConfig: a backward kernel of one gradient, for head dims whose three do not fit one CTA (of 192 columns only
in calls that are not deterministic), and for what is done to scores that the kernel of all three has no registers for.
Pure Python.

A CTA holds rows of one side, of queries for dQ or of keys for dK or dV, and their gradient in registers, while tiles of
the other side pass. Nothing is added up across CTAs: there is no sum in FP32, no order to keep, and the same bits in
every call. The price is S once per gradient and dP twice: 8 GEMMs where the kernel of all three has 5.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from .backward import BACKWARD_ARGUMENTS, ONLY_OF_SUMS, GradientFields
from .config import ROWS_PER_WARPGROUP, SMEM_BYTES_PER_CTA
from .dims import DimFields
from .pair import PairConfig
from .rings import WARPS_PER_WARPGROUP, Ring, Role
from .score_features import NO_FEATURES, Features, take_registers

SIDES = ("dq", "dk", "dv")
BIAS = "d_bias"  # another side: rows of dS are what it writes, and there is no third GEMM
PREPARED_ROWS = 128  # of a block of the prepare kernel, for all three: a sequence's vectors start with one
# As the main kernel's, with the one gradient instead of its sums.
ONE_SIDE_ARGUMENTS = tuple(
    ("gradient", "pointer") if name == "dk" else (name.replace("dk_", "gradient_"), kind)
    for name, kind in BACKWARD_ARGUMENTS
    if name not in {*ONLY_OF_SUMS, "dq", "dv"} and not name.startswith(("dq_", "dv_"))
)


@dataclass(frozen=True)
class OneSideConfig(GradientFields):
    """Compile-time choices.

    side            the gradient: "dq", "dk", "dv" or "d_bias"
    tile_rows       of the CTA's side
    tile_columns    of a tile of the other side
    num_*_stages    slots of the other side's two tensors: K and V, or Q and dO
    has_softcap ..  of ScoreFields
    head_dim_v ..   of DimFields
    """

    dtype: str
    head_dim: int
    mask: str
    is_varlen: bool
    side: str
    tile_columns: int
    num_y_stages: int = 2
    num_y2_stages: int = 1

    is_dq_behind = False
    page_box = 0

    def __post_init__(self):
        if self.side not in (*SIDES, BIAS):
            raise ValueError(f"side={self.side!r}: must be one of {', '.join((*SIDES, BIAS))}")
        if self.smem_bytes > SMEM_BYTES_PER_CTA:
            raise ValueError(f"{self.name}: {self.smem_bytes} bytes of shared memory: a CTA has {SMEM_BYTES_PER_CTA}")

    @property
    def name(self) -> str:
        """Names cache entries and kernels."""
        flags = "_varlen" * self.is_varlen + self.feature_names
        return f"bwd_{self.side}_{self.dtype}_{self.dims_name}_{self.mask}{flags}_{self.tile_rows}x{self.tile_columns}"

    @property
    def has_dp(self) -> bool:
        """dV needs P alone."""
        return self.side != "dv"

    @property
    def is_of_queries(self) -> bool:
        return self.side in ("dq", BIAS)

    @property
    def has_gradient(self) -> bool:
        """Of the CTA's rows, in registers."""
        return self.side != BIAS

    @property
    def tile_rows(self) -> int:
        return ROWS_PER_WARPGROUP * self.num_consumer_wgs

    @property
    def tile_m(self) -> int:
        """Queries of a tile, as masks and blocks ask."""
        return self.tile_rows if self.is_of_queries else self.tile_columns

    @property
    def tile_n(self) -> int:
        """Keys of a tile."""
        return self.tile_columns if self.is_of_queries else self.tile_rows

    @property
    def is_deterministic(self) -> bool:
        return False  # there is no order to keep

    @property
    def dim_gradient(self) -> int:
        """Columns of the gradient."""
        return self.dim_v if self.side == "dv" else self.dim_qk

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """Who does what."""
        producer, consumer = self.registers
        first = WARPS_PER_WARPGROUP
        return (
            Role("load", range(1), producer),
            Role("consume", range(first, first + self.num_consumer_warps), consumer),
        )

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """In the order of their slots in shared memory: x, x2 are the CTA's own rows, y, y2 the other side's tiles."""
        warps, row, row_v = self.num_consumer_warps, self.dim_qk * 2, self.dim_v * 2
        vector = 4 * max(self.tile_columns, 32) * (not self.is_of_queries)
        x, x2, y, y2 = ("Q", "dO", "K", "V") if self.is_of_queries else ("K", "V", "Q", "dO")
        return (
            Ring("x", 1, self.tile_rows * row, 1, warps, x),
            Ring("x2", 1, self.tile_rows * row_v * self.has_dp, 1, warps, x2),
            Ring("y", self.num_y_stages, self.tile_columns * row, 1, warps, y),
            Ring("y2", self.num_y2_stages, self.tile_columns * row_v, 1, warps, y2),
            Ring("shift", self.num_y_stages, vector, 0, 0, "shift"),
            Ring("delta", self.num_y2_stages, vector * self.has_dp, 0, 0, "delta"),
        )


class OneSideRow(NamedTuple):
    """tile_columns and num_y2_stages of dQ and dK, and of dV, and why."""

    tile_columns: int
    num_y2_stages: int
    of_dv: tuple[int, int]
    reason: str


TABLE = {
    192: OneSideRow(64, 2, (64, 2), "the widest tiles that do not spill; no others were timed"),
    256: OneSideRow(64, 1, (64, 2), "the widest tiles that do not spill and fit shared memory; no others were timed"),
}


class PairRow(NamedTuple):
    """tile_m, num_do_stages and num_p_stages of dK and dV together, without features of scores."""

    tile_m: int
    num_do_stages: int
    num_p_stages: int
    reason: str


PAIRS = {
    192: PairRow(
        128, 1, 1, "128 queries: 64 take 1.04 to 1.14 times as long (BF16, 4k and 16k tokens, H200, 2026-11-30)"
    ),
    256: PairRow(64, 2, 2, "the only tiles of two slots each that fit shared memory"),
}
LOCAL_PAIR = PairRow(64, 2, 2, "not measured: with windows 128 queries of head_dim 192 spill")
# Of the other head dims, with features of scores that the kernel of all three gradients does not have.
FEATURED = {
    64: OneSideRow(128, 2, (128, 2), "not measured: the widest tiles that do not spill"),
    96: OneSideRow(128, 2, (128, 2), "not measured: the widest tiles that do not spill"),
    128: OneSideRow(64, 2, (64, 2), "not measured: the widest tiles that do not spill"),
}
# Of those with fewer columns of V.
FEWER_VALUES = {192: OneSideRow(64, 2, (64, 2), "not measured: those of 192 columns of V; wider ones do not spill")}
# With attn_mask or dropout, which need registers beside the scores; with more columns some kernels spill.
MASKED_COLUMNS = {64: 64, 96: 64, 128: 32, 192: 32, 256: 32}


@dataclass(frozen=True)
class OneSidePass(DimFields):
    """A backward pass of three such kernels, none of which waits for another; fields as in OneSideConfig."""

    dtype: str
    head_dim: int
    mask: str
    is_varlen: bool
    features: Features = NO_FEATURES

    tile_m = PREPARED_ROWS  # of the prepare kernel
    has_sums = False

    @property
    def has_bias(self) -> bool:
        """attn_mask is added."""
        return dict(self.features).get("attn_mask", "bool") != "bool"

    @property
    def row(self) -> OneSideRow:
        """The tables'."""
        return (FEWER_VALUES if self.head_dim_v else TABLE | FEATURED)[self.head_dim]

    @property
    def pair(self) -> PairConfig | None:
        """Of dK and dV, if one kernel makes both."""
        if self.features:
            return None
        choices = (LOCAL_PAIR if self.mask == "local" else PAIRS[self.head_dim])[:-1]
        fields = self.dtype, self.head_dim, self.mask, self.is_varlen, *choices
        return PairConfig(*fields, head_dim_v=self.head_dim_v, is_padded=self.is_padded)

    @property
    def sides(self) -> tuple[OneSideConfig, ...]:
        """Of dQ, of dK and dV if no kernel makes both, and of d_bias where attn_mask is added."""
        row = self.row
        wanted = SIDES if self.pair is None else SIDES[:1]
        shapes: dict[str, tuple[int, int]] = dict.fromkeys(wanted, (row.tile_columns, row.num_y2_stages))
        if "dv" in shapes:
            shapes["dv"] = row.of_dv
        if take_registers(self.features) or ("has_dropout", True) in self.features:
            shapes = {side: (MASKED_COLUMNS[self.head_dim], stages) for side, (_, stages) in shapes.items()}
        if self.has_bias:
            shapes[BIAS] = shapes["dq"]
        return tuple(
            OneSideConfig(
                self.dtype,
                self.head_dim,
                self.mask,
                self.is_varlen,
                side,
                columns,
                num_y2_stages=num_y2_stages,
                head_dim_v=self.head_dim_v,
                is_padded=self.is_padded,
                **dict(self.features),
            )
            for side, (columns, num_y2_stages) in shapes.items()
        )

    def as_dict(self) -> dict:
        """The fields as plain values, and those of its kernels with their tiles."""
        sides = [side.as_dict() | {"tile_m": side.tile_m, "tile_n": side.tile_n} for side in self.sides]
        pair = [self.pair.as_dict() | {"tile_n": self.pair.tile_n}] if self.pair else []
        return asdict(self) | {"features": dict(self.features), "sides": sides, "pair": pair}
