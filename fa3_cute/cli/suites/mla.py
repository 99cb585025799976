"""MLA decode: 16 heads, as of one of several GPUs, which reading K takes all the time of, and 128 heads of two queries
each, which arithmetic does; K in one piece and in pages of 64."""

from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import MLA_DIMS
from ..case import Case
from ..compared import versus_peers
from ..dtypes import DEFAULT
from ..latent import LatentCase
from ..shown import MEMORY, Shown, rate

TITLE = "MLA decode: 576 columns of Q and K, of which the first 512 of K are V"
_TFLOPS = (("TFLOP/s", 8, rate),)
SHOWN = Shown(printed=MEMORY.printed + _TFLOPS, markdown=MEMORY.markdown + _TFLOPS, peer=MEMORY.peer)
FIXED = ("head_dim", "seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
CONTIGUOUS, PAGE = 0, 64
# Sequences, queries and keys of each, heads.
PROBLEMS = (
    (1, 1, 4096, 16),
    (16, 1, 4096, 16),
    (128, 1, 4096, 16),
    (1, 1, 65536, 16),
    (1, 1, 4096, 128),
    (32, 2, 4096, 128),
)


def cases(args) -> list[Case]:
    """Each problem without pages and with them."""
    found: list[Case] = []
    for batch_size, queries, seqlen, num_heads in PROBLEMS:
        dense = LatentCase(
            dtype=args.dtype or DEFAULT,
            head_dim=MLA_DIMS[0],
            is_causal=queries > 1,
            seqlen_q=queries,
            seqlen_k=seqlen,
            batch_size=batch_size,
            num_heads=num_heads,
            num_heads_k=1,
            label=f"{batch_size}x({queries}:{seqlen})",
            l2="warm",
            page_size=CONTIGUOUS,
        )
        lengths = {"lengths": (queries,) * batch_size, "lengths_k": (seqlen,) * batch_size}
        found += [dense, replace(dense, page_size=PAGE, **lengths)]
    return found


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster."""
    return versus_peers(rows)
