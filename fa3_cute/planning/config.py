"""FwdConfig: every compile-time choice of one forward kernel, with its legality and its budgets. Pure Python.

A config is frozen, hashable and made of plain ints, bools and strings: it *is* the compile-cache key. Nothing in it
depends on a length, a pointer or a stride; those are run-time arguments (`FORWARD_ARGUMENTS`).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..contract.arguments import DECODE_ENTRIES, DECODE_ENTRY, FORWARD_ENTRIES, FORWARD_ENTRY
from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES, OUT_BYTES, PARTIAL
from .dims import DimFields
from .key_source import KeySourceFields
from .packing import PackedFields
from .rings import WARP, WARPS_PER_WARPGROUP, Ring, Role, num_threads, smem_bytes
from .score_features import ScoreFields
from .stored_keys import StoredFields
from .strategies import Output, Steps, Values

REGISTERS_PER_SM = 65536
SMEM_BYTES_PER_CTA = 232448  # 227 KiB: the most one CTA may ask for on compute capability 9.0
SMEM_BYTES_PER_SM = 233472  # shared by its CTAs, each of which costs SMEM_BYTES_RESERVED more than it asks for
SMEM_BYTES_RESERVED = 1024
ROWS_PER_WARPGROUP = 64  # M of one WGMMA
NUM_TRANSPOSE_WARPS = 2  # of the producer warpgroup, where there are any
MAX_CLUSTER_SIZE = 16  # CTAs; more than 8 is a size that sm_90 has and other architectures may lack

FORWARD_ARGUMENTS, DECODE_ARGUMENTS = FORWARD_ENTRY.arguments, DECODE_ENTRY.arguments


@dataclass(frozen=True)
class KernelConfig(DimFields, KeySourceFields, StoredFields, ScoreFields):
    """What the configs of all kernels have in common. Shared device code knows no other.

    dtype      of Q, K and V: "fp16", "bf16" or "fp8_e4m3"; accumulation is always FP32
    head_dim   columns of Q and K, and of V and O unless DimFields say otherwise
    """

    dtype: str
    head_dim: int

    # What a kernel has only if its config says so; the fields of both kernels are tile_n, num_kv_stages, out_dtype.
    use_pingpong = False
    rescale_before_pv = False
    has_q_in_registers = False  # the A operand of QK
    packs_heads = False  # consecutive rows of a tile are heads of one query
    splits_keys = False  # several CTAs may share the keys of a row
    takes_max_of_bits = False  # maxima of scores as integers, once all rows have one of 0 or more (softmax.py)

    if TYPE_CHECKING:  # what the configs of both kernels have: fields, rules, rings and roles

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self):
        problem = self.first_problem()
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def first_problem(self) -> str | None:
        """The first rule that this config breaks, in words; None if it is legal."""
        return next((sentence for holds, sentence in (*self.common_rules(), *self.rules()) if not holds), None)

    def common_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not): what both kernels ask."""
        k_of_pv = 32 if self.is_fp8 else 16
        out_dtypes = (*(FP8_OUT_DTYPES if self.is_fp8 else (None,)), PARTIAL)
        return (
            (self.dtype in ELEMENT_BYTES, f"dtype={self.dtype!r}: must be one of {', '.join(ELEMENT_BYTES)}"),
            (
                self.out_dtype in out_dtypes,
                f"out_dtype={self.out_dtype!r}: must be one of {out_dtypes} with dtype={self.dtype!r}",
            ),
            *self.dim_rules(),
            (
                self.tile_n % k_of_pv == 0 and k_of_pv <= self.tile_n <= 256,
                f"tile_n={self.tile_n}: must be a multiple of {k_of_pv}, K of PV's WGMMA, up to 256, N of QK's WGMMA",
            ),
            *self.source_rules(),
            *self.stored_rules(),
            *self.score_rules(),
        )

    def transposes_in_blocks(self, num_warps: int) -> bool:
        """Whether so many warps can share a tile of V in whole blocks of 32 keys x 16 columns (transpose.py)."""
        return self.dim_v % (16 * num_warps) == 0 or self.tile_n % (32 * num_warps) == 0

    @property
    def is_fp8(self) -> bool:
        """Q, K and V are FP8 E4M3; P too, in the PV GEMM."""
        return self.dtype == FP8

    @property
    def element_out(self) -> str:
        """The element type of O."""
        return self.out_dtype or self.dtype

    @property
    def element_bytes(self) -> int:
        """Of an element in the GEMMs."""
        return ELEMENT_BYTES.get(self.dtype, 2)

    @property
    def q_slot_bytes(self) -> int:
        """A slot of the Q ring; in 16 bit the forward kernel's takes O after Q."""
        return self.tile_m * self.dim_qk * self.element_bytes

    @property
    def o_slot_bytes(self) -> int:
        """A slot of O where it has its own."""
        return self.tile_m * self.dim_v * OUT_BYTES

    @property
    def steps(self) -> Steps:
        """How the GEMMs of a step follow one another."""
        return Steps.SERIAL if self.is_fp8 else Steps.OVERLAPPED

    @property
    def num_value_parts(self) -> int:
        """PV takes so many parts of V's columns in turn: FP8's O and a T of 256 have no registers, nor of 128 with two
        CTAs on an SM. Of 64 columns where other things need registers, else of 128 or more: prefill at head_dim 192 and
        256 takes 3 to 6 % less time."""
        columns = 64 if self.splits_keys or self.attn_mask else 128
        return self.dim_v // columns if self.is_fp8 and self.dim_v > 128 // self.ctas_per_sm else 1

    @property
    def mask(self) -> str:
        """full, causal or local: a key of the tables, and what device code asks for."""
        return "local" if self.is_local else "full"

    @property
    def num_consumer_warps(self) -> int:
        """Warps that attend; one lane of each gives a K or V slot back."""
        return WARPS_PER_WARPGROUP * self.num_consumer_wgs

    @cached_property
    def num_threads(self) -> int:
        """Of a CTA."""
        return num_threads(self.roles)

    @cached_property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one CTA: mbarriers and what is small, padded, then the rings' slots in order."""
        return smem_bytes(self.rings)

    @property
    def dtype_name(self) -> str:
        """The dtypes in a name: that of Q, K and V, and O's where it is another."""
        return self.dtype + self.stored_name + (f"_{self.out_dtype}" if self.out_dtype else "")

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)


