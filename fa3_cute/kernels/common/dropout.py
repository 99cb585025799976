"""Dropout of P, in the registers in which PV reads it. contract/dropout.py says which probabilities are dropped.

Row sums and LSE are of all keys: P is dropped behind the softmax, once it is converted, and what is kept is divided by
the probability to keep in the row's last factor. A word of 4 random bytes and a word of 4 numbers to drop are added
without carries between bytes; the carry out of a byte, its top bit, says that its probability is dropped. A byte
permutation widens top bits to masks of 16 bits, or of 8 in FP8: per probability 0.5 or 0.25 of it, and as much of an
and, 0.75 for the sum, and of Philox 1/16 of 40 instructions.

A thread's two rows of 16 keys are half of what one call of Philox decides. Tiles start at multiples of 16 keys: where
tile_n is no multiple of 32, half of a call is of the tile before or after, and selections find the thread's words.
Where heads are packed the two rows are of other heads or queries, and each takes half of its own calls.
"""
from dataclasses import dataclass
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Uint32, Uint64

from ...contract.dropout import BLOCK_KEYS, counter_of, key_of, philox
from ...planning.config import KernelConfig
from .arithmetic import maximum, minimum
from .tiles import Place

GROUP_KEYS = 16              # that one step of PV's WGMMA takes in 16 bit, half a step in FP8
LOW_BITS = 0x7F7F7F7F
WIDENED = {False: (0x9988, 0xBBAA), True: (0xBA98,)}     # by is_fp8: a word's top bits as masks of its probabilities


@dataclass(frozen=True)
class Dropout:
    """What is constant over a launch.

    rng_state     (2,) u64: seed, offset
    num_dropped   of 256, in each of the 4 bytes
    keep_factor   1 / probability to keep
    """
    rng_state: cute.Tensor
    num_dropped: Uint32
    keep_factor: Float32

    @staticmethod
    def create(cfg: KernelConfig, a) -> Optional["Dropout"]:
        """From a kernel's arguments, on the host; None unless cfg.has_dropout. As contract.dropout.num_dropped."""
        if not cfg.has_dropout:
            return None
        num = minimum(maximum(Int32(a.p_dropout * 256.0 + 0.5), 1), 255)
        return Dropout(cute.make_tensor(a.rng_state, cute.make_layout(2)), Uint32(num) * Uint32(0x01010101),
                       256.0 / Float32(256 - num))

    def start(self, cfg: KernelConfig, num_rows: int) -> "RowDropout":
        """Of one consumer thread. Reads device memory."""
        key = key_of(self.rng_state[0], self.rng_state[1], Uint32, Uint64)
        heads = cute.make_rmem_tensor(num_rows, Int32) if cfg.packs_heads else None
        return RowDropout(cfg, *(Uint32(cute.arch.make_warp_uniform(Int32(half))) for half in key), self.num_dropped,
                          self.keep_factor, heads)


@dataclass(frozen=True)
class RowDropout:
    """Of the rows of one thread.

    key0, key1   Philox's key
    heads        of each row, set for each tile of O; None unless cfg.packs_heads
    """
    cfg: Constexpr
    key0: Uint32
    key1: Uint32
    num_dropped: Uint32
    keep_factor: Float32
    heads: Optional[cute.Tensor]

    def apply(self, P: cute.Tensor, place: Place):
        """0 for what is dropped of one K/V tile. P: compact, in the order of PV's A operand."""
        words = cute.recast_tensor(cute.coalesce(P), Uint32)
        # P is never negative, which the compiler does not know: in FP8 it draws once P is converted and S's registers
        # are free, not before. Else kernels spill, such as those of 192x160 tiles at head_dim 96. The word is of the
        # first of the two rows: where the second does not exist, what should be its P has any sign.
        zero = words[cute.size(words) - 2] >> 31 if self.cfg.is_fp8 else Uint32(0)
        for group, flags in enumerate(self.flags(place, zero)):
            for r in range(2):
                self.drop(words, group, r, flags[r])

    def flags(self, place: Place, zero: Uint32) -> list[tuple[Uint32, Uint32]]:
        """Of each 16 keys of a tile, for the thread's two rows: in a word's four top bits, whether a probability is
        dropped. The other bits are anything. Not before `zero` is known."""
        to_query, first_key = place.tile.seqlen_q - place.tile.seqlen_k, Uint32(place.first_key)
        first, second = (Uint32(diagonal + to_query) + zero for diagonal in place.diagonals)
        groups = range(self.cfg.tile_n // GROUP_KEYS)
        if not self.cfg.packs_heads:
            draws = self.draws(first, first_key, place.tile.head, place)
            return [self.dropped_of(draws, group, first_key) for group in groups]
        rows = []
        for query, head in ((first, self.heads[0]), (second, self.heads[1])):
            draws, is_second = self.draws(query, first_key, head, place), query // 8 % 2 == 1
            pairs = [self.dropped_of(draws, group, first_key) for group in groups]
            rows.append([select(is_second, high, low) for low, high in pairs])
        return list(zip(*rows, strict=True))

    def draws(self, query: Uint32, first_key: Uint32, head: Int32, place: Place) -> list[tuple]:
        """The calls of Philox that have a part in a tile, in order of keys."""
        first, rows = counter_of(query, first_key)
        num_calls = (self.cfg.tile_n + BLOCK_KEYS - 1) // BLOCK_KEYS
        return [philox((first + 4 * i, rows, Uint32(head), Uint32(place.tile.sequence)), (self.key0, self.key1),
                       Uint32, Uint64) for i in range(num_calls)]

    def dropped_of(self, draws: list[tuple], group: int, first_key: Uint32) -> tuple[Uint32, Uint32]:
        """Flags of the tile's group-th 16 keys: of a query of the first 8 of 16, and of one of the second 8."""
        half = group % 2
        words = draws[group // 2][2 * half:2 * half + 2]
        if self.cfg.tile_n % BLOCK_KEYS != 0:
            is_odd = first_key // GROUP_KEYS % 2 == 1
            others = draws[(group + 1) // 2][2 - 2 * half:4 - 2 * half]
            words = [select(is_odd, other, word) for other, word in zip(others, words, strict=True)]
        return tuple(self.dropped(word) for word in words)

    def dropped(self, word: Uint32) -> Uint32:
        """The flags of a random word: a byte that is at least 256 - num_dropped carries when it is added."""
        low = (word & LOW_BITS) + (self.num_dropped & LOW_BITS)
        return (word & self.num_dropped) | (low & (word | self.num_dropped))

    def drop(self, words: cute.Tensor, group: int, r: int, flags: Uint32):
        """Clear what is dropped among the P of row r and the tile's group-th 16 keys."""
        selections = WIDENED[self.cfg.is_fp8]
        for i, selection in enumerate(selections):
            index = 2 * (len(selections) * group + i) + r
            words[index] = words[index] & ~Uint32(cute.arch.prmt(flags, flags, selection))


def select(condition: Boolean | bool, if_true: Uint32, if_false: Uint32) -> Uint32:
    """One of two words, for run-time conditions and, in the tests, for Python's."""
    if isinstance(condition, bool):
        return if_true if condition else if_false
    return Uint32(cutlass.select_(condition, if_true, if_false))
