"""Which kernel serves which problem: one table, a row per (bytes per element, head_dim, mask), each with its reason."""

from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from ..contract.formats import ELEMENT_BYTES, FP8, FP8_OUT_DTYPES
from .config import DecodeConfig, FwdConfig
from .decode_rows import DECODE, FP8_CACHE, decode_row
from .dims import has_fewer_values
from .key_source import PAGE_BOXES
from .score_features import NO_FEATURES, Features, take_registers


@dataclass(frozen=True)
class Row:
    """Tile choice of one (bytes per element, head_dim, mask) and the measurement behind it."""

    tile_m: int
    tile_n: int
    num_q_stages: int
    reason: str
    use_pingpong: bool = True
    rescale_before_pv: bool = False
    num_kv_stages: int = 2


# Reasons: speed relative to FA3 C++ (fa3-fwd 0.0.3) at 4k / 16k tokens; BF16, randn, 16k tokens in all, hidden size
# 2048, H200, 2026-11-22, interleaved in one process. "q1", "q2": Q stages. Larger tiles spill or do not fit.
FORWARD = {
    (2, 64, "full"): Row(
        192,
        112,
        2,
        "1.02 / 1.00; 192x128 1.04 / 0.96, 128x192 0.90 / 0.85, 128x128 0.86 / 0.78; "
        "192x144 spills 64 bytes and serialises WGMMA",
    ),
    (2, 64, "causal"): Row(192, 128, 2, "1.04 / 1.03; 192x112 0.99 / 0.97; 192x144 spills 160 bytes"),
    (2, 96, "full"): Row(
        192,
        112,
        2,
        "1.02 / 1.02; 192x96 1.00 / 0.98, 128x160 and 128x192 0.95 / 0.96, "
        "128x128 0.97 / 0.95; 192x128 spills 144 bytes",
    ),
    (2, 96, "causal"): Row(192, 112, 2, "1.07 / 1.07; 192x96 1.08 / 1.03, 128x192 1.04 / 0.99"),
    (2, 128, "full"): Row(
        128,
        160,
        2,
        "1.02 / 1.02; 128x128 1.01 / 1.01; with the one Q stage that fits, 128x176 0.97 / 0.99 and 128x192 0.95 / 0.97",
    ),
    (2, 128, "causal"): Row(
        128, 128, 2, "1.07 / 0.97; 128x160 1.02 / 0.99 and 12 % slower at 512 tokens, 128x112 0.93 / 0.95"
    ),
    (2, 192, "full"): Row(
        128, 112, 1, "1.03 / 1.03, with or without ping-pong; 128x96 q1 1.03 / 1.00, 128x80 q2 1.03 / 0.97"
    ),
    (2, 192, "causal"): Row(
        128, 112, 1, "1.00 / 1.02; rescaling before PV without ping-pong 0.98 / 1.00, 128x80 q2 1.00 / 0.97"
    ),
    (2, 256, "full"): Row(
        128,
        80,
        1,
        "1.02 / 1.03; with ping-pong and rescaling after PV 0.97 / 0.96, 128x64 1.00 / 0.99",
        use_pingpong=False,
        rescale_before_pv=True,
    ),
    (2, 256, "causal"): Row(128, 80, 1, "0.99 / 1.00; 128x64 0.98 / 0.98", use_pingpong=False, rescale_before_pv=True),
    # Windows: microseconds of (1023, 0) at 16k / (512, 512) at 4 x 4k tokens, same run of the same kernels.
    (2, 64, "local"): Row(
        128,
        128,
        2,
        "387 / 365; 192x128 397 / 367, 192x112 413 / 396, 128x96 433 / 406: "
        "a smaller tile_m wastes less at the window's two ends",
    ),
    (2, 96, "local"): Row(128, 128, 2, "214 / 224; 192x96 227 / 264, 192x112 233 / 244, 128x96 241 / 252"),
    (2, 128, "local"): Row(128, 128, 2, "252 / 251; 128x96 288 / 287, 128x160 296 / 279, 128x64 298 / 295"),
    (2, 192, "local"): Row(128, 96, 1, "290 / 303; 128x80 q2 308 / 293, 128x64 q2 318 / 289, 128x112 324 / 315"),
    (2, 256, "local"): Row(
        128, 64, 1, "272 / 243; 128x80 281 / 249, 128x48 308 / 283", use_pingpong=False, rescale_before_pv=True
    ),
    # FP8 relative to FA3's FP8, else the same; none with ping-pong, which costs three warpgroups 8 %. The numbers of
    # what was not chosen are from before warpgroups left tiles out, where the chosen ones had 1.05 / 1.05,
    # 1.13 / 1.10, 1.08 / 1.10, 1.08 / 1.10, 1.03 / 1.02 and 1.01 / 1.02; windows all.
    (1, 64, "full"): Row(192, 192, 2, "1.05 / 1.05; 192x160 1.06 / 1.04", use_pingpong=False),
    (1, 64, "causal"): Row(192, 192, 2, "1.17 / 1.11; 192x160 1.10 / 1.08, 192x128 1.05 / 1.02", use_pingpong=False),
    (1, 96, "full"): Row(192, 160, 2, "1.08 / 1.10; 192x128 1.01 / 1.04", use_pingpong=False),
    (1, 96, "causal"): Row(192, 160, 2, "1.13 / 1.09; 192x128 1.03 / 1.03, 192x96 0.99 / 0.95", use_pingpong=False),
    (1, 128, "full"): Row(
        192,
        128,
        2,
        "1.08 / 1.05; in an earlier form 128x224 0.81 / 0.83, 128x192 0.82 / 0.84, 128x128 0.84 / 0.82",
        use_pingpong=False,
    ),
    (1, 128, "causal"): Row(192, 128, 2, "1.06 / 1.03; 128x128 0.91 / 0.85, 192x96 0.98 / 0.95", use_pingpong=False),
    (1, 64, "local"): Row(
        192, 128, 2, "336 / 321; 192x192 332 / 344, 128x128 348 / 332, 128x192 385 / 368", use_pingpong=False
    ),
    (1, 96, "local"): Row(
        192, 128, 2, "257 / 249; 192x160 261 / 254, 128x128 261 / 255, 128x96 302 / 294", use_pingpong=False
    ),
    (1, 128, "local"): Row(
        128,
        128,
        2,
        "219 / 211; 192x128 218 / 210, 192x96 231 / 242, 128x192 247 / 239: of equals the smaller tile_m wastes less",
        use_pingpong=False,
    ),
    # Relative to our BF16 kernels, H200, 2026-11-30; windows are not measured.
    **{
        (1, 192, mask): Row(128, 128, 1, f"what fits: {speed}; 192x96 spills 1196 bytes", use_pingpong=False)
        for mask, speed in (("full", "1.08 / 1.05"), ("causal", "1.14 / 1.04"), ("local", "as causal"))
    },
    **{
        (1, 256, mask): Row(128, 64, 1, f"what fits: {speed}; 96 keys do not", use_pingpong=False)
        for mask, speed in (("full", "0.95 / 0.92"), ("causal", "1.08 / 0.97"), ("local", "as causal"))
    },
}

