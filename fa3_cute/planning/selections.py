"""Of the configs of tables.py, which are too many to compile each, some that stand for all: what tests compile."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..contract.formats import ELEMENT_BYTES, FP8, PARTIAL, VALUE_DIMS, WIDE_DIMS
from .backward import BackwardConfig
from .backward_kernels import MASKS, KernelOfPass, kernels_of, pass_config
from .backward_tables import SHORT
from .backward_tables import TABLE as BACKWARD
from .config import DecodeConfig, FwdConfig
from .decode_append import AppendingConfig, appending
from .decode_rows import DECODE
from .key_source import PAGE_BOXES
from .mla import MlaConfig, mla_config
from .one_side import TABLE as ONE_SIDE
from .one_side import OneSidePass
from .packing import PACKED_FEATURES
from .tables import (
    DENSE,
    DTYPES,
    FEWER_VALUES,
    FORWARD,
    KeySource,
    all_decode_configs,
    all_forward_configs,
    all_packed_configs,
    decode_config,
    forward_config,
    fp8_cache_configs,
    interned,
)

# A field of FEATURES and a value of it, but a user's functions; has_chunks apart, which is of windows.
FEATURE_VALUES = (
    ("has_softcap", True),
    ("attn_mask", "bool"),
    ("has_alibi", True),
    ("attn_mask", "bf16"),
    ("has_dropout", True),
    ("attn_mask", "fp32"),
    ("attn_mask", "fp16"),
)
CHUNKS = ("has_chunks", True)
# (kernel, mask) of the configs with features of one (bytes per element, head_dim).
FORWARD_PLACES = tuple((FwdConfig, mask) for mask in ("full", "causal", "local") for _ in range(2))
FEATURE_PLACES = (*FORWARD_PLACES, (DecodeConfig, "full"), (DecodeConfig, "local"))


def ragged_configs() -> list[FwdConfig | DecodeConfig]:
    """Of the configs of ragged batches, which are too many, some that stand for all: each row of the tables with both
    element types, the forward kernel's with LSE and without, and of the sources the next ones in turn."""
    decode_rows = [(*row, is_local) for row in DECODE for is_local in (False, True)]
    forward = [
        forward_config(dtype, head_dim, mask, has_lse, True, out_dtype, source=source)
        for (head_dim, mask), (dtype, out_dtype), has_lse, source in _in_turn(list(FORWARD))
    ]
    decode = [
        decode_config(dtype, head_dim, is_local, out_dtype, source=source)
        for (head_dim, is_local), (dtype, out_dtype), _, source in _in_turn(decode_rows)
    ]
    return [*forward, *decode]


