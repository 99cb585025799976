"""Which probabilities of a tile dropout drops, on the fragments of the kernels of one gradient (contract/dropout.py).

    dV += (kept P)^T dO                            times 1 / (1 - p) at the end
    dS  = P (kept dP / (1 - p) - D)

Where rows are queries, a thread's fragment is that of the forward kernel. Where they are keys, each call of Philox
decides over 2 keys and 2 queries of the thread's, and over 12 probabilities of other threads.
"""
from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Uint32, Uint64

from ...contract.dropout import counter_of, philox
from ..common.dropout import GROUP_KEYS, RowDropout, select
from ..common.layout import as_rows_cols
from ..common.visibility import Mask
from .visible import KeyMask


@dataclass(frozen=True)
class Dropped:
    """Of one tile.

    words       the flags: of rows that are queries, of each 16 columns and row a word with a column in each byte; of
                rows that are keys, of each column a word whose lower half is the first row's
    """
    is_of_queries: Constexpr
    words: tuple

    def has(self, r: int, c: int) -> Boolean:
        """Whether one is dropped."""
        if self.is_of_queries:
            word, bit = self.words[2 * (c // 4) + r], 8 * (c % 4) + 7
        else:
            word, bit = self.words[c], 16 * r + 7
        return word & Uint32(1 << bit) != Uint32(0)

    @cute.jit
    def apply(self, acc: cute.Tensor, factor: Float32):
        """0 for what is dropped, the rest times a factor, in place."""
        S = as_rows_cols(acc)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = Float32(0.0) if self.has(r, c) else S[r, c] * factor


def of_queries(dropout: RowDropout, mask: Mask, sequence: Int32, n_block: Int32) -> Dropped:
    """Of a K/V tile."""
    place = mask.place(n_block)
    place = replace(place, tile=replace(place.tile, sequence=sequence))
    return Dropped(True, tuple(word for pair in dropout.flags(place, Uint32(0)) for word in pair))


def of_keys(dropout: RowDropout, keys: KeyMask, place: tuple, m_block: Int32) -> Dropped:
    """Of a Q tile. place: (head, sequence)."""
    first_key, first_query = Uint32(keys.first_key), Uint32(m_block * keys.cfg.tile_m + keys.first_col)
    is_odd, odd_key = first_key // GROUP_KEYS % 2 == 1, first_key % 2
    rest = tuple(Uint32(number) for number in place)
    words = {}
    for group in range(keys.cfg.tile_m // 16):
        for odd in range(2):
            counter = counter_of(first_query + 16 * group + odd, first_key)
            drawn = philox((*counter, *rest), (dropout.key0, dropout.key1), Uint32, Uint64)
            for half in range(2):
                word = select(is_odd, drawn[2 + half], drawn[half])
                words[4 * group + 2 * half + odd] = dropout.dropped(word) >> 8 * odd_key
    return Dropped(False, tuple(words[c] for c in range(len(words))))