# {(bytes per element, head_dim, mask)} of tiles of V and O with fewer columns (contract/formats.VALUE_DIMS).
FEWER_VALUES = {
    (2, 192, "full"): Row(128, 128, 1, "what fits with V's 128 columns; not measured"),
    (2, 192, "causal"): Row(128, 128, 1, "what fits with V's 128 columns; not measured"),
    (2, 192, "local"): Row(128, 96, 1, "as with 192 columns of V, which leaves room for attn_mask; not measured"),
}

# {(head_dim, packed_heads)} of small windows whose heads are packed (packing.py), in 16 bit: the largest of the numbers
# of heads that divides num_heads / num_heads_k. One tile of K and V, or two, span the keys that a tile's rows see of
# (127, 0): tile_m / packed_heads + 127. Reasons: microseconds of it and without packed heads; 8 KV heads, 2 x
# 8k tokens, BF16, H200, 2026-11-29.
PACKED = {
    (64, 8): Row(
        192,
        160,
        2,
        "154 of 246, with serial steps; 3 K/V stages 154; 128x144 171, with serial steps 173; of 243 in another run "
        "128x144 167, 3 K/V stages 167, without ping-pong 168, one Q stage and 4 K/V stages 225",
        use_pingpong=False,
    ),
    (64, 4): Row(128, 160, 2, "96 of 127"),
    (64, 2): Row(128, 192, 2, "59 of 68"),
    (128, 8): Row(128, 144, 2, "220 of 288"),
    (128, 4): Row(128, 160, 2, "138 of 170"),
    (128, 2): Row(128, 96, 2, "80 of 89"),
}
# Those among them that have a row of their own with lengths on the device.
PACKED_VARLEN = {(64, 8): Row(128, 144, 2, "171 of 246 without lengths; 192x160 spills 8 bytes")}


