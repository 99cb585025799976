"""FwdConfig: every compile-time choice of one forward kernel, with its legality and its budgets. Pure Python.

A config is frozen, hashable and made of plain ints, bools and strings: it *is* the compile-cache key. Nothing in it
depends on a length, a pointer or a stride; those are run-time arguments (`FORWARD_ARGUMENTS`).
"""
from dataclasses import asdict, dataclass

ELEMENT_BYTES = {"fp16": 2, "bf16": 2}
HEAD_DIMS = (64, 96, 128, 192, 256)

REGISTERS_PER_SM = 65536
SMEM_BYTES_PER_CTA = 232448          # 227 KiB: the most one CTA may ask for on compute capability 9.0
SMEM_BYTES_PER_SM = 233472           # shared by its CTAs, each of which costs SMEM_BYTES_RESERVED more than it asks for
SMEM_BYTES_RESERVED = 1024
ROWS_PER_WARPGROUP = 64              # M of one WGMMA
MAX_CLUSTER_SIZE = 16                # CTAs; more than 8 is a size that sm_90 has and other architectures may lack
UNBOUNDED_WINDOW = 1 << 30           # beyond every length, yet adding it to one stays within int32

# The forward kernel's entry: (name, kind) in call order. compiler.py makes its stand-ins from this table, launch.py its
# argument buffer, and a test holds kernels/flash_fwd.py's signature to it. Strides are in elements; absent pointers
# are 0; seqlen_q and seqlen_k are the tensors' rows (packed: total_q, total_k); windows are in [0, UNBOUNDED_WINDOW].
FORWARD_ARGUMENTS = (
    *((name, "pointer") for name in ("q", "k", "v", "out", "softmax_lse",
                                     "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
                                     "tile_counter")),
    *((f"{tensor}_{dim}_stride", "int64") for tensor in ("q", "k", "v", "out") for dim in ("batch", "row", "head")),
    *((name, "int32") for name in ("batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k",
                                   "window_size_left", "window_size_right", "num_sms")),
    ("softmax_scale", "float32"),
    ("stream", "stream"),
)

# The decode kernel's entry. packed_heads query heads of one KV head share an M tile; partials and arrivals are the
# scratch of split-KV (kernels/merge.py), unused if one cluster does all of an item.
DECODE_ARGUMENTS = (
    *((name, "pointer") for name in ("q", "k", "v", "out", "softmax_lse", "seqused_q", "seqused_k",
                                     "partials", "arrivals")),
    *((f"{tensor}_{dim}_stride", "int64") for tensor in ("q", "k", "v", "out") for dim in ("batch", "row", "head")),
    *((name, "int32") for name in ("batch_size", "seqlen_q", "seqlen_k", "num_heads", "num_heads_k",
                                   "window_size_left", "window_size_right",
                                   "packed_heads", "num_splits", "cluster_size", "smem_bytes")),
    ("softmax_scale", "float32"),
    ("stream", "stream"),
)


@dataclass(frozen=True)
class FwdConfig:
    """Compile-time choices of one forward kernel.

    dtype              "fp16" or "bf16": of Q, K, V and O; accumulation is always FP32
    is_causal          bottom-right aligned causal mask
    has_lse            the kernel writes the log-sum-exp
    tile_m, tile_n     rows of Q, rows of K and V per tile; one consumer warpgroup per 64 rows of Q
    num_q_stages       depth of the Q ring; a slot carries Q in and O out, so 2 hides the O store and the next Q load
    num_kv_stages      depth of the K ring and of the V ring
    use_pingpong       order the warpgroups' GEMMs with named barriers (FA3 paper section 3.1)
    rescale_before_pv  rescale O while QK runs instead of after PV: fewer registers live at once when head_dim is large
    is_local           sliding window around the bottom-right diagonal; excludes is_causal
    is_varlen          offsets and lengths of the sequences are read on the device (cu_seqlens_*, seqused_*)
    """
    dtype: str
    head_dim: int
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

    ctas_per_sm = 1
    packs_heads = False
    uses_setmaxnreg = True
    arguments = FORWARD_ARGUMENTS

    def __post_init__(self):
        problem = self.first_problem()
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def first_problem(self) -> str | None:
        """The first rule that this config breaks, in words; None if it is legal."""
        producer, consumer = self.registers
        used = 128 * (producer + consumer * self.num_consumer_wgs)
        rules = (
            (self.dtype in ELEMENT_BYTES, f"dtype={self.dtype!r}: must be one of {', '.join(ELEMENT_BYTES)}"),
            (self.head_dim in HEAD_DIMS, f"head_dim={self.head_dim}: must be one of {HEAD_DIMS}"),
            (self.tile_m in (64, 128, 192), f"tile_m={self.tile_m}: must be 64, 128 or 192"),
            (self.tile_n % 16 == 0 and 16 <= self.tile_n <= 256,
             f"tile_n={self.tile_n}: must be a multiple of 16 (K of the PV WGMMA) up to 256 (N of the QK WGMMA)"),
            (not (self.is_causal and self.is_local), "is_causal and is_local: one mask at a time"),
            (used <= REGISTERS_PER_SM, f"{used} registers: an SM has {REGISTERS_PER_SM}"),
            (self.smem_bytes <= SMEM_BYTES_PER_CTA,
             f"{self.smem_bytes} bytes of shared memory: a CTA has {SMEM_BYTES_PER_CTA}"),
        )
        return next((sentence for holds, sentence in rules if not holds), None)

    @property
    def name(self) -> str:
        """Short and unique among the rows of heuristics.py: names cache entries, kernels and table rows."""
        flags = "_varlen" * self.is_varlen + "_lse" * self.has_lse
        return f"fwd_{self.dtype}_d{self.head_dim}_{self.mask}{flags}_{self.tile_m}x{self.tile_n}"

    @property
    def mask(self) -> str:
        """full, causal or local: the key of heuristics' table."""
        return "causal" if self.is_causal else "local" if self.is_local else "full"

    @property
    def num_consumer_wgs(self) -> int:
        return max(1, self.tile_m // ROWS_PER_WARPGROUP)

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.num_consumer_wgs)

    @property
    def registers(self) -> tuple[int, int]:
        """(producer, consumer) registers per thread after setmaxnreg; multiples of 8, both roles within one SM."""
        return {1: (56, 256), 2: (40, 232), 3: (32, 160)}[min(self.num_consumer_wgs, 3)]

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token and KV head."""
        return 2 * self.head_dim * ELEMENT_BYTES[self.dtype]

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one CTA: the mbarriers (padded to 1024), the Q/O ring, the K ring, the V ring."""
        row = self.head_dim * ELEMENT_BYTES.get(self.dtype, 2)
        return 1024 + row * (self.num_q_stages * self.tile_m + 2 * self.num_kv_stages * self.tile_n)

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)


