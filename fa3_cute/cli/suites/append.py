"""Decode steps of a serving engine: the new key and value are rotated and written to the cache by the call that attends
to it, beside the same step without; over a dense cache and over pages."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

from ...contract.formats import FP8
from ..case import Case
from ..compared import timed, versus_16_bit, versus_peers
from ..dtypes import DEFAULT, head_dims
from ..features import Feature
from ..shown import MEMORY, OURS, OURS_16, Shown, of_first

TITLE = "Decode steps that append to the cache"
PROBLEM = (
    ("type", "dtype"),
    ("head_dim", "head_dim"),
    ("heads", "heads"),
    ("sequences", "layout"),
    ("K and V", "variant"),
    ("step", "scores"),
)
_OF_FIRST = (("of first", 8, of_first),)
SHOWN = Shown(
    printed=MEMORY.printed + _OF_FIRST,
    markdown=MEMORY.markdown + _OF_FIRST,
    peer=MEMORY.peer,
    problem=PROBLEM,
    has_variants=False,
)
FIXED = ("seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
HEAD_DIM = 128
HEADS = ((16, 2), (32, 8))
STEPS = ((1, 4096), (16, 8192), (64, 4096))  # sequences, keys of each, with the new one
PAGES = (0, 64)
WITHOUT = Feature("without")
APPEND = Feature("append", append=1)
ROTATED = Feature("append, rotary", append=1, rotary=True)


def cases(args) -> list[Case]:
    """Every case that the command line leaves in, with and without the new row one after the other."""
    dtype = args.dtype or DEFAULT
    # FP8 numbers are rotated before they are quantised, outside of the call.
    asked = (WITHOUT, APPEND if dtype == FP8 else ROTATED)
    return steps(dtype, filter(head_dims(dtype).__contains__, args.head_dim or [HEAD_DIM]), HEADS, asked)


def steps(
    dtype: str,
    head_dims: Iterable[int],
    heads: Iterable[tuple[int, int]],
    asked: Sequence[Feature],
    kv_dtype: str | None = None,
) -> list[Case]:
    """STEPS of each of these head dims and heads, dense and in pages, with each of what is asked."""
    found = []
    for head_dim, of_heads, (batch_size, seqlen) in product(head_dims, heads, STEPS):
        sizes = dtype, head_dim, False, 1, seqlen, batch_size, *of_heads
        lengths = (seqlen,) * batch_size
        step = Case(*sizes, label=f"{batch_size}x{seqlen}", l2="warm", lengths_k=lengths, kv_dtype=kv_dtype)
        for page_size in PAGES:
            found += problem(replace(step, page_size=page_size), asked)
    return found


def problem(case: Case, asked: Sequence[Feature]) -> list[Case]:
    """A step with each of these; queries over pages are packed."""
    if case.page_size:
        case = replace(case, lengths=(1,) * case.batch_size)
    return [replace(case, scores=feature, group=case.name) for feature in asked]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster; by how much the new row makes a step longer, ours and the peers'."""
    return versus_peers(rows) + versus_16_bit(rows) + longer(times, rows)


def longer(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """What the new row of each step takes, beside the same step without it, and the step beside the others'."""
    firsts: dict[str, Case] = {}
    lines = []
    for case, row in zip(times, rows, strict=True):
        first = firsts.setdefault(case.group, case)
        if not case.scores.append:
            continue
        others = [
            f"{1 / result['ratio']:.3f}x the time of {name}" for name, result in timed(row).items() if name != OURS_16
        ]
        more = f"{1000 * (times[case] - times[first]):+.2f} us, {row['results'][OURS]['of_first']:.3f}x the time"
        beside = f"{more} of the same step {first.scores.name}"
        lines.append(", ".join([f"{case.name}: {beside}, {case.kv_bytes / 1e6:.0f} MB of K and V", *others]))
    return lines