def packed_row(head_dim: int, packed_heads: int, is_varlen: bool) -> Row:
    """The row that serves packed heads."""
    key = head_dim, packed_heads
    return is_varlen and PACKED_VARLEN.get(key) or PACKED[key]


class KeySource(NamedTuple):
    """Where K and V come from, as a config has it; page_size: of K and V in pages, for what tile_n makes of it."""

    is_ragged: bool = False
    page_size: int = 0
    box_is_wide: bool = False
    has_leftpad: bool = False

    def fields(self, tile_n: int) -> dict[str, Any]:
        """Of a config whose tiles have so many keys: boxes are the largest that pages and tiles are made of; rows, if
        tiles may start at any."""
        page_box = int(self.page_size > 0)
        if self.page_size and not self.has_leftpad:
            page_box = next(box for box in PAGE_BOXES if self.page_size % box == tile_n % box == 0)
        is_wide = self.box_is_wide and page_box > 1
        fields = {"is_ragged": self.is_ragged, "page_box": page_box, "box_is_wide": is_wide}
        return fields | {"has_leftpad": self.has_leftpad}


DENSE = KeySource()  # and packed K and V with packed Q
# (dtype, out_dtype) of every config.
DTYPES = (("fp16", None), ("bf16", None), *((FP8, out) for out in FP8_OUT_DTYPES))


def forward_row(dtype: str, head_dim: int, mask: str, takes_registers: bool = False, has_fewer: bool = False) -> Row:
    """The row of FORWARD that serves a problem, or of FEWER_VALUES; of what takes registers that of windows: larger
    tiles spill."""
    rows = FEWER_VALUES if has_fewer else FORWARD
    return rows[ELEMENT_BYTES[dtype], head_dim, "local" if takes_registers else mask]


