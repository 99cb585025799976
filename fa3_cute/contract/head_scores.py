"""What becomes of the scores of one head of one sequence, and which keys its rows see: part of reference.py, which says
what every option means. NumPy only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .dropout import effective_p
from .number_formats import as_float
from .philox import keep_mask


class Lengths(NamedTuple):
    """`info` of a score_mod or mask_mod: the used lengths of the sequence."""

    n_q: int
    n_k: int


@dataclass(frozen=True)
class HeadScores:
    """The options as one head of one sequence has them; what is off is None or 0.

    place        batch, head: numbers of the sequence and of the query head
    n_q, n_k     used lengths
    leftpad      first keys that do not exist
    window       (left, right) around the diagonal; negative is unbounded
    sink         logit of one more key, of value 0
    slope        of ALiBi
    bias         [n_q, n_k] added to the scores, -inf hides; or bool, False hides
    """

    place: tuple[int, int]
    n_q: int
    n_k: int
    window: tuple[int, int]
    leftpad: int = 0
    attention_chunk: int = 0
    softcap: float = 0.0
    sink: float | None = None
    slope: float = 0.0
    bias: np.ndarray | None = None
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    p_dropout: float = 0.0
    rng_state: tuple[int, int] = (0, 0)

    def seen_keys(self, rows: slice) -> tuple[np.ndarray | None, slice]:
        """(seen, keys): which of these rows sees which of these keys (None: all see all), and the keys' slice."""
        (left, right), chunk, n_k, pad = self.window, self.attention_chunk, self.n_k, self.leftpad
        first, last = self.diagonal(rows.start), self.diagonal(rows.stop - 1)
        start, stop = first - left if left >= 0 else 0, last + right + 1 if right >= 0 else n_k
        if chunk:
            begin, end = ((first - pad) // chunk * chunk + pad, ((last - pad) // chunk + 1) * chunk + pad)
            start, stop = max(start, begin), min(stop, end)
        start = min(max(start, pad), n_k)
        keys = slice(start, max(min(stop, n_k), start))
        queries, columns = self.indices(rows, keys)
        diagonals, seen = self.diagonal(queries), True
        if right >= 0:
            seen = columns <= diagonals + right
        if left >= 0:
            seen = seen & (columns >= diagonals - left)
        if chunk:
            seen = seen & ((columns - pad) // chunk == (diagonals - pad) // chunk)
        if self.mask_mod is not None:
            seen = seen & np.asarray(self.mask_mod(*self.place, queries, columns, Lengths(self.n_q, n_k))).astype(bool)
        if self.bias is not None:
            bias = self.bias[rows, keys]
            seen = seen & (bias if bias.dtype == bool else bias != -np.inf)
        return None if seen is True else np.broadcast_to(seen, (len(queries), columns.size)), keys

    def diagonal(self, query):
        """The key that a query is aligned with."""
        return query + self.n_k - self.n_q

    def indices(self, rows: slice, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of these queries and keys, which broadcast to [rows, keys]."""
        return np.arange(rows.start, rows.stop)[:, None], np.arange(keys.start, keys.stop)[None, :]

    def transformed(self, scores: np.ndarray, rows: slice, keys: slice) -> np.ndarray:
        """The scores after softcap, bias and score_mod, in their dtype; of keys that are not seen anything."""
        kind = scores.dtype.type
        if self.softcap:
            scores = kind(self.softcap) * np.tanh(scores / kind(self.softcap))
        if self.bias is not None and self.bias.dtype != bool:
            scores = scores + self.bias[rows, keys].astype(kind)
        if self.slope or self.score_mod is not None:
            queries, columns = self.indices(rows, keys)
            if self.slope:
                scores = scores - kind(self.slope) * np.abs(self.diagonal(queries) - columns).astype(kind)
            if self.score_mod is not None:
                info = Lengths(self.n_q, self.n_k)
                scores = np.array(self.score_mod(scores, *self.place, queries, columns, info), kind)
        return scores

    def with_sink(self, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """(LSE with the sink, share of the keys in the sum of exponentials)."""
        if self.sink is None:
            return lse, 1.0
        total = np.logaddexp(lse, self.sink)
        return total, np.exp(np.where(lse == -np.inf, -np.inf, lse - total))

    def dropped_out(self, p: np.ndarray, rows: slice, keys: slice) -> tuple[np.ndarray, float]:
        """(P without what dropout drops, what the rest is multiplied with)."""
        if not self.p_dropout:
            return p, 1.0
        batch, head = self.place
        kept = keep_mask(self.p_dropout, *self.rng_state, batch, head, rows, keys)
        return p * kept, 1.0 / (1.0 - effective_p(self.p_dropout))


def heads_of(options: Any, sizes: tuple[int, int, int, int]) -> Callable[..., HeadScores]:
    """A function (sequence, head, n_q, n_k, leftpad) -> HeadScores, of a call's options (reference.Options).

    sizes   batch, num_heads, and what attn_mask has: rows of a dense q, rows of k or the capacity of a cache

    Raises ValueError for arrays whose shapes do not fit.
    """
    batch, num_heads, *_ = sizes
    sinks = broadcast("s_aux", options.s_aux, (num_heads,))
    slopes = broadcast("alibi_slopes", options.alibi_slopes, (batch, num_heads))
    mask = broadcast("attn_mask", options.attn_mask, sizes)
    window = (-1, 0) if options.causal else tuple(options.window_size)
    seed, offset = (0, 0) if options.rng_state is None else (int(number) % 2**64 for number in options.rng_state)

    def head_scores(b: int, head: int, n_q: int, n_k: int, leftpad: int = 0) -> HeadScores:
        return HeadScores(
            place=(b, head + options.first_head),
            n_q=n_q,
            n_k=n_k,
            window=window,
            leftpad=leftpad,
            attention_chunk=options.attention_chunk,
            softcap=options.softcap or 0.0,
            sink=None if sinks is None else float(as_float(sinks[head], np.float64)),
            slope=0.0 if slopes is None else float(as_float(slopes[b, head], np.float64)),
            bias=None if mask is None else _bias(mask[b, head, :n_q, :n_k]),
            score_mod=options.score_mod,
            mask_mod=options.mask_mod,
            p_dropout=options.p_dropout or 0.0,
            rng_state=(seed, offset),
        )

    return head_scores


def broadcast(name: str, array: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array, which may be None, in this shape. Raises ValueError where it has none that fits."""
    if array is None:
        return None
    array = np.asarray(array)
    try:
        return np.broadcast_to(array, shape)
    except ValueError as error:
        raise ValueError(f"{name}.shape={array.shape}: must broadcast to {list(shape)}") from error


def _bias(mask: np.ndarray) -> np.ndarray:
    """A mask as numbers to add, or as bools: those of bytes."""
    return mask.astype(bool) if mask.dtype in (np.bool_, np.uint8) else as_float(mask, np.float64)