def _in_turn(rows: list[tuple]) -> Iterator[tuple]:
    """(what else is in the row, (dtype, out_dtype), has_lse, source), two for each row (bytes per element, ...)."""
    for size in (2, 1):
        types = [names for names in DTYPES if ELEMENT_BYTES[names[0]] == size]
        boxes = [(box, is_wide) for box in PAGE_BOXES for is_wide in (False, True)]
        sources = [
            KeySource(True),
            *(KeySource(True, box, is_wide) for box, is_wide in boxes if not is_wide or size == 2 and box >= 8),
        ]
        own = [row[1:] for row in rows if row[0] == size]
        for turn in range(2 * len(own)):
            yield own[turn // 2], types[turn % 2], (turn + turn // 2) % 2 == 1, sources[turn % len(sources)]


def partial_configs() -> list[FwdConfig | DecodeConfig]:
    """Of the configs whose O is FP32 some that stand for all: each row of FORWARD, and of DECODE without a window."""
    dtypes = {1: FP8, 2: "bf16"}
    return [
        *(forward_config(dtypes[size], head_dim, mask, True, True, PARTIAL) for size, head_dim, mask in FORWARD),
        *(decode_config(dtypes[size], head_dim, False, PARTIAL) for size, head_dim in DECODE),
    ]


def feature_configs() -> list[FwdConfig | DecodeConfig]:
    """Of the configs with a feature some that stand for all: each (bytes per element, head_dim) with each feature once,
    each row of FORWARD and of DECODE with two, each feature with each mask and kernel; the other options in turn."""
    out, turns = [], Counter()
    for number, (size, head_dim) in enumerate(DECODE):
        features = [*FEATURE_VALUES[number % 7 :], *FEATURE_VALUES[: number % 7]]
        features.insert(FEATURE_PLACES.index((FwdConfig if number % 2 else DecodeConfig, "local")), CHUNKS)
        for (kernel, mask), feature in zip(FEATURE_PLACES, features, strict=True):
            turn = turns[kernel, feature]
            turns[kernel, feature] += 1
            dtype, out_dtype = [names for names in DTYPES if ELEMENT_BYTES[names[0]] == size][turn // 2 % 2]
            pages = KeySource(True, 16, size == 2)
            if kernel is DecodeConfig:
                source = (DENSE, pages)[turn % 2]
                cfg = decode_config(dtype, head_dim, mask == "local", out_dtype, frozenset({feature}), source)
            else:
                source, is_varlen = ((DENSE, False), (DENSE, True), (pages, True))[turn % 3]
                asked = dtype, head_dim, mask, turn % 2 == 1, is_varlen, out_dtype
                cfg = forward_config(*asked, frozenset({feature}), source)
            out.append(cfg)
    return out


def packed_configs() -> list[FwdConfig]:
    """Of those some that stand for all: each row of PACKED with both element types, the other options in turn, and once
    with one of PACKED_FEATURES."""
    found = [cfg for number, cfg in enumerate(all_packed_configs()) if number % 4 == number // 8 % 4]
    features = sorted(PACKED_FEATURES, reverse=True)
    return found + [
        interned(replace(cfg, **{features[number % len(features)]: True})) for number, cfg in enumerate(found[::2])
    ]


def dim_configs() -> list[FwdConfig | DecodeConfig]:
    """Of the configs of dims that the tables do not have some that stand for all: each row of FEWER_VALUES, and each
    (bytes per element, head_dim) of what is padded with each kernel, the other options in turn."""
    out = []
    for number, (size, head_dim, mask) in enumerate(FEWER_VALUES):
        fewer = frozenset({("head_dim_v", VALUE_DIMS[size, head_dim])})
        source, is_varlen = ((DENSE, False), (DENSE, True), (KeySource(True, 16, True), True))[number % 3]
        dtype = ("bf16", "fp16")[number % 2]
        out.append(forward_config(dtype, head_dim, mask, number % 2 == 0, is_varlen, None, fewer, source))
        out.append(decode_config(dtype, head_dim, mask == "local", None, fewer, source))
    padded, masks = frozenset({("is_padded", True)}), ("full", "causal", "local")
    for number, (size, head_dim) in enumerate(DECODE):
        source = (DENSE, KeySource(True, 16), KeySource(True, 1))[number % 3]
        dtype, out_dtype = [names for names in DTYPES if ELEMENT_BYTES[names[0]] == size][number % 2]
        asked = dtype, head_dim, masks[number // 2 % 3], number % 2 == 1
        out.append(forward_config(*asked, True, out_dtype, padded, source))
        out.append(decode_config(dtype, head_dim, number % 2 == 1, out_dtype, padded, source))
        if number % 3 == 0:
            out.append(forward_config(*asked, False, PARTIAL, padded))
    return out


def cached_fp8_configs() -> list[DecodeConfig]:
    """Of 16-bit queries over FP8 keys some that stand for all: each of dense keys, the other sources in turn."""
    sources = [KeySource(True), KeySource(True, 16), KeySource(True, 1), KeySource(True, 64)]
    others = [fp8_cache_configs(source) for source in (*sources, *sources)]
    return [*fp8_cache_configs(), *(configs[number] for number, configs in enumerate(others))]


def appending_configs() -> list[AppendingConfig]:
    """Of decode steps that append some that stand for all: over a cache, pages and rows, with each way that rotary
    pairs lie, and without; one with fewer columns of V than of K."""
    cached, pages, rows = KeySource(True), KeySource(True, 64, True), KeySource(True, 1)
    fewer = frozenset({("head_dim_v", VALUE_DIMS[2, 192])})
    return [
        appending(decode_config("bf16", 128, False, source=cached), "halves", "bf16"),
        appending(decode_config("bf16", 128, False, source=pages), "halves", "bf16"),
        appending(decode_config("fp16", 64, True, source=rows), "neighbours", "fp32"),
        appending(decode_config("fp16", 256, True, source=pages), "", ""),
        appending(decode_config("bf16", 192, False, features=fewer, source=cached), "halves", "bf16"),
    ]


def mla_configs() -> list[MlaConfig]:
    """Of those of 512 columns of V some that stand for all: for each of WIDE_DIMS one of dense keys, causal ones of
    ragged batches and over wide pages, and one over narrow pages whose O is FP32."""
    return [
        mla_config(dtype, is_local, out_dtype, source, dims)
        for dims in WIDE_DIMS
        for dtype, is_local, out_dtype, source in (
            ("bf16", False, None, DENSE),
            ("fp16", True, None, KeySource(True)),
            ("bf16", True, None, KeySource(True, 64, True)),
            ("fp16", False, PARTIAL, KeySource(True, 16)),
        )
    ]


def all_configs() -> list[FwdConfig | DecodeConfig]:
    """Every config that some supported call can need, but of ragged batches, FP32, packed heads, features and dims that
    the tables do not have a selection."""
    tables = all_forward_configs(), all_decode_configs(), ragged_configs(), partial_configs(), packed_configs()
    others = feature_configs(), dim_configs(), cached_fp8_configs()
    return [cfg for configs in (*tables, *others) for cfg in configs]


def backward_configs() -> list[BackwardConfig | OneSidePass]:
    """Of the passes some that stand for all: BF16 with each row of the table, dense and with lengths on the device, and
    in turn FP16 and deterministic ones, of which dense ones without a mask all; those of short sequences, deterministic
    too. Of those of one gradient each, BF16 with each head_dim and mask, dense and with lengths in turn, and one in
    FP16."""
    rows = list(BACKWARD)
    bf16 = [pass_config("bf16", *row, is_varlen, False) for row in rows for is_varlen in (False, True)]
    fp16 = [pass_config("fp16", *row, number % 2 == 1, False) for number, row in enumerate(rows) if number % 3]
    in_order = [row for row in rows if not BACKWARD[row].is_split]
    ordered = [pass_config("bf16", *row, number % 2 == 0, True) for number, row in enumerate(in_order) if number % 3]
    ordered += [pass_config("bf16", *row, False, True) for row in in_order if row[1] == "full"]
    short = [pass_config("bf16", *row, False, is_det, is_short=True) for row in SHORT for is_det in (False, True)]
    one_side = [OneSidePass("bf16", *row, number % 2 == 1) for number, row in enumerate(product(ONE_SIDE, MASKS))]
    return [*bf16, *fp16, *ordered, *short, *one_side, OneSidePass("fp16", 192, "causal", True)]


def backward_dim_configs() -> list[BackwardConfig | OneSidePass]:
    """Of the passes of dims that the tables do not have some that stand for all: each head_dim padded, element types,
    masks and lengths in turn, and of those with fewer columns of V one as it is and one padded."""
    padded, fewer = frozenset({("is_padded", True)}), frozenset({("head_dim_v", VALUE_DIMS[2, 192])})
    return [
        pass_config("bf16", 64, "full", False, False, dims=padded),
        pass_config("fp16", 64, "causal", True, False, dims=padded),
        pass_config("fp16", 96, "causal", True, False, dims=padded),
        pass_config("bf16", 128, "local", False, False, is_short=True, dims=padded),
        pass_config("bf16", 128, "causal", True, False, dims=padded),
        pass_config("fp16", 192, "full", True, False, dims=padded),
        pass_config("bf16", 256, "causal", False, False, dims=padded),
        pass_config("bf16", 192, "causal", False, False, dims=fewer),
        pass_config("fp16", 192, "local", True, False, dims=fewer | padded),
    ]


def backward_kernels() -> list[KernelOfPass]:
    """The kernels of these passes, each once."""
    passes = [*backward_configs(), *backward_dim_configs()]
    return list(dict.fromkeys(kernel for cfg in passes for kernel in kernels_of(cfg)))
