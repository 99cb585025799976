"""The units of a Hopper SM: which instruction runs on which, and what a K/V tile asks of each. Pure Python.

The low 9 bits of an instruction name its operation, whatever the form of its operands (cubin.py has 12 bits of it).
NVIDIA documents neither; the numbers were read off nvdisasm's listings of this package's kernels, for sm_90, and a test
holds them to it.
"""

from collections import Counter

from ..planning.mla import MlaConfig
from ..planning.operations import Config
from ..planning.splits import NUM_SMS, RATES

OPERATION_MASK = 0x1FF
OTHER = "other"

# {unit: {mnemonic: operations}}. IMAD takes the FP32 lanes, but computes addresses; HADD2 turns 16 bits into FP32,
# HFMA2 makes constants.
OPERATIONS = {
    "tensor": {"HGMMA": (0x1F0,), "QGMMA": (0x1F3,)},
    "MUFU": {"MUFU": (0x108,)},
    "FP32": {
        "FADD": (0x21,),
        "FMUL": (0x20,),
        "FFMA": (0x23,),
        "FMNMX": (0x09,),
        "FSETP": (0x0B,),
        "FSEL": (0x08,),
        "FCHK": (0x102,),
    },
    "conversion": {
        "F2FP": (0x3E,),
        "F2I": (0x105,),
        "HADD2": (0x30,),
        "HFMA2": (0x35,),
        "I2F": (0x106,),
        "I2FP": (0x45,),
    },
    "integer": {
        "IADD3": (0x10,),
        "IMAD": (0x24, 0x25, 0x27),
        "ISETP": (0x0C,),
        "LEA": (0x11,),
        "LOP3": (0x12,),
        "PLOP3": (0x1C,),
        "SHF": (0x19,),
        "SEL": (0x07,),
        "MOV": (0x02,),
        "PRMT": (0x16,),
        "FLO": (0x100,),
        "IABS": (0x13,),
        "POPC": (0x109,),
        "REDUX": (0x1C4,),
        "VIADD": (0x36,),
        "VIMNMX": (0x48,),
        "VIMNMX3": (0x0F,),
        "VIADDMNMX": (0x46,),
        "P2R": (0x03,),
        "CS2R": (0x05,),
    },
    "uniform": {
        "UIADD3": (0x90, 0x97),
        "UIMAD": (0xA4, 0xA5),
        "UISETP": (0x8C,),
        "ULEA": (0x91,),
        "ULOP3": (0x92,),
        "UPLOP3": (0x9C,),
        "USHF": (0x99,),
        "USEL": (0x87,),
        "UMOV": (0x82,),
        "VOTEU": (0x86,),
        "ULDC": (0xB9,),
        "UPOPC": (0xBF,),
        "R2UR": (0xCA,),
        "S2UR": (0x1C3,),
    },
    "shared memory": {
        "LDS": (0x184,),
        "STS": (0x188,),
        "STSM": (0x44,),
        "LDSM": (0x3B,),
        "STAS": (0x1BD,),
        "SYNCS": (0x1A7, 0x1B2),
        "SHFL": (0x189,),
    },
    "TMA": {
        "UTMALDG": (0x1B4,),
        "UTMASTG": (0x1B5,),
        "UTMACMDFLUSH": (0x1B7,),
        "UTMACCTL": (0x1B9,),
        "UBLKCP": (0x1BA,),
        "UBLKRED": (0x1BB,),
    },
    "other memory": {
        "LDG": (0x181,),
        "LDGSTS": (0x1AE,),
        "LDGDEPBAR": (0x1AF,),
        "STG": (0x186,),
        "ATOMG": (0x1A8,),
        "REDG": (0x18E,),
        "LDC": (0x182,),
        "LDL": (0x183,),
        "STL": (0x187,),
        "CCTL": (0x18F,),
    },
    "control": {
        "BRA": (0x147,),
        "BRX": (0x149,),
        "CALL": (0x144,),
        "RET": (0x150,),
        "YIELD": (0x146,),
        "WARPSYNC": (0x148,),
        "BSSY": (0x145,),
        "BSYNC": (0x141,),
        "EXIT": (0x14D,),
        "NOP": (0x118,),
        "NANOSLEEP": (0x15D,),
        "BAR": (0x11D,),
        "B2R": (0x11C,),
        "DEPBAR": (0x11A,),
        "WARPGROUP": (0x1C5,),
        "USETMAXREG": (0x1C8,),
        "ELECT": (0x2F,),
        "VOTE": (0x06,),
        "S2R": (0x119,),
        "FENCE": (0x1C6,),
        "MEMBAR": (0x192,),
        "ERRBAR": (0x1AB,),
        "UCGABAR": (0x1C7,),
        "PREEXIT": (0x2D,),
        "ACQBULK": (0x2E,),
    },
}
UNIT_OF = {
    operation: unit
    for unit, mnemonics in OPERATIONS.items()
    for operations in mnemonics.values()
    for operation in operations
}

