"""Decode: one query per sequence and its whole K and V to read; a single small problem, a full GPU, and in between."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..case import Case
from ..compared import versus_16_bit, versus_peers
from ..dtypes import DEFAULT, head_dims
from ..shown import MEMORY, OURS

TITLE = "Decode, one query per sequence"
SHOWN = MEMORY
FIXED = ("seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
LARGE_BYTES = 250_000_000  # of K and V: from there on, reading them is all that should take time

Problems = dict[int, tuple[tuple[int, int, int, int], ...]]
# Sequences, keys in each, query heads, KV heads, by head_dim.
PROBLEMS: Problems = {
    64: ((16, 8192, 16, 2), (64, 8192, 32, 8)),
    96: ((16, 8192, 16, 2),),
    128: (
        (1, 2048, 16, 2),
        (4, 2048, 16, 2),
        (1, 32768, 16, 2),
        (1, 131072, 16, 2),
        (16, 8192, 16, 2),
        (64, 4096, 16, 1),
        (64, 8192, 32, 8),
    ),
    192: ((16, 8192, 16, 2),),
    256: ((16, 8192, 16, 2), (32, 8192, 32, 8)),
}


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then problem, then warm and cold."""
    return steps(args, args.head_dim or filter(head_dims(args.dtype).__contains__, PROBLEMS), PROBLEMS)


def steps(args, head_dims: Iterable[int], problems: Problems, kv_dtype: str | None = None) -> list[Case]:
    """The problems of these head dims, with one query per sequence."""
    return [
        Case(
            dtype=args.dtype or DEFAULT,
            head_dim=head_dim,
            is_causal=False,
            seqlen_q=1,
            seqlen_k=seqlen,
            batch_size=batch_size,
            num_heads=num_heads,
            num_heads_k=num_heads_k,
            l2=l2,
            kv_dtype=kv_dtype,
        )
        for head_dim in head_dims
        for batch_size, seqlen, num_heads, num_heads_k in problems.get(head_dim, ())
        for l2 in ("warm", "cold")
    ]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster, and how near to a copy the large problems come."""
    shares = {}
    for case, row in zip(times, rows, strict=True):
        if case.kv_bytes > LARGE_BYTES:
            shares.setdefault(replace(case, l2=""), []).append(f"{row['results'][OURS]['of_copy']:.1%} {case.l2}")
    lines = versus_peers(rows) + versus_16_bit(rows)
    return lines + [
        f"{case.name}: {case.kv_bytes / 1e9:.2f} GB of K and V, at {' and '.join(found)} of the bandwidth "
        "of a copy on the device"
        for case, found in shares.items()
    ]