def with_registers_for_mask(row: Row, dtype: str, head_dim: int, attn_mask: str) -> Row:
    """The row, with registers left for what attn_mask has for a tile: of FP32 as many as S takes, of 16 bit and of
    bytes half as many. 16-bit elements go through shared memory in the 16-bit kernels, which need none then."""
    if ELEMENT_BYTES[dtype] == 1:
        most = 64 if attn_mask == "fp32" else 96 if head_dim == 192 else 128
        return replace(row, tile_m=128, tile_n=min(row.tile_n, most))
    return replace(row, tile_n={"fp32": row.tile_n // 2, "bool": row.tile_n - 16}.get(attn_mask, row.tile_n))


_interned: dict[FwdConfig | DecodeConfig, FwdConfig | DecodeConfig] = {}


def interned(cfg: Any) -> Any:
    """The one config that is equal to this one."""
    return _interned.setdefault(cfg, cfg)


@cache
def forward_config(
    dtype: str,
    head_dim: int,
    mask: str,
    has_lse: bool,
    is_varlen: bool,
    out_dtype: str | None = None,
    features: Features = NO_FEATURES,
    source: KeySource = DENSE,
) -> FwdConfig:
    """The config that serves a problem; the arguments are what the caller's params fix at compile time."""
    row = forward_row(dtype, head_dim, mask, take_registers(features), has_fewer_values(features))
    if attn_mask := dict(features).get("attn_mask"):
        row = with_registers_for_mask(row, dtype, head_dim, attn_mask)
    return interned(
        FwdConfig(
            dtype,
            head_dim,
            mask == "causal",
            has_lse,
            row.tile_m,
            row.tile_n,
            row.num_q_stages,
            row.num_kv_stages,
            row.use_pingpong,
            row.rescale_before_pv,
            mask == "local",
            is_varlen,
            out_dtype,
            **source.fields(row.tile_n),
            **dict(features),
        )
    )


@cache
def packed_config(cfg: FwdConfig, packed_heads: int) -> FwdConfig:
    """The config that serves the window that cfg, of `forward_config`, serves without packed heads."""
    fields = asdict(packed_row(cfg.head_dim, packed_heads, cfg.is_varlen))
    del fields["reason"]
    return interned(replace(cfg, packed_heads=packed_heads, **fields))


def all_forward_configs() -> list[FwdConfig]:
    """Every config that some supported call can need."""
    return [
        forward_config(dtype, head_dim, mask, has_lse, is_varlen, out_dtype)
        for dtype, out_dtype in DTYPES
        for size, head_dim, mask in FORWARD
        if size == ELEMENT_BYTES[dtype]
        for is_varlen in (False, True)
        for has_lse in (False, True)
    ]


@cache
def decode_config(
    dtype: str,
    head_dim: int,
    is_local: bool,
    out_dtype: str | None = None,
    features: Features = NO_FEATURES,
    source: KeySource = DENSE,
    kv_dtype: str | None = None,
) -> DecodeConfig:
    """The config that serves a decode problem."""
    row = decode_row(dtype, head_dim, is_local, source.is_ragged, take_registers(features), kv_dtype)
    return interned(
        DecodeConfig(
            dtype,
            head_dim,
            is_local,
            row.tile_n,
            row.num_kv_stages,
            row.ctas_per_sm,
            out_dtype,
            kv_dtype=kv_dtype,
            num_wide_slots=row.num_wide_slots,
            **source.fields(row.tile_n),
            **dict(features),
        )
    )


def all_decode_configs() -> list[DecodeConfig]:
    """Every decode config that some supported call can need."""
    return [
        decode_config(dtype, head_dim, is_local, out_dtype)
        for dtype, out_dtype in DTYPES
        for size, head_dim in DECODE
        if size == ELEMENT_BYTES[dtype]
        for is_local in (False, True)
    ]


def fp8_cache_configs(source: KeySource = DENSE) -> list[DecodeConfig]:
    """Every config of 16-bit queries over FP8 keys that lie in one place."""
    return [
        decode_config(dtype, head_dim, is_local, source=source, kv_dtype=FP8)
        for dtype, head_dim, is_local in product(("bf16", "fp16"), FP8_CACHE, (False, True))
    ]


def all_packed_configs() -> list[FwdConfig]:
    """Every config that packs heads."""
    return [
        packed_config(forward_config(dtype, head_dim, "local", has_lse, is_varlen), packed_heads)
        for head_dim, packed_heads in PACKED
        for dtype, is_varlen, has_lse in product(("bf16", "fp16"), (False, True), (False, True))
    ]


def dense_configs() -> list[FwdConfig | DecodeConfig]:
    """Every config that some call of dense or packed Q, K and V alike can need."""
    return [*all_forward_configs(), *all_packed_configs(), *all_decode_configs(), *fp8_cache_configs()]


def configs_over(page_size: int) -> list[FwdConfig | DecodeConfig]:
    """Every config that calls over pages of so many rows can need, 0: those over a cache without pages; of pools whose
    heads and pages are not steps of one stride there are others."""
    out = []
    for dtype, out_dtype in DTYPES:
        source = KeySource(True, page_size, ELEMENT_BYTES[dtype] == 2 and page_size > 0 and page_size % 8 == 0)
        out += [
            forward_config(dtype, head_dim, mask, has_lse, True, out_dtype, source=source)
            for size, head_dim, mask in FORWARD
            if size == ELEMENT_BYTES[dtype]
            for has_lse in (False, True)
        ]
        out += [
            decode_config(dtype, head_dim, is_local, out_dtype, source=source)
            for size, head_dim in DECODE
            if size == ELEMENT_BYTES[dtype]
            for is_local in (False, True)
        ]
    return out + fp8_cache_configs(KeySource(True, page_size))