@dataclass(frozen=True)
class DecodeConfig:
    """Compile-time choices of one decode kernel: few query rows per KV head, as fast as K and V can be read.

    The query heads of a KV head are packed into the rows of one 64-row tile, K and V are split over several CTAs, which
    merge what they have. Lengths, the mask's bounds, the splits and whether there is an LSE are run-time values.

    is_local        a window (a causal mask is one); without it every row sees every key
    num_kv_stages   depth of the K ring and of the V ring
    ctas_per_sm     how many CTAs can share an SM
    """
    dtype: str
    head_dim: int
    is_local: bool
    tile_n: int
    num_kv_stages: int
    ctas_per_sm: int

    tile_m = ROWS_PER_WARPGROUP
    num_consumer_wgs = 1
    num_q_stages = 1
    num_threads = 160               # one consumer warpgroup, one load warp
    packs_heads = True
    is_causal = False
    is_varlen = True
    use_pingpong = False
    rescale_before_pv = False
    uses_setmaxnreg = False
    arguments = DECODE_ARGUMENTS

    def __post_init__(self):
        problem = self.first_problem()
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def first_problem(self) -> str | None:
        """The first rule that this config breaks, in words; None if it is legal."""
        budget = (SMEM_BYTES_PER_SM // max(1, self.ctas_per_sm)) - SMEM_BYTES_RESERVED
        rules = (
            (self.dtype in ELEMENT_BYTES, f"dtype={self.dtype!r}: must be one of {', '.join(ELEMENT_BYTES)}"),
            (self.head_dim in HEAD_DIMS, f"head_dim={self.head_dim}: must be one of {HEAD_DIMS}"),
            (self.tile_n % 16 == 0 and 16 <= self.tile_n <= 256,
             f"tile_n={self.tile_n}: must be a multiple of 16 (K of the PV WGMMA) up to 256 (N of the QK WGMMA)"),
            (self.smem_bytes <= budget,
             f"{self.smem_bytes} bytes of shared memory: {self.ctas_per_sm} CTAs per SM have {budget} each"),
            (2 * self.kv_ring_bytes >= self.partial_bytes,
             f"K and V rings of {2 * self.kv_ring_bytes} bytes cannot hold partial results of {self.partial_bytes}"),
        )
        return next((sentence for holds, sentence in rules if not holds), None)

    @property
    def name(self) -> str:
        """Short and unique among the rows of heuristics.py: names cache entries, kernels and table rows."""
        return f"decode_{self.dtype}_d{self.head_dim}_{self.mask}_{self.tile_m}x{self.tile_n}"

    @property
    def mask(self) -> str:
        """full or local: the key of heuristics' table."""
        return "local" if self.is_local else "full"

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token and KV head."""
        return 2 * self.head_dim * ELEMENT_BYTES[self.dtype]

    @property
    def kv_ring_bytes(self) -> int:
        """The K ring, and the V ring."""
        return self.num_kv_stages * self.tile_n * self.head_dim * ELEMENT_BYTES.get(self.dtype, 2)

    @property
    def partial_lines(self) -> int:
        """Rows of partial results that a CTA may receive: of each of its rows one from every CTA of the cluster."""
        return self.tile_m + MAX_CLUSTER_SIZE

    @property
    def partial_bytes(self) -> int:
        """Those rows in shared memory, in FP32."""
        return 4 * self.partial_lines * self.head_dim

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one CTA: mbarriers and LSE (padded to 1024), Q, the K ring, the V ring."""
        return 1024 + self.tile_m * self.head_dim * ELEMENT_BYTES.get(self.dtype, 2) + 2 * self.kv_ring_bytes

    def as_dict(self) -> dict:
        """The fields as plain values: a cache key, a JSON row."""
        return asdict(self)
