"""Head dims beside those of the kernels' tiles: V with fewer columns than K (DeepSeek's prefill), head dims that a tile
has more columns than; FP8 and 16-bit decode of so much K and V that reading them is all that should take time."""

from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import FP8
from ..case import Case
from ..compared import versus_16_bit, versus_peers
from ..dtypes import DEFAULT
from ..shown import OURS, Shown, bandwidth, known, marked_microseconds, microseconds, of_first, rate, share

TITLE = "Head dims"


_COLUMNS = (
    ("us", 8, microseconds),
    ("TFLOP/s", 8, rate),
    ("of first", 8, known("of_first", of_first)),
    ("GB/s", 6, known("gbs", bandwidth)),
    ("of copy", 8, known("of_copy", share("of_copy"))),
)
SHOWN = Shown(
    printed=_COLUMNS,
    markdown=_COLUMNS,
    peer=("us", 8, marked_microseconds),
    problem=(
        ("type", "dtype"),
        ("head_dim", "dims"),
        ("heads", "heads"),
        ("sequences", "layout"),
        ("mask", "mask"),
    ),
    has_variants=False,
)
FIXED = ("head_dim", "seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
PREFILLS = ((4, 4096), (1, 16384))  # sequences, tokens of each
HEADS = 16
VALUE_DIMS = (192, 128)
PAIRS = ((96, 80), (128, 112))  # the columns of a kernel's tile, and fewer
# Sequences, keys of each, query heads, KV heads: a gigabyte of K and V.
DECODE_DIM = 128
DECODE_FP8, DECODE_16_BIT = (64, 8192, 32, 8), (32, 8192, 32, 8)


def cases(args) -> list[Case]:
    """Every case that the command line leaves in."""
    dtype = args.dtype or DEFAULT
    found = []
    if dtype != FP8:
        head_dim, head_dim_v = VALUE_DIMS
        found += [replace(prefill(dtype, head_dim, *sizes, True), head_dim_v=head_dim_v) for sizes in PREFILLS]
    for dims in PAIRS:
        for sizes in PREFILLS:
            for is_causal in (False, True):
                whole, fewer = (prefill(dtype, head_dim, *sizes, is_causal) for head_dim in dims)
                found += [replace(case, group=whole.name) for case in (whole, fewer)]
    batch_size, seqlen, num_heads, num_heads_k = DECODE_FP8 if dtype == FP8 else DECODE_16_BIT
    return [*found, Case(dtype, DECODE_DIM, False, 1, seqlen, batch_size, num_heads, num_heads_k, l2="warm")]


def prefill(dtype: str, head_dim: int, batch_size: int, seqlen: int, is_causal: bool) -> Case:
    return Case(dtype, head_dim, is_causal, seqlen, seqlen, batch_size, HEADS, HEADS)


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster; what columns that a tile has and a head not cost; how near to a copy decode
    comes."""
    lines = versus_peers(rows) + versus_16_bit(rows)
    firsts: dict[str, Case] = {}
    for case, row in zip(times, rows, strict=True):
        result = row["results"][OURS]
        if case.l2:
            of_copy = f"{result['of_copy']:.1%} of the bandwidth of a copy on the device"
            lines.append(f"{case.name}: {case.kv_bytes / 1e9:.2f} GB of K and V, at {of_copy}")
        elif case.group and firsts.setdefault(case.group, case) is not case:
            lines.append(f"{case.name}: {result['of_first']:.3f}x the time of head_dim {firsts[case.group].head_dim}")
    return lines