# Per clock and SM. FLOPs of 16-bit operands, twice as many of FP8 ones; results; lanes; bytes; warp instructions.
TENSOR_FLOPS = 4096
MUFU_RESULTS = 16
FP32_LANES = 128
ALU_LANES = 64  # minimum, maximum, comparison, selection, conversion to 16 or 8 bits (two values at a time)
SHARED_BYTES = 128
ISSUED = 4
WARP = 32
CLOCKS_PER_US = 1830  # at which 132 SMs do NVIDIA's nominal 989 TFLOP/s
MEMORY_BYTES = RATES[-1][1] / NUM_SMS / CLOCKS_PER_US  # of K and V that lie in no cache
THREADS_PER_ROW = 4  # that each keep a row's maximum and scale
MASK_STEPS = {"full": 2, "causal": 2, "local": 3}  # ALU operations per score: comparisons and a selection


def instruction_mix(opcodes: Counter) -> dict[str, int]:
    """Instructions of a kernel by unit, the most first; `opcodes` are those of a CubinKernel."""
    mix = Counter()
    for opcode, count in opcodes.items():
        mix[UNIT_OF.get(opcode & OPERATION_MASK, OTHER)] += count
    return dict(mix.most_common())


def clocks_per_tile(cfg: Config, is_masked: bool = False) -> dict[str, float]:
    """Clocks that each unit of an SM is busy with one K/V tile of one CTA; inspect.py says how they are counted.

    is_masked   for a tile that the mask or the end of K and V cuts
    """
    scores, outputs = cfg.tile_m * cfg.tile_n, cfg.tile_m * cfg.dim_v
    columns_of_s, is_wide = cfg.dim_qk, isinstance(cfg, MlaConfig)
    if is_wide and cfg.has_qv:
        columns_of_s += cfg.dim_v
    exponentials = scores + THREADS_PER_ROW * cfg.tile_m
    on_lanes = 2 * scores + outputs
    maxima = scores / 2 if cfg.takes_max_of_bits and not is_masked else scores
    widened = cfg.tile_n * (cfg.dim_qk + cfg.dim_v) * cfg.widens  # numbers
    on_alu = maxima + scores / 2 + scores * MASK_STEPS[cfg.mask] * is_masked + widened / 2
    kv_bytes = cfg.tile_n * cfg.kv_bytes_per_token
    # Operands of the GEMMs from shared memory; of 512 columns of V one warpgroup's is S, and each has half of V, and P.
    kv_read = cfg.tile_n * (columns_of_s + cfg.dim_v) * cfg.element_bytes * (1 if is_wide else cfg.num_consumer_wgs)
    own_bytes = cfg.tile_m * columns_of_s * cfg.element_bytes + 2 * scores * cfg.element_bytes * is_wide
    changed_bytes = 2 * cfg.v_slot_bytes * cfg.values.is_transposed + widened * (cfg.stored_bytes + cfg.element_bytes)
    clocks = {
        "tensor": 2 * scores * (columns_of_s + cfg.dim_v) / (TENSOR_FLOPS * 2 / cfg.element_bytes),
        "MUFU": exponentials / MUFU_RESULTS,
        "FP32": on_lanes / FP32_LANES,
        "ALU": on_alu / ALU_LANES,
        "issue": (exponentials + on_lanes + on_alu) / (WARP * ISSUED),
        "shared memory": (kv_bytes + kv_read + changed_bytes + own_bytes) / SHARED_BYTES,
    }
    return clocks | ({"memory": kv_bytes / MEMORY_BYTES} if cfg.splits_keys else {})
