"""Decode with 16-bit queries over FP8 keys, beside our own over a BF16 cache and with FP8 queries."""

from collections.abc import Sequence

from ...contract.formats import FP8, FP8_CACHE_HEAD_DIMS
from ..case import Case
from ..compared import timed, versus_16_bit
from ..shown import MEMORY
from . import decode

TITLE = "Decode, 16-bit queries over an FP8 cache"
SHOWN = MEMORY
FIXED = ("seqlen", "masks", "batch_size", "num_heads", "num_heads_k")

# Sequences, keys in each, query heads, KV heads, by head_dim.
PROBLEMS: decode.Problems = {
    64: ((64, 8192, 32, 8),),
    128: ((64, 8192, 32, 8), (16, 8192, 32, 8), (1, 32768, 32, 8)),
}


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then problem, then warm and cold."""
    return decode.steps(args, args.head_dim or FP8_CACHE_HEAD_DIMS, PROBLEMS, FP8)


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows the BF16 cache is faster, and what the FP8 one takes of its time."""
    lines = versus_16_bit(rows)
    for row in rows:
        shares = [f"{1 / result['ratio']:.3f}x of {name}" for name, result in timed(row).items()]
        lines.append(f"{row['name']}: {', '.join(shares)}")
    return lines
