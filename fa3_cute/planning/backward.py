"""BackwardConfig: compile-time choices of the backward kernels; backward_tables.py makes them. Pure Python."""

from dataclasses import asdict, dataclass
from functools import cached_property

from ..contract.scores import MASK_STRIDES
from . import split
from .config import ROWS_PER_WARPGROUP, SMEM_BYTES_PER_CTA
from .dims import DimFields
from .rings import WARP, WARPS_PER_WARPGROUP, Ring, Role, num_threads, smem_bytes
from .score_features import ScoreFields

FLOAT_BYTES = 4
PREPARE_THREADS = 256
SINK_WARPS = 4  # of the prepare kernel: those that have rows, one a thread, of which a Q tile has 128 at most
CONSUMER_WGS = 2  # of the main kernel and those of one gradient
TILE_SLOTS = split.TILE_SLOTS
# Per thread of the producer and of the consumers: 24 + 2 * 240 = 3 * 168, all that the 384 threads of a CTA start with.
# setmaxnreg waits for registers that it cannot have.
REGISTERS = (24, 240)

_LENGTHS = [(name, "pointer") for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
_STRIDES = {
    x: [(f"{x}_{of}_stride", "int64") for of in ("batch", "row", "head")]
    for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
}
SIZE_NAMES = ("batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k", "head_dim", "head_dim_v")
_SIZES = [(name, "int32") for name in SIZE_NAMES]
_P = lambda *names: [(name, "pointer") for name in names]
SUM_PARTS = ("dq_sum", "progress", "order", "tile_counter")  # of the workspace, where dQ is a sum
_SHARES = [("num_shared", "int32"), ("num_parts", "int32")]
_SUM_SIZES = [("num_sum_slots", "int32"), ("blocks_per_unit", "int32"), ("num_units", "int32")]  # see sections.py
# Of the main kernel alone: what the other kernels with GEMMs are not given.
_OF_ORDER = "is_rising", "num_behind", "tail_split", "num_sms", "shared_sums"
ONLY_OF_SUMS = {*SUM_PARTS, *_OF_ORDER, *(name for name, _ in (*_SUM_SIZES, *_SHARES))}
_OF_SCORES = ("alibi_slopes", "attn_mask", "rng_state", "d_bias")
BACKWARD_ARGUMENTS = tuple(
    _P("q", "k", "v", "dout", "dq", "dk", "dv", *_OF_SCORES, "shift", "delta", *SUM_PARTS, "shared_sums")
    + _LENGTHS
    + [x for t in ("q", "k", "v", "dout", "dq", "dk", "dv") for x in _STRIDES[t]]
    + [(name, "int64") for name in ("alibi_batch_stride", *MASK_STRIDES)]
    + _SIZES
    + [
        ("window_size_left", "int32"),
        ("window_size_right", "int32"),
        ("attention_chunk", "int32"),
        ("section", "int32"),
        ("is_rising", "int32"),
        ("num_behind", "int32"),
        ("tail_split", "int32"),
        *_SHARES,
        *_SUM_SIZES,
        ("num_sms", "int32"),
        ("softmax_scale", "float32"),
        ("softcap", "float32"),
        ("p_dropout", "float32"),
        ("stream", "stream"),
    ]
)
PREPARE_ARGUMENTS = tuple(
    _P("out", "dout", "softmax_lse", "dlse", "s_aux", "shift", "delta", *SUM_PARTS, "sink_sums")
    + _LENGTHS
    + [x for t in ("out", "dout") for x in _STRIDES[t]]
    + _SIZES
    + [*_SUM_SIZES, ("s_aux_dtype", "int32"), ("softmax_scale", "float32"), ("stream", "stream")]
)
CLEAR_ARGUMENTS = tuple(
    _P("d_bias")
    + [(name, "int64") for name in MASK_STRIDES]
    + [(name, "int32") for name in ("batch_size", "seqlen_q", "seqlen_k", "num_heads")]
    + [("stream", "stream")]
)
# num_blocks: of the prepare kernel, each of which has left a sum of each of its first warps
SINKS_ARGUMENTS = (*_P("d_s_aux", "sink_sums"), ("num_heads", "int32"), ("num_blocks", "int32"), ("stream", "stream"))


class GradientFields(DimFields, ScoreFields):
    """What the configs of the kernels with GEMMs have in common."""

    num_consumer_wgs = CONSUMER_WGS
    registers = REGISTERS
    is_split = False
    is_fp8 = has_descales = False
    packs_heads = False
    uses_setmaxnreg = True

    @property
    def stages_mask(self) -> bool:
        return False  # threads read attn_mask themselves

    @property
    def is_causal(self) -> bool:
        return self.mask == "causal"

    @property
    def is_local(self) -> bool:
        return self.mask == "local"

    @property
    def element_out(self) -> str:
        """The element type of gradients."""
        return self.dtype

    @property
    def num_consumer_warps(self) -> int:
        return WARPS_PER_WARPGROUP * self.num_consumer_wgs

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return smem_bytes(self.rings)

    @property
    def num_threads(self) -> int:
        """Of a CTA."""
        return num_threads(self.roles)

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)