@dataclass(frozen=True)
class FwdConfig(PackedFields, KernelConfig):
    """Compile-time choices of one forward kernel.

    is_causal, has_lse   bottom-right aligned causal mask; the kernel writes the log-sum-exp
    tile_m, tile_n       rows of Q, rows of K and V per tile; one consumer warpgroup per 64 rows of Q
    num_q_stages         depth of the Q ring; in 16 bit a slot carries Q in and O out, so 2 hides the O store and the
                         next Q load
    num_kv_stages        depth of the K ring and of the V ring; FP8: of the ring of transposed V too
    use_pingpong         order the warpgroups' GEMMs with named barriers (FA3 paper section 3.1)
    rescale_before_pv    rescale O while QK runs instead of after PV: fewer registers live at once if head_dim is large
    is_local             sliding window around the bottom-right diagonal; excludes is_causal
    is_varlen            offsets and lengths of the sequences are read on the device (cu_seqlens_*, seqused_*)
    out_dtype            of O: "bf16" or "fp16" where Q, K and V are FP8, "fp32"; None: dtype
    packed_heads ..      of PackedFields, KeySourceFields and ScoreFields
    """

    is_causal: bool
    has_lse: bool
    tile_m: int
    tile_n: int
    num_q_stages: int = 1
    num_kv_stages: int = 2
    use_pingpong: bool = True
    rescale_before_pv: bool = False
    is_local: bool = False
    is_varlen: bool = False
    out_dtype: str | None = None

    ctas_per_sm = 1
    uses_setmaxnreg = True
    entries = FORWARD_ENTRIES
    kernel_class = "forward", "FlashAttentionForward"

    def rules(self) -> tuple[tuple[bool, str], ...]:
        """As common_rules: what this kernel asks besides."""
        return (
            (self.tile_m in (64, 128, 192), f"tile_m={self.tile_m}: must be 64, 128 or 192"),
            (
                not self.is_fp8 or self.transposes_in_blocks(NUM_TRANSPOSE_WARPS),
                f"tile_n={self.tile_n}: not divisible among {NUM_TRANSPOSE_WARPS} warps that transpose V",
            ),
            (
                not (self.rescale_before_pv and self.steps is Steps.SERIAL),
                "rescale_before_pv: not with FP8, where O is rescaled as PV is added to it",
            ),
            (not (self.is_causal and self.is_local), "is_causal and is_local: one mask at a time"),
            *self.packing_rules(),
            (
                self.dim_v == self.dim_qk or self.num_q_stages == 1,
                "num_q_stages: 1 with head_dim_v, whose slots of O are smaller than those of Q",
            ),
            (
                self.smem_bytes <= SMEM_BYTES_PER_CTA,
                f"{self.smem_bytes} bytes of shared memory: a CTA has {SMEM_BYTES_PER_CTA}",
            ),
        )

    @property
    def name(self) -> str:
        """Short and unique among the rows of tables.py: names cache entries, kernels and table rows."""
        lengths = self.source_name or "_varlen" * self.is_varlen
        flags = lengths + "_lse" * self.has_lse + self.feature_names + self.packing_name
        return f"fwd_{self.dtype_name}_{self.dims_name}_{self.mask}{flags}_{self.tile_m}x{self.tile_n}"

    @property
    def mask(self) -> str:
        return "causal" if self.is_causal else super().mask

    @property
    def takes_max_of_bits(self) -> bool:
        """Not with ALiBi, whose rows have negative maxima for long."""
        return not self.has_alibi

    @property
    def num_consumer_wgs(self) -> int:
        return max(1, self.tile_m // ROWS_PER_WARPGROUP)

    @property
    def registers(self) -> tuple[int, int]:
        """(producer, consumer) registers per thread after setmaxnreg; multiples of 8, all roles within one SM."""
        return {1: (56, 256), 2: (40, 232), 3: (32, 160)}[min(self.num_consumer_wgs, 3)]

    @property
    def steps(self) -> Steps:
        """Packed heads of three warpgroups have too few registers for more, and of a small window one K/V tile or two,
        with little to overlap."""
        is_serial = self.packs_heads and self.num_consumer_wgs == 3
        return Steps.SERIAL if is_serial else super().steps

    @property
    def values(self) -> Values:
        """In what form PV reads V. Where warps transpose it, warp 1 schedules as well as stores."""
        return Values.TRANSPOSED_BY_WARPS if self.is_fp8 else Values.AS_STORED

    @property
    def skips_per_warpgroup(self) -> bool:
        """A warpgroup leaves out the K/V tiles that only other warpgroups' rows see. With ping-pong all take the same
        number of turns."""
        return self.steps is Steps.SERIAL and not self.use_pingpong and not self.packs_heads

    @property
    def output(self) -> Output:
        """Where O waits for its store."""
        if self.out_dtype == PARTIAL:
            return Output.NOWHERE
        return Output.OWN_SLOT if self.o_slot_bytes > self.q_slot_bytes else Output.IN_Q_SLOT

    @property
    def num_o_slots(self) -> int:
        return 1 if self.output is Output.OWN_SLOT else self.num_q_stages

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """Who does what: the producer warpgroup's warps, then the consumers."""
        producer, consumer = self.registers
        first = WARPS_PER_WARPGROUP
        if self.values.has_ring:
            helpers = (Role("schedule", range(1, 2), producer), Role("transpose", range(2, first), producer))
        else:
            helpers = Role("store", range(1, 2), producer), Role("schedule", range(2, 3), producer)
        return (
            Role("load", range(1), producer),
            *helpers,
            Role("consume", range(first, first + self.num_consumer_warps), consumer),
        )

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """In the order of their slots in shared memory. One lane of a warp arrives where warps are counted."""
        has_own, warps = self.output is Output.OWN_SLOT, self.num_consumer_warps
        producers = sum(len(role.warps) for role in self.roles if role.name not in ("schedule", "consume"))
        o = Ring("o", self.num_o_slots, self.o_slot_bytes if has_own else 0, WARP * warps, 1, "O")
        vt = Ring("vt", self.num_kv_stages, self.v_slot_bytes, NUM_TRANSPOSE_WARPS, warps, "V transposed")
        v_readers = NUM_TRANSPOSE_WARPS if self.values.has_ring else warps
        return (
            o,
            Ring("q", self.num_q_stages, self.q_slot_bytes, 1, 1, "Q" if has_own else "Q and O"),
            Ring("k", self.num_kv_stages, self.k_slot_bytes, self.num_kv_arrivals, warps, "K"),
            Ring("v", self.num_kv_stages, self.v_slot_bytes, self.num_kv_arrivals, v_readers, "V"),
            *[vt] * self.values.has_ring,
            *[Ring("mask", warps, self.mask_slot_bytes, 0, 0, "attn_mask")] * self.stages_mask,
            # Each slot more commits the CTA one tile earlier: 2 slots lose 2-5 % on causal tiles.
            Ring("tiles", 1, 0, WARP, WARP * (producers + warps)),
        )


@dataclass(frozen=True)
class DecodeConfig(KernelConfig):
    """Compile-time choices of one decode kernel: few query rows per KV head, as fast as K and V can be read.

    The query heads of a KV head are packed into the rows of one 64-row tile, K and V are split over several CTAs, which
    merge what they have. Lengths, the mask's bounds, the splits and whether there is an LSE are run-time values.

    out_dtype         as FwdConfig
    is_local          a window (a causal mask is one); without it every row sees every key
    num_kv_stages     depth of the K ring and of the V ring
    ctas_per_sm       how many CTAs can share an SM
    kv_dtype, is_ragged ..   of StoredFields, KeySourceFields; ragged batches are split sequence by sequence (ragged.py)
    """

    is_local: bool
    tile_n: int
    num_kv_stages: int
    ctas_per_sm: int
    out_dtype: str | None = None

    tile_m = ROWS_PER_WARPGROUP
    num_consumer_wgs = 1
    num_q_stages = 1
    packs_heads = True
    splits_keys = True
    is_varlen = True
    entries = DECODE_ENTRIES
    kernel_class = "decode", "FlashAttentionDecode"

    def rules(self) -> tuple[tuple[bool, str], ...]:
        """As common_rules: what this kernel asks besides."""
        budget = (SMEM_BYTES_PER_SM // max(1, self.ctas_per_sm)) - SMEM_BYTES_RESERVED
        return (
            (
                self.smem_bytes <= budget,
                f"{self.smem_bytes} bytes of shared memory: {self.ctas_per_sm} CTAs per SM have {budget} each",
            ),
            (
                not self.is_fp8 or self.transposes_in_blocks(4),
                f"tile_n={self.tile_n}: not divisible among 4 warps that transpose V",
            ),
            (
                self.kv_ring_bytes >= self.partial_bytes,
                f"K and V rings of {self.kv_ring_bytes} bytes cannot hold partial results of {self.partial_bytes}",
            ),
        )

    @property
    def name(self) -> str:
        """Short and unique among the rows of tables.py: names cache entries, kernels and table rows."""
        features = self.source_name + self.feature_names
        return f"decode_{self.dtype_name}_{self.dims_name}_{self.mask}{features}_{self.tile_m}x{self.tile_n}"

    @property
    def kv_ring_bytes(self) -> int:
        """The K ring and the V ring."""
        return self.num_kv_stages * (self.k_slot_bytes + self.v_slot_bytes)

    @property
    def values(self) -> Values:
        """In what form PV reads V."""
        return Values.TRANSPOSED_IN_PLACE if self.is_fp8 else Values.AS_STORED

    @property
    def partial_lines(self) -> int:
        """Rows of partial results that a CTA may receive: of each of its rows one from every CTA of the cluster."""
        return self.tile_m + MAX_CLUSTER_SIZE

    @property
    def partial_bytes(self) -> int:
        """Those rows in shared memory, in FP32."""
        return 4 * self.partial_lines * self.dim_v

    @property
    def uses_setmaxnreg(self) -> bool:
        return self.widens

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """The consumers come first: the number of a warpgroup's first warp must be a multiple of 4."""
        warps = self.num_consumer_warps
        return self.widening_roles or (Role("consume", range(warps)), Role("load", range(warps, warps + 1)))

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """In the order of their slots in shared memory; q is one slot without mbarriers, filled by its readers."""
        return (
            *[Ring("q", 1, self.q_slot_bytes, 0, 0, "Q")] * (not self.has_q_in_registers),
            Ring("k", self.num_kv_stages, self.k_slot_bytes, self.num_kv_arrivals, self.num_kv_readers, "K"),
            Ring("v", self.num_kv_stages, self.v_slot_bytes, self.num_kv_arrivals, self.num_kv_readers, "V"),
            *self.wide_rings,
        )

    @property
    def has_q_in_registers(self) -> bool:
        """Where K and V are widened: consumers have registers there, and Q's slot is room for another stage."""
        return self.widens
