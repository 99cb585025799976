"""MLA decode: 16 heads, as of one of several GPUs, which reading K takes all the time of, and 128 heads of two queries
each, which arithmetic does; K in one piece and in pages of 64, and twice with Q and K in two parts (q_v). Heads of 512:
one query over 1 GiB of K and V."""

from collections.abc import Sequence
from dataclasses import replace

from ...contract.formats import LARGE_DIM, MLA_DIMS
from ..case import Case
from ..compared import versus_peers
from ..dtypes import DEFAULT
from ..latent import LatentCase
from ..shown import MEMORY, Shown, rate

TITLE = "MLA decode: 576 columns of Q and K, of which the first 512 of K are V; and heads of 512"
_TFLOPS = (("TFLOP/s", 8, rate),)
SHOWN = Shown(
    printed=MEMORY.printed + _TFLOPS,
    markdown=MEMORY.markdown + _TFLOPS,
    peer=MEMORY.peer,
    problem=(("type", "dtype"), ("head_dim", "dims"), ("heads", "heads"), ("sequences", "layout")),
)
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
IN_PARTS = (PROBLEMS[2], PROBLEMS[5])
# Of heads of 512: sequences, keys of each, heads of Q and of K.
LARGE_PROBLEMS = ((64, 8192, 8, 1), (32, 4096, 32, 4))


def cases(args) -> list[Case]:
    """Each problem without pages and with them."""
    dtype = args.dtype or DEFAULT
    found: list[Case] = []
    for problems, is_in_parts in ((PROBLEMS, False), (IN_PARTS, True)):
        for batch_size, queries, seqlen, num_heads in problems:
            found += in_both_places(
                LatentCase(
                    dtype=dtype,
                    head_dim=MLA_DIMS[0],
                    is_causal=queries > 1,
                    seqlen_q=queries,
                    seqlen_k=seqlen,
                    batch_size=batch_size,
                    num_heads=num_heads,
                    num_heads_k=1,
                    label=f"{batch_size}x({queries}:{seqlen})",
                    l2="warm",
                    in_parts=is_in_parts,
                )
            )
    for batch_size, seqlen, num_heads, num_heads_k in LARGE_PROBLEMS:
        sizes = (1, seqlen, batch_size, num_heads, num_heads_k)
        found += in_both_places(Case(dtype, LARGE_DIM, False, *sizes, label=f"{batch_size}x(1:{seqlen})", l2="warm"))
    return found


def in_both_places(case: Case) -> list[Case]:
    """The case with K in one piece, and in pages."""
    lengths = {"lengths": (case.seqlen_q,) * case.batch_size, "lengths_k": (case.seqlen_k,) * case.batch_size}
    return [replace(case, page_size=CONTIGUOUS), replace(case, page_size=PAGE, **lengths)]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster."""
    return versus_peers(rows)
