"""Packed sequences of unequal lengths, 16 heads: few, many, skewed, tiny."""

from collections.abc import Sequence

import numpy as np

from ..case import Case
from ..dtypes import DEFAULT
from ..shown import ARITHMETIC

TITLE = "Packed sequences (varlen)"
SHOWN = ARITHMETIC
FIXED = ("seqlen", "batch_size")
HEAD_DIMS = (64, 128)
NUM_HEADS = 16

MIXED = tuple(np.random.default_rng(0).integers(64, 4097, 64).tolist())
TINY = tuple(np.random.default_rng(1).integers(1, 41, 10_000).tolist())
PER_SEQUENCE, IN_2K = "10000 of 1..40", "the same in 2048s"

# Label: lengths, in the order in which they are packed.
LAYOUTS = {
    "256+512+128": (256, 512, 128),  # one wave of the SMs: what starting and finding work cost
    "8x2048": (2048,) * 8,  # as if dense
    "64 of 64..4096": MIXED,
    "16384+64x128": (16384, *(128,) * 64),  # one sequence is nearly all of the work
    PER_SEQUENCE: TINY,  # what a sequence costs
    IN_2K: (*(2048,) * (sum(TINY) // 2048), sum(TINY) % 2048),
}


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then mask, then layout."""
    num_heads = args.num_heads or NUM_HEADS
    return [
        Case(
            dtype=args.dtype or DEFAULT,
            head_dim=head_dim,
            is_causal=is_causal,
            seqlen_q=max(lengths),
            seqlen_k=max(lengths),
            batch_size=len(lengths),
            num_heads=num_heads,
            num_heads_k=args.num_heads_k or num_heads,
            lengths=lengths,
            label=label,
        )
        for head_dim in args.head_dim or HEAD_DIMS
        for is_causal in args.masks or (False, True)
        for label, lengths in LAYOUTS.items()
    ]


def conclusions(times: dict[Case, float], rows: Sequence[dict] = ()) -> list[str]:
    """What ten thousand sequences cost beside the same tokens in a hundred."""
    found = {(case.head_dim, case.mask, case.label): case for case in times}
    lines = []
    for (head_dim, mask, label), tiny in found.items():
        if label != PER_SEQUENCE:
            continue
        long = found[head_dim, mask, IN_2K]
        time = times[tiny] / times[long]
        per_flop = time / (tiny.visible_flops / long.visible_flops)
        lines.append(
            f"d{head_dim} {mask}: 10000 sequences of 1 to 40 tokens take {time:.2f}x the time of the same "
            f"tokens in sequences of 2048, {per_flop:.1f}x per visible FLOP"
        )
    return lines
