"""Which choices of BackwardConfig serve a problem, and why. Pure Python."""

from typing import NamedTuple

from .score_features import Features


class Row(NamedTuple):
    """tile_m, is_dq_transposed, is_dq_behind and is_split of some problems, and why."""

    tile_m: int
    is_dq_transposed: bool
    is_dq_behind: bool
    reason: str
    is_split: bool = False


# Times of the whole call, BF16, 16k tokens, hidden 2048, H200, 2026-11-29 and 30.
WIDE = Row(
    80,
    True,
    True,
    "80 queries: at N = 64, A and B of S and dP take all of shared memory's bandwidth; 64 take 1.00 to 1.02 times as "
    "long at 16k tokens, dQ of its own tile 1.00 to 1.03",
)
UNEVEN = Row(
    64,
    True,
    True,
    "where rows behind a sequence's last are cleared, 80 queries have no registers for dQ a tile later: 8 x 2048 take "
    "1.03 to 1.04 times as long",
)
NARROW = Row(
    64,
    True,
    True,
    "of 512 queries 80 fill 7 tiles where 6.4 would do, and take 1.11 to 1.15 times as long, of 1024 1.04 to 1.06",
)
CROSSING = Row(
    64,
    True,
    True,
    "80 queries cross the diagonal for longer: causal calls of 16k queries take 1.01 times as long, of 4096 1.04, "
    "windows of 1024 keys 1.04 to 1.05",
)
SQUARE = Row(
    128,
    False,
    True,
    "dQ a tile later, under the exponentials: dQ of its own tile takes up to 1.11 times as long; 96 queries, whose dQ "
    "is split by queries, take 1.09 to 1.18",
)
TURNS = Row(
    64,
    False,
    True,
    "64 queries, whose dQ warpgroups compute in turns: three kernels of one gradient each take 1.38 to 1.45 times as "
    "long; 128 queries spill",
)
SPLIT = Row(
    64,
    False,
    True,
    "a GEMM for each warpgroup: two kernels, of dQ and of dK and dV, take 1.01 to 1.16 times as long",
    True,
)
TABLE = {
    (64, "full"): SQUARE,
    (64, "causal"): SQUARE,
    (64, "local"): SQUARE,
    (128, "full"): WIDE,
    (128, "causal"): CROSSING,
    (128, "local"): CROSSING,
    (96, "full"): TURNS,
    (96, "causal"): TURNS,
    (96, "local"): TURNS,
    (192, "full"): SPLIT,
    (192, "causal"): SPLIT,
    (192, "local"): SPLIT,
}
# Where lengths are on the device, of whatever sequences.
VARLEN = {(128, "full"): UNEVEN}
# Where sequences have SHORT_QUERIES at most, in the mean.
SHORT_QUERIES = 1024
SHORT = {(128, "full"): NARROW}

# Features that the kernel of all gradients has, one at a time: with two of them it spills, and with softcap at head_dim
# 64, whose Q tiles have 128 rows.
FEATURES_OF_ALL = frozenset(("has_softcap", "has_alibi", "has_chunks"))
# Its rows with one of them, by head_dim.
FEATURED = {
    64: SQUARE,
    96: TURNS,
    128: Row(64, True, False, "not measured: with 80 queries some of the features spill"),
}


def has_registers(head_dim: int, features: Features) -> bool:
    """The kernel of all gradients does not spill with these features."""
    fields = {field for field, _ in features}
    if head_dim not in FEATURED:
        return not fields
    return len(fields) <= 1 and fields <= FEATURES_OF_ALL and (head_dim, fields) != (64, {"has_softcap"})
