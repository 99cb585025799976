"""Decode with 16-bit queries over FP8 keys, beside our own over a BF16 cache and with FP8 queries; and steps whose new
key and value are quantised as they are appended, beside the same steps without."""

from collections.abc import Sequence

from ...contract.formats import FP8, FP8_CACHE_HEAD_DIMS
from ..case import Case
from ..compared import timed, versus_16_bit
from ..dtypes import DEFAULT
from ..shown import MEMORY, Shown, known, of_first
from . import append, decode

TITLE = "Decode, 16-bit queries over an FP8 cache"
_OF_FIRST = (("of first", 8, known("of_first", of_first)),)
SHOWN = Shown(
    printed=MEMORY.printed + _OF_FIRST,
    markdown=MEMORY.markdown + _OF_FIRST,
    peer=MEMORY.peer,
    problem=append.PROBLEM,
    has_variants=False,
)
FIXED = decode.FIXED

# Sequences, keys in each, query heads, KV heads, by head_dim.
PROBLEMS: decode.Problems = {
    64: ((64, 8192, 32, 8),),
    128: ((64, 8192, 32, 8), (16, 8192, 32, 8), (1, 32768, 32, 8)),
}
APPENDING_DIM, APPENDING_HEADS = 128, ((32, 8),)


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then problem, then warm and cold; then steps that
    append."""
    asked = args.head_dim or FP8_CACHE_HEAD_DIMS
    found = decode.steps(args, asked, PROBLEMS, FP8)
    if APPENDING_DIM in asked:
        dtype, features = args.dtype or DEFAULT, (append.WITHOUT, append.ROTATED)
        found += append.steps(dtype, (APPENDING_DIM,), APPENDING_HEADS, features, FP8)
    return found


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows the BF16 cache is faster, what the FP8 one takes of its time, and what the new rows take."""
    lines = versus_16_bit(rows)
    for row in rows:
        shares = [f"{1 / result['ratio']:.3f}x of {name}" for name, result in timed(row).items()]
        lines.append(f"{row['name']}: {', '.join(shares)}")
    return lines + append.longer(times, rows)
