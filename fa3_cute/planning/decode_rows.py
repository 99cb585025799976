"""Which tile the decode kernel has for which problem: one table, a row per (bytes per element, head_dim), each with its
reason."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from ..contract.formats import ELEMENT_BYTES, LARGE_DIM, MLA_DIMS, QV_DIMS


@dataclass(frozen=True)
class DecodeRow:
    """Tile choice of one (bytes per element, head_dim) for decode.

    num_wide_slots   of StoredFields
    tile_us   microseconds that a CTA takes per K/V tile when it does not wait for memory
    """

    tile_n: int
    num_kv_stages: int
    ctas_per_sm: int
    tile_us: float
    reason: str
    num_wide_slots: int = 0


# Reasons: microseconds of BF16, 16:2 heads, batch x context, with the best number of splits; H200, 2026-11-22, graph
# replay. A name like 64x3x2 is tile_n x num_kv_stages x ctas_per_sm.
DECODE = {
    (2, 64): DecodeRow(
        128, 3, 2, 0.65, "16x8k 18.8, 64x8k 32:8 238; 64x4x3 19.0, 239; 64x6x2 19.9, 239; 128x2x3 spills"
    ),
    (2, 96): DecodeRow(64, 4, 2, 0.45, "16x8k 29.0; 64x8x1 29.9; 128x2x2 spills 32 bytes"),
    (2, 128): DecodeRow(
        64,
        3,
        2,
        0.55,
        "1x32k 9.5, 16x8k 34.3, 24x4k 26.2; 128x3x1 9.4, 35.1, 29.6; in an earlier form 1x32k 15.3, 32x6x2 17.0",
    ),
    (2, 192): DecodeRow(64, 4, 1, 0.75, "what fits one CTA per SM"),
    (2, 256): DecodeRow(64, 3, 1, 0.9, "what fits one CTA per SM"),
    # FP8, the same.
    (1, 64): DecodeRow(128, 5, 2, 0.9, "4x2k 5.1, 1x32k 7.9, 16x8k 12.9, 64x8k 32:8 168"),
    (1, 96): DecodeRow(128, 4, 2, 1.3, "4x2k 5.5, 1x32k 9.5, 16x8k 22.0, 64x8k 32:8 246"),
    (1, 128): DecodeRow(
        128,
        3,
        2,
        1.15,
        "4x2k 5.8, 1x32k 11.2, 16x8k 23.8, 64x8k 32:8 244; 128x6x1 5.7, 10.9, 23.0, 322: a chain of one warpgroup; "
        "64x6x2 6.1, 11.2, 22.4, 257; 96x4x2 6.2, 11.3, 24.5, 247; all of 2026-11-30",
    ),
    (1, 192): DecodeRow(64, 8, 1, 0.8, "16x8k 36.8; 128x4x1 spills 8 bytes, 64x4x2 1204"),
    (1, 256): DecodeRow(64, 6, 1, 1.0, "16x8k 41.7, 32x8k 32:8 280; 128x3x1 spills 32 bytes with a window"),
}
# {(bytes per element, head_dim, is_local): its own row in ragged batches}
RAGGED_DECODE = {
    (1, 128, False): DecodeRow(64, 6, 2, 0.65, "128x3x2 spills 8 bytes over pages; measured with dense keys alone"),
    (1, 128, True): DecodeRow(64, 6, 2, 0.65, "128x3x2 spills 32 bytes; measured with dense keys alone"),
    (1, 96, True): DecodeRow(128, 8, 1, 1.0, "with two CTAs per SM it spills 16 bytes, over pages 24; not measured"),
}
# {(bytes per element, head_dim)} of what takes registers (score_features.HEAVY): a CTA has all those of an SM, or it
# spills. Not measured; microseconds per tile as of DECODE.
HEAVY_DECODE = {
    (2, 64): DecodeRow(64, 8, 1, 0.45, "registers"),
    (2, 96): DecodeRow(64, 8, 1, 0.45, "registers"),
    (2, 128): DecodeRow(64, 6, 1, 0.55, "registers"),
    (1, 64): DecodeRow(64, 16, 1, 0.5, "registers"),
    (1, 96): DecodeRow(128, 8, 1, 1.0, "registers; 64 keys are not divisible among the warps that transpose"),
    (1, 128): DecodeRow(64, 12, 1, 0.6, "registers"),
}
# {columns of Q and K, and of V} of planning/mla.py, in whose kernels a key takes 1152 or 2048 bytes. Heads of 512:
# BF16, H200, 2026-11-30, graph replay; the time of a tile is one with which the plan is the best of those measured.
WIDE = {
    MLA_DIMS: DecodeRow(
        64,
        2,
        1,
        2.0,
        "what fits one CTA per SM; 32x4x1 with S of a tile ahead serialises WGMMA, which is then in flight "
        "from one iteration to the next",
    ),
    QV_DIMS: DecodeRow(
        64, 2, 1, 2.0, "as MLA's, which has the same bytes and GEMMs, and takes 0.99 to 1.01 of its time"
    ),
    (LARGE_DIM, LARGE_DIM): DecodeRow(
        32,
        2,
        1,
        1.4,
        "64x8k 8:1 heads 251 us, 32x4k 32:4 243, 1x64k 32:4 130, 16x1k 36.7, 1x4k 16.4; 16x5x1 252, 250, 134, 38.7, "
        "18.4; 16x4x1 251, 248, 132, 37.7, 18.3",
    ),
}
# {head_dim} of 16-bit queries over FP8 keys; behind + the slots of 16 bit. Microseconds are of an earlier form, in
# which the same warps widened K and V in turn and Q was in shared memory, H200, 2026-11-29, graph replay.
FP8_CACHE = {
    64: DecodeRow(128, 8, 1, 0.7, "64x8k 32:8 233, 16x8k 20.0", 2),
    128: DecodeRow(
        128,
        3,
        1,
        0.9,
        "64x8k 32:8 over the time of a 16-bit cache, H200, 2026-11-30: BF16 0.658, FP16 0.677; 128x2x1, operands of "
        "the queries' type, Q in shared memory, 0.717, 0.725; earlier 128x2x1 322, 16x8k 25.7; 128x3x1+1 353, 27.7; "
        "64x8x1+2 455, 33.3",
        2,
    ),
}
# {head_dim} of its own row with a window
FP8_CACHE_LOCAL = {64: DecodeRow(96, 8, 1, 0.6, "with 128 keys it spills 16 bytes; not measured", 2)}


@cache
def decode_row(
    dtype: str,
    head_dim: int,
    is_local: bool = False,
    is_ragged: bool = False,
    takes_registers: bool = False,
    kv_dtype: str | None = None,
) -> DecodeRow:
    """The row of DECODE that serves a problem, or that of one of the other tables."""
    if kv_dtype:
        return is_local and FP8_CACHE_LOCAL.get(head_dim) or FP8_CACHE[head_dim]
    key = ELEMENT_BYTES[dtype], head_dim
    if takes_registers:
        return HEAVY_DECODE.get(key, DECODE[key])
    return is_ragged and RAGGED_DECODE.get((*key, is_local)) or DECODE[key]


def row_of(cfg: Any) -> DecodeRow:
    """That of a decode kernel's config."""
    if row := WIDE.get((cfg.dim_qk, cfg.dim_v)):
        return row
    return decode_row(cfg.dtype, cfg.head_dim, cfg.is_local, cfg.is_ragged, cfg.takes_registers, cfg.kv_dtype)
