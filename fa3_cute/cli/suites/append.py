"""Decode steps of a serving engine: the new key and value are rotated and written to the cache by the call that attends
to it, beside the same step without; over a dense cache and over pages."""

from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import FP8
from ..case import Case
from ..compared import timed, versus_16_bit, versus_peers
from ..dtypes import DEFAULT, head_dims
from ..features import Feature
from ..shown import MEMORY, OURS_16, Shown, of_first

TITLE = "Decode steps that append to the cache"
_OF_FIRST = (("of first", 8, of_first),)
SHOWN = Shown(
    printed=MEMORY.printed + _OF_FIRST,
    markdown=MEMORY.markdown + _OF_FIRST,
    peer=MEMORY.peer,
    problem=(
        ("type", "dtype"),
        ("head_dim", "head_dim"),
        ("heads", "heads"),
        ("sequences", "layout"),
        ("K and V", "variant"),
        ("step", "scores"),
    ),
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
    found = []
    for head_dim in args.head_dim or [HEAD_DIM]:
        for num_heads, num_heads_k in HEADS:
            for batch_size, seqlen in STEPS:
                sizes = dtype, head_dim, False, 1, seqlen, batch_size, num_heads, num_heads_k
                step = Case(*sizes, label=f"{batch_size}x{seqlen}", l2="warm", lengths_k=(seqlen,) * batch_size)
                for page_size in PAGES:
                    found += problem(replace(step, page_size=page_size), asked)
    return [case for case in found if case.head_dim in head_dims(dtype)]


def problem(case: Case, asked: Sequence[Feature]) -> list[Case]:
    """A step with each of these; queries over pages are packed."""
    if case.page_size:
        case = replace(case, lengths=(1,) * case.batch_size)
    return [replace(case, scores=feature, group=case.name) for feature in asked]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster; by how much the new row makes a step longer, ours and the peers'."""
    lines = versus_peers(rows) + versus_16_bit(rows)
    firsts: dict[str, float] = {}
    for (case, time), row in zip(times.items(), rows, strict=True):
        first = firsts.setdefault(case.group, time)
        if not case.scores.append:
            continue
        others = [
            f"{1 / result['ratio']:.3f}x the time of {name}" for name, result in timed(row).items() if name != OURS_16
        ]
        longer = f"{1000 * (time - first):+.2f} us, {case.kv_bytes / 1e6:.0f} MB of K and V"
        lines.append(", ".join([f"{case.name}: {longer}", *others]))
    return lines
