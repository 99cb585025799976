"""Gradients: dense problems of the prefill suite's grid, deterministic ones beside them, forward and backward together;
packed sequences; query heads that share KV heads. With --seqlen dense problems of these lengths alone."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from types import SimpleNamespace

from ...contract.formats import HEAD_DIMS
from ..case import Case
from ..compared import timed, versus_peers
from ..dtypes import DEFAULT
from ..passes import BACKWARD, BOTH, DETERMINISTIC
from ..shown import ARITHMETIC, OURS
from . import prefill
from . import varlen

TITLE = "Backward, 16384 tokens in all"
SHOWN = replace(ARITHMETIC, problem=(*ARITHMETIC.problem, ("timed", "passes")))
FIXED = ("batch_size", "num_heads", "num_heads_k")
SEQLENS = (512, 2048, 4096, 16384)
# What is timed beside the backward pass, in the same rounds.
BESIDE = {2048: (DETERMINISTIC,), 4096: (BOTH,), 16384: (DETERMINISTIC, BOTH)}
# head_dim, seqlen, query heads, KV heads: causal, in the same rounds.
SHARED = (128, 4096, 64, (64, 8))


def cases(args) -> list[Case]:
    """Every case that the command line leaves in: by head_dim, then mask; dense, then packed, then shared heads."""
    dims = args.head_dim or HEAD_DIMS
    masks = args.masks or (False, True)
    by_mask = [(head_dim, is_causal) for head_dim in dims for is_causal in masks]
    found = [case for sizes in by_mask for seqlen in args.seqlen or SEQLENS for case in dense(args, *sizes, seqlen)]
    if args.seqlen:
        return found
    for head_dim, is_causal in by_mask:
        of_one = SimpleNamespace(**vars(args) | {"head_dim": [head_dim], "masks": [is_causal]})
        found += [packed(case) for case in varlen.cases(of_one)]
    return found + (shared_heads(args) if SHARED[0] in dims and True in masks else [])


def dense(args, head_dim: int, is_causal: bool, seqlen: int) -> list[Case]:
    """One problem, and what is timed in the same rounds."""
    case = prefill.case(args, head_dim, seqlen, is_causal)
    return [replace(case, passes=passes, group=case.name) for passes in (BACKWARD, *BESIDE.get(seqlen, ()))]


def packed(case: Case) -> Case:
    """A case of the varlen suite; one that is as if dense says that it is not."""
    is_as_dense = replace(case, label="").layout == case.label
    return replace(case, passes=BACKWARD, label=f"packed {case.label}" if is_as_dense else case.label)


def shared_heads(args) -> list[Case]:
    """The same query heads with as many KV heads, and with fewer. Timed together, both read the O and LSE of one."""
    head_dim, seqlen, num_heads, every_num_heads_k = SHARED
    first = Case(
        dtype=args.dtype or DEFAULT,
        head_dim=head_dim,
        is_causal=True,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        batch_size=max(1, prefill.TOKENS // seqlen),
        num_heads=num_heads,
        num_heads_k=num_heads,
        passes=BACKWARD,
        group="query heads that share KV heads",
    )
    return [replace(first, num_heads_k=num_heads_k) for num_heads_k in every_num_heads_k]


def conclusions(times: dict[Case, float], rows: Sequence[dict]) -> list[str]:
    """In which rows a peer is faster, by how much the better one is slower in the mean; what the same bits every time
    cost, and shared heads."""
    lines = versus_peers(rows) + mean_ratio(rows)
    firsts = {}
    for case, row in zip(times, rows, strict=True):
        first = firsts.setdefault(case.group, case.name) if case.group else case.name
        if first == case.name or case.passes == BOTH:
            continue
        theirs = {name: result["of_first"] for name, result in row["results"].items() if "of_first" in result}
        others = [f"{name} {ratio:.3f}x" for name, ratio in theirs.items() if name != OURS]
        lines.append(f"{case.name}: {', '.join([f'{theirs[OURS]:.3f}x', *others])} the time of {first}")
    return lines


def mean_ratio(rows: Sequence[dict]) -> list[str]:
    """The geometric mean of the better peer's time over ours; no line if there was no peer."""
    best = [min(result["ratio"] for result in timed(row).values()) for row in rows if timed(row)]
    if not best:
        return []
    return [f"the better peer takes {prod(best) ** (1 / len(best)):.3f}x our time, geometric mean of {len(best)} rows"]
