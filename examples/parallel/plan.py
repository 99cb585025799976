"""Which rank holds which rows, and which attention calls it makes. Pure Python: no arrays, no GPU.

Zigzag: a sequence is cut into 2 P chunks of c rows, and rank r of P holds chunks r and 2 P - 1 - r: of a causal mask's
triangle every rank then has the same area. A rank's rows are, sequence by sequence, its low chunk and its high chunk.
Tensors are [heads, rows, head_dim], heads outermost: a chunk of a head, and all of a few heads, are each one piece of
memory.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple


@dataclass(frozen=True)
class Problem:
    """One layer's attention over all ranks.

    seqlens   rows of each sequence; one: a dense call, more: packed
    window    keys to the left that a query sees, besides its own; None: all. Implies that it sees none to the right
    dtype     "fp16", "bf16" or "fp8_e4m3"
    """

    seqlens: tuple[int, ...]
    num_ranks: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    is_causal: bool = True
    window: int | None = None
    dtype: str = "bf16"

    def __post_init__(self):
        multiple = 2 * self.num_ranks
        for length in self.seqlens:
            if length < 1 or length % multiple:
                raise ValueError(f"seqlens={self.seqlens}: must be multiples of 2 * num_ranks = {multiple}; pad them")

    @property
    def chunks(self) -> tuple[int, ...]:
        """Rows of a chunk of each sequence."""
        return tuple(length // (2 * self.num_ranks) for length in self.seqlens)

    @property
    def total(self) -> int:
        return sum(self.seqlens)

    @property
    def rows(self) -> int:
        """That a rank holds."""
        return self.total // self.num_ranks

    @property
    def is_masked(self) -> bool:
        """Queries do not see all keys: a chunk's key length then says where its diagonal ends."""
        return self.is_causal or self.window is not None

    def pieces(self, rank: int) -> list["Piece"]:
        """The chunks of a rank, in the order in which it holds them."""
        found, start, local = [], 0, 0
        for length, rows in zip(self.seqlens, self.chunks, strict=True):
            for chunk in (rank, 2 * self.num_ranks - 1 - rank):
                found.append(Piece(local, start + chunk * rows, rows))
                local += rows
            start += length
        return found

    def flops(self) -> float:
        """Of the forward pass of all ranks: 4 head_dim for each query head, query and key that it sees."""
        if not self.is_masked:
            seen = sum(length**2 for length in self.seqlens)
        else:
            reach = [length if self.window is None else min(length, self.window + 1) for length in self.seqlens]
            seen = sum(
                width * length - width * (width - 1) / 2 for length, width in zip(self.seqlens, reach, strict=True)
            )
        return 4.0 * self.num_heads * self.head_dim * seen


class Piece(NamedTuple):
    """Rows that follow one another both where a rank holds them and among those of all ranks."""

    local: int
    whole: int
    rows: int


@dataclass(frozen=True)
class Call:
    """One call of `forward`, or of `backward`.

    first_q        the call's first row among the rank's; the rows before are in no sequence of the call
    rows_q         rows of q from there on, of all sequences of the call
    seqlen_q, _k   of a dense call; 0: packed
    shares_keys    every sequence of a dense call sees the same keys, from the first on (k_batch_stride = 0)
    lengths        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, those that the call has
    """

    batch: int
    first_q: int
    rows_q: int
    rows_k: int
    is_masked: bool
    seqlen_q: int = 0
    seqlen_k: int = 0
    shares_keys: bool = False
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        return not self.seqlen_q

    @property
    def key_gradients(self) -> int:
        """How many dk and dv it writes: one for each sequence that has the keys of others too."""
        return self.batch if self.shares_keys else 1


def gathered_calls(problem: Problem, rank: int) -> list[Call]:
    """A rank's queries over all keys in their order: one call; two, of the low and of the high chunks, if packed and
    masked, since a packed call cannot give the same keys to two of its sequences."""
    (low, *_), (high, *_) = used = [tuple(n * rows for rows in problem.chunks) for n in _ends(problem, rank)]
    if len(problem.seqlens) == 1:
        if not problem.is_masked:
            return [_dense(0, problem.rows, problem.total, False)]
        (chunk,) = problem.chunks
        lengths = {"seqused_k": (low, high)}
        return [Call(2, 0, 2 * chunk, problem.total, True, chunk, problem.total, True, lengths)]
    keys = {"cu_seqlens_k": _offsets(problem.seqlens)}
    if not problem.is_masked:
        return [_packed(problem, False, problem.total, keys)]
    return [_packed(problem, True, problem.total, keys | {"seqused_k": used[half]}, half=half) for half in (0, 1)]


def ring_call(problem: Problem, rank: int, source: int) -> Call:
    """A rank's queries over the keys that another one holds, or its own.

    Causal: of an earlier rank's keys the low chunk is before both of the queries' chunks and the high chunk behind;
    of a later rank's keys both are before the high chunk of the queries and behind the low one.
    """
    is_own = source == rank
    half = 1 if problem.is_causal and source > rank else None
    has_half_of_keys = problem.is_causal and source < rank
    if len(problem.seqlens) == 1:
        first = problem.chunks[0] if half else 0
        keys = problem.chunks[0] if has_half_of_keys else problem.rows
        return _dense(first, problem.rows - first, keys, problem.is_causal and is_own)
    keys = {"cu_seqlens_k": _offsets(2 * rows for rows in problem.chunks)}
    if has_half_of_keys:
        keys["seqused_k"] = problem.chunks
    return _packed(problem, problem.is_causal and is_own, problem.rows, keys, half)


def whole_call(problem: Problem) -> Call:
    """All queries over all keys."""
    if len(problem.seqlens) == 1:
        return _dense(0, problem.total, problem.total, problem.is_masked)
    offsets = _offsets(problem.seqlens)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    return Call(len(problem.seqlens), 0, problem.total, problem.total, problem.is_masked, lengths=lengths)


def _ends(problem: Problem, rank: int) -> tuple[int, int]:
    """Chunks up to the end of a rank's low and high ones."""
    return rank + 1, 2 * problem.num_ranks - rank


def _dense(first: int, rows: int, keys: int, is_masked: bool) -> Call:
    return Call(1, first, rows, keys, is_masked, rows, keys)


def _packed(problem: Problem, is_masked: bool, rows_k: int, keys: dict, half: int | None = None) -> Call:
    """A packed call of a rank's low chunks (half 0), high chunks (1), or both."""
    ends = _offsets(2 * rows for rows in problem.chunks)
    first = problem.chunks[0] if half else 0
    starts = [start + (half or 0) * rows for start, rows in zip(ends[:-1], problem.chunks, strict=True)]
    lengths = {"cu_seqlens_q": tuple(start - first for start in (*starts, ends[-1])), **keys}
    if half is not None:  # between the chunks of a half lie those of the other one
        lengths["seqused_q"] = problem.chunks
    return Call(len(problem.seqlens), first, problem.rows - first, rows_k, is_masked, lengths=lengths)


def _offsets(lengths) -> tuple[int, ...]:
    return (0, *accumulate(lengths))