@dataclass(frozen=True)
class BackwardConfig(GradientFields):
    """Compile-time choices of a backward pass: those of its main kernel, and of the one before that shares its tiles.

    dtype             of Q, K, V, O and dO: "fp16" or "bf16"; P and dS are rounded to it, accumulation is FP32
    mask              "full", "causal" or "local"
    is_varlen         lengths are on the device
    is_deterministic  the CTAs add to dQ in the order in which they take their keys
    tile_m            queries of a Q tile
    is_dq_transposed  dQ^T = K^T dS^T, each warpgroup its columns of dQ, for which tile_m need not be a multiple of 64
                      per warpgroup; else dQ = dS K, each its rows, or of 64 rows the warpgroups all of it in turns
    is_dq_behind      dQ is computed a Q tile later, when every warpgroup's dS has long been there
    is_split          each consumer warpgroup has one of S, dP and dQ (planning/split.py), else 64 keys; dV and dK come
                      a Q tile later than S
    has_softcap ..    of ScoreFields
    is_padded         of DimFields: threads store as many columns as rows have; V has tiles as wide as K's
    """

    dtype: str
    head_dim: int
    mask: str
    is_varlen: bool
    is_deterministic: bool
    tile_m: int
    is_dq_transposed: bool
    is_dq_behind: bool
    is_split: bool = False

    # Slots: all that turns with the Q tiles turns together. Those of dS are of P and dS if is_split.
    num_q_stages = num_do_stages = num_ds_stages = 2
    has_sums = True  # of dQ, in the workspace

    def __post_init__(self):
        if problem := next((sentence for holds, sentence in self.rules() if not holds), None):
            raise ValueError(f"{self.name}: {problem}")

    def rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        return (
            (self.dtype in ("fp16", "bf16"), f"dtype={self.dtype!r}: must be 'fp16' or 'bf16'"),
            (self.head_dim % 32 == 0, f"head_dim={self.head_dim}: must be a multiple of 32"),
            (self.head_dim_v == 0, f"head_dim_v={self.head_dim_v}: must be 0, head_dim"),
            (self.mask in ("full", "causal", "local"), f"mask={self.mask!r}: must be 'full', 'causal' or 'local'"),
            (
                self.tile_m % self.rows_step == 0,
                f"tile_m={self.tile_m}: must be a multiple of {self.rows_step}",
            ),
            (not self.is_dq_in_turns or self.is_dq_behind, f"tile_m={self.tile_m}: dQ must be a Q tile behind"),
            (
                not self.is_split or (self.head_dim, self.tile_m, self.is_deterministic) == (192, 64, False),
                "is_split: must be of head_dim 192 and 64 queries, and not deterministic",
            ),
            (
                not (self.is_split and self.feature_names),
                f"is_split: must be without features of scores, not {self.feature_names[1:]}",
            ),
            (
                not self.is_dq_transposed or self.head_dim % self.tile_n == 0,
                f"head_dim={self.head_dim}: must be a multiple of {self.tile_n}, M of dQ^T, if is_dq_transposed",
            ),
            (
                self.smem_bytes <= SMEM_BYTES_PER_CTA,
                f"{self.smem_bytes} bytes of shared memory: a CTA has {SMEM_BYTES_PER_CTA}",
            ),
            *self.score_rules(),
        )

    @property
    def name(self) -> str:
        """Short and unique among the rows of the table: names cache entries and kernels."""
        flags = "_varlen" * self.is_varlen + "_det" * self.is_deterministic
        return f"{self.dtype}_{self.dims_name}_{self.mask}{flags}{self.feature_names}_{self.tile_m}x{self.tile_n}"

    @property
    def tile_n(self) -> int:
        """Keys of a CTA: a warpgroup has the 64 of one WGMMA, with their dK and dV in its registers."""
        return split.TILE_N if self.is_split else ROWS_PER_WARPGROUP * self.num_consumer_wgs

    @property
    def num_consumer_wgs(self) -> int:
        return split.CONSUMER_WGS if self.is_split else CONSUMER_WGS

    @property
    def rows_step(self) -> int:
        """What tile_m is a multiple of."""
        if self.is_split or self.is_dq_in_turns:
            return ROWS_PER_WARPGROUP
        return 16 if self.is_dq_transposed else self.tile_n

    @property
    def finds_bounds_again(self) -> bool:
        """Before each loop over Q tiles, where consumers have no registers in which to keep those of the later ones."""
        return self.is_dq_behind and (self.is_local or self.has_alibi)

    @property
    def finds_places_again(self) -> frozenset[str]:
        """Of dQ and dS those whose place in shared memory a thread computes for each Q tile, where consumers have no
        registers in which to keep it; these kernels have one for both turns and tiles, too (consume.COUNT_BIT).
        """
        is_short = self.is_dq_behind and self.is_dq_transposed and self.tile_m > ROWS_PER_WARPGROUP
        return frozenset(("dQ", "dS") if is_short else ())

    @property
    def has_directions(self) -> bool:
        """Past some tiles of keys the first queries go first, past the others the last ones: see order.py. With
        features of scores some kernels would spill."""
        return self.is_causal and not self.feature_names and (self.is_deterministic or not self.is_varlen)

    @property
    def shares_tiles(self) -> bool:
        """CTAs share the last tiles of keys, where all take as long: see kernels/backward/shares.py. Of tiles that do
        not, the shortest run last; of deterministic ones parts would wait for those of the keys before them."""
        is_equal = self.mask == "full" and not self.is_varlen
        return is_equal and not self.is_deterministic and not self.feature_names

    @property
    def use_pingpong(self) -> bool:
        """Warpgroups issue S one after the other, so that exponentials of one run under GEMMs of the other. With tiles
        of 128 queries (head_dim 64) calls of 2048 and of 16k queries take 0.97 to 1.00 of the time; with the smaller
        tiles of 128 1.02 to 1.03, causal 1.00, with those of 96, causal, 1.02 to 1.04 (BF16, H200, 2026-11-30)."""
        return self.is_dq_behind and self.tile_m == 2 * ROWS_PER_WARPGROUP

    @property
    def late_fences(self) -> frozenset[str]:
        """Which of dQ and dS a warpgroup fences, once it has written them for the async proxy, behind the next GEMM's
        issue: the fence waits until all is written, and with dQ a Q tile behind nobody needs either soon. Whole calls
        take 0.95 to 1.00 of the time at head_dim 96, 0.98 to 0.99 at 128 with 64 queries (BF16, 16k tokens, H200,
        2026-11-30). At 64, with 128 queries, both take 1.00 to 1.04, dQ's comes behind twice as many exponentials; dS
        alone 0.99 to 1.00 without a mask, 1.00 to 1.02 with one.
        """
        if not self.is_dq_behind or self.is_split:
            return frozenset()
        if self.tile_m == 2 * ROWS_PER_WARPGROUP:
            return frozenset({"dS"} if self.mask == "full" else ())
        return frozenset(("dQ", "dS"))

    @property
    def is_dq_in_turns(self) -> bool:
        """One warpgroup computes dQ of a Q tile, another that of the next: dQ = dS K has rows for one alone."""
        return self.tile_m == ROWS_PER_WARPGROUP and not (self.is_dq_transposed or self.is_split)

    @property
    def num_reducers(self) -> int:
        """Warps that add dQ to global memory."""
        return 2 if self.is_deterministic else 1

    @property
    def num_dq_wgs(self) -> int:
        """Warpgroups that compute dQ of one Q tile."""
        return 1 if self.is_dq_in_turns else self.num_consumer_wgs

    @property
    def dq_part(self) -> int:
        """Floats of a tile of dQ that one warpgroup computes."""
        return self.tile_m * self.head_dim // self.num_dq_wgs

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """Who does what: the producer warpgroup's warps, then the consumers."""
        producer, consumer = self.registers
        first = WARPS_PER_WARPGROUP
        consume = Role("consume", range(first, first + self.num_consumer_warps), consumer)
        return (
            Role("load", range(1), producer),
            Role("reduce", range(1, 2), producer),
            Role("schedule", range(2, 3), producer),
            Role("watch", range(3, 4), producer),
            *(split.consumer_roles() if self.is_split else [consume]),
        )

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """In the order of their slots in shared memory. One lane of a warp arrives where warps are counted."""
        if self.is_split:
            return split.rings_of(self)
        warps, row = self.num_consumer_warps, self.head_dim * 2
        vector, readers = FLOAT_BYTES * max(self.tile_m, 128 // FLOAT_BYTES), WARPS_PER_WARPGROUP * self.num_dq_wgs
        return (
            Ring("tiles", TILE_SLOTS, 0, WARP, warps + 3),
            Ring("k", 1, self.tile_n * row, 1, warps, "K"),
            Ring("v", 1, self.tile_n * row, 1, warps, "V"),
            Ring("q", self.num_q_stages, self.tile_m * row, 1, warps, "Q"),
            Ring("do", self.num_do_stages, self.tile_m * row, 1, warps, "dO"),
            Ring("ds", self.num_ds_stages, self.tile_m * self.tile_n * 2, warps, readers, "dS"),
            Ring("dq", self.num_consumer_wgs, FLOAT_BYTES * self.dq_part, WARPS_PER_WARPGROUP, 1, "dQ"),
            Ring("shift", self.num_q_stages, vector, 0, 0, "shift"),
            Ring("delta", self.num_do_stages, vector, 0, 0, "delta"),
        )
