"""FP8 E4M3: dense prefill, one grouped problem, and packed sequences, beside our own BF16 kernel.

The grid is prefill's at four lengths, the packed sequences are varlen's; --seqlen leaves only dense MHA, at these
lengths. Other suites run in FP8 with --dtype fp8_e4m3.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import FP8, FP8_HEAD_DIMS
from ..case import Case
from ..compared import versus_16_bit, versus_peers
from ..shown import ARITHMETIC
from . import prefill
from . import varlen

TITLE = "FP8 E4M3, dense and packed"
SHOWN = ARITHMETIC
FIXED = ("dtype", "batch_size", "num_heads", "num_heads_k")
SEQLENS = (512, 1024, 4096, 16384)
WIDE = 128  # the head_dim of the problems that are not dense MHA
GROUPED_HEADS, GROUPED_SEQLEN = (64, 8), 8192
PACKED = ("256+512+128", "8x2048", "64 of 64..4096", "16384+64x128")  # of varlen


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: dense by head_dim, mask and length, then grouped, then packed."""
    head_dims = args.head_dim or FP8_HEAD_DIMS
    chosen = Namespace(**vars(args) | {"dtype": FP8, "head_dim": head_dims, "seqlen": args.seqlen or SEQLENS})
    found = prefill.cases(chosen)
    if args.seqlen or WIDE not in head_dims:
        return found
    num_heads, num_heads_k = GROUPED_HEADS
    found += [
        Case(FP8, WIDE, is_causal, GROUPED_SEQLEN, GROUPED_SEQLEN, 1, num_heads, num_heads_k)
        for is_causal in args.masks or (False, True)
    ]
    packed = varlen.cases(Namespace(**vars(chosen) | {"head_dim": [WIDE]}))
    return found + [replace(case, label=f"packed {case.label}") for case in packed if case.label in PACKED]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster, and in which our own BF16 kernel."""
    return versus_peers(rows) + versus_16_bit(rows)
