"""What an engine calls: packed queries over pages whose order is random. Decode, several queries per sequence, chunks
of prompts beside decodes, lengths far apart; beside our own call over contiguous K and V, where one can do the same."""

from collections.abc import Sequence
from dataclasses import replace

from ..case import Case
from ..compared import versus_16_bit, versus_peers
from ..dtypes import DEFAULT, head_dims
from ..shown import MEMORY, Shown, rate

TITLE = "Serving: packed queries over pages"
_TFLOPS = (("TFLOP/s", 8, rate),)
SHOWN = Shown(printed=MEMORY.printed + _TFLOPS, markdown=MEMORY.markdown + _TFLOPS, peer=MEMORY.peer)
FIXED = ("seqlen", "masks", "batch_size", "num_heads", "num_heads_k")
CONTIGUOUS = 0
DECODE_PAGES = (128, 64, 16, 8, 1)
MIXED_PAGES = (128, 64, 16)
MIXED_HEAD_DIM, MIXED_HEADS = 128, (32, 8)

# Sequences, keys in each, query heads, KV heads, by head_dim.
DECODES = {
    64: ((16, 4096, 64, 8),),
    128: (
        (1, 4096, 32, 8),
        (16, 4096, 32, 8),
        (64, 4096, 32, 8),
        (128, 2048, 32, 8),
        (32, 8192, 64, 8),
        (4, 2048, 16, 2),
        (1, 32768, 16, 2),
        (1, 131072, 8, 1),
    ),
    256: ((16, 4096, 8, 4),),
}
SKEWED = tuple(128 + index * 4095 // 254 for index in range(255))

# Label: queries of each sequence, keys of each; in order, as they are packed.
BATCHES = {
    "4 chunks of 512 on 8k": ((512,) * 4, (8192,) * 4),
    "a chunk of 2048 on 16k": ((2048,), (16384,)),
    "64 decodes at 4k, 2 chunks of 1024 on 2k": ((1,) * 64 + (1024,) * 2, (4096,) * 64 + (2048,) * 2),
    "32 x 4 queries at 8k": ((4,) * 32, (8192,) * 32),
    "8 prompts of 2048": ((2048,) * 8, (2048,) * 8),
    "255 decodes at 128..4223, one at 32k": ((1,) * 256, (*SKEWED, 32768)),
    "63 decodes at 1k, one at 128k": ((1,) * 64, (1024,) * 63 + (131072,)),
}


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then problem, then pages."""
    found = []
    dims = head_dims(args.dtype)
    for head_dim in args.head_dim or filter(dims.__contains__, DECODES):
        for batch_size, seqlen, *heads in DECODES.get(head_dim, ()):
            label = f"decode {batch_size}x{seqlen}"
            found += problem(args, head_dim, heads, label, ((1,) * batch_size, (seqlen,) * batch_size), DECODE_PAGES)
        if head_dim == MIXED_HEAD_DIM:
            for label, lengths in BATCHES.items():
                found += problem(args, head_dim, MIXED_HEADS, label, lengths, MIXED_PAGES)
    return found


def problem(args, head_dim: int, heads: Sequence[int], label: str, lengths, page_sizes: Sequence[int]) -> list[Case]:
    """A batch over pages of each size, and before them over contiguous K and V if it is one dense or packed call.

    lengths   queries of each sequence, keys of each
    """
    queries, keys = lengths
    num_heads, num_heads_k = heads
    paged = Case(
        dtype=args.dtype or DEFAULT,
        head_dim=head_dim,
        is_causal=True,
        seqlen_q=max(queries),
        seqlen_k=max(keys),
        batch_size=len(queries),
        num_heads=num_heads,
        num_heads_k=num_heads_k,
        label=label,
        l2="warm",
        lengths=queries,
        lengths_k=keys,
    )
    found = [replace(paged, page_size=page_size) for page_size in page_sizes]
    if queries == keys:
        return [replace(paged, page_size=CONTIGUOUS, lengths_k=()), *found]
    if len(set(queries)) == len(set(keys)) == 1:
        # one query sees all keys: without the mask, as decode is called
        dense = replace(paged, page_size=CONTIGUOUS, lengths=(), lengths_k=(), is_causal=max(queries) > 1)
        return [dense, *found]
    return found


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster, and what pages cost: the time over that of contiguous K and V."""
    by_problem: dict[str, dict[int | None, float]] = {}
    for case, time in times.items():
        key = f"{case.dtype} d{case.head_dim} h{case.heads} {case.layout}"
        by_problem.setdefault(key, {})[case.page_size] = time
    lines = versus_peers(rows) + versus_16_bit(rows)
    for name, by_pages in by_problem.items():
        contiguous = by_pages.pop(CONTIGUOUS, None)
        if contiguous:
            costs = ", ".join(f"{time / contiguous:.3f}x with pages of {size}" for size, time in by_pages.items())
            lines.append(f"{name}: {costs} the time of contiguous K and V")
    return lines
