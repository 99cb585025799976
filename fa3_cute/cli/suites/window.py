"""Sliding windows in long sequences, beside the causal mask: only tiles that the band touches may cost time."""

from collections.abc import Sequence
from dataclasses import replace

from ...planning.tables import forward_config
from ..case import Case
from ..dtypes import out_dtype_of
from ..shown import ARITHMETIC
from . import prefill

TITLE = "Sliding windows, 16384 tokens"
SHOWN = ARITHMETIC
FIXED = ("masks",)
HEAD_DIMS = (64, 128)
SEQLENS = (16384,)
WINDOWS = ((1024, 0), (512, 512))  # (left, right): as models use it under a causal mask, and symmetric


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then length, then mask; causal, which they go
    by, first."""
    return [
        prefill.case(args, head_dim, seqlen, is_causal, window)
        for head_dim in args.head_dim or HEAD_DIMS
        for seqlen in args.seqlen or SEQLENS
        for is_causal, window in ((True, (-1, -1)), *((False, window) for window in WINDOWS))
    ]


def conclusions(times: dict[Case, float], rows: Sequence[dict] = ()) -> list[str]:
    """The time of each causal window over what its share of the causal mask's tiles would take."""
    lines = []
    for case, time in times.items():
        if case.window[1] != 0:
            continue
        causal = replace(case, is_causal=True, window=(-1, -1))
        share = visible_tiles(case) / visible_tiles(causal)
        lines.append(
            f"{case.name}: {time / (share * times[causal]):.2f}x the time of its tiles at the causal rate "
            f"({share:.1%} of the causal tiles, {time / times[causal]:.1%} of the causal time)"
        )
    return lines


def visible_tiles(case: Case) -> int:
    """Tiles of one head that hold a visible score, in the causal kernel's tiling, whichever mask it is."""
    cfg = forward_config(
        case.dtype,
        case.head_dim,
        "causal",
        has_lse=False,
        is_varlen=False,
        out_dtype=out_dtype_of(case.dtype),
    )
    left, right = case.visible_bounds
    tiles = 0
    for first_row in range(0, case.seqlen_q, cfg.tile_m):
        last_row = min(first_row + cfg.tile_m, case.seqlen_q) - 1
        first_diagonal, last_diagonal = (row + case.seqlen_k - case.seqlen_q for row in (first_row, last_row))
        start = 0 if left < 0 else max(0, first_diagonal - left)
        stop = case.seqlen_k if right < 0 else min(case.seqlen_k, last_diagonal + right + 1)
        tiles += max(0, -(-stop // cfg.tile_n) - start // cfg.tile_n) if stop > start else 0
    return tiles
