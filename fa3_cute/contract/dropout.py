"""Which probabilities dropout drops: the arithmetic, for Python ints, NumPy arrays and registers alike. Pure Python.

A bit generator without state, Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3,
2011), maps a key of 2 words and a counter of 4 to 4 words of 32 bits. Key and counter follow from the seed, the offset
and the place of a probability alone, whatever tiles, splits and kernel make it:

    key       first two words of Philox of the counter (offset's low half, its high half, 0, 0), whose key is the seed
    counter   (4 (key / 32) + key % 8 / 2, 8 (query / 16) + query % 8, query head, sequence)
    word      of the four: 2 (key / 16 % 2) + query / 8 % 2
    byte      of the word, from its lowest: 2 (key / 8 % 2) + key % 2

One call thus decides over 2 queries, 8 apart, and 8 keys of a block of 16 x 32, with 8 bits each: what one thread holds
of such a block in a WGMMA accumulator with queries in rows, in the order in which it holds them. A probability is
dropped if its byte is at least 256 - n: n of 256 are, the rest is multiplied with 256 / (256 - n).
"""

import struct

BLOCK_QUERIES, BLOCK_KEYS = 16, 32  # of a block, whose bits are drawn together
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def word(number):
    """The low 32 bits of an integer or of an array of them."""
    return number & 0xFFFFFFFF


def philox(counter, key, narrow=word, widen=lambda number: number) -> tuple:
    """Four words from a counter of four and a key of two.

    narrow, widen   make 32 bits of 64, and 64 of 32, of the integers that the words are
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = (widen(multiplier) for multiplier in MULTIPLIERS)
    step0, step1 = (narrow(step) for step in KEY_STEPS)
    for i in range(ROUNDS):
        if i > 0:
            k0, k1 = narrow(k0 + step0), narrow(k1 + step1)
        first, second = widen(c0) * m0, widen(c2) * m1
        c0, c1 = narrow(second >> 32) ^ c1 ^ k0, narrow(second)
        c2, c3 = narrow(first >> 32) ^ c3 ^ k1, narrow(first)
    return c0, c1, c2, c3


def key_of(seed, offset, narrow=word, widen=lambda number: number) -> tuple:
    """The two words of a call's key, from 64 bits of seed and of offset."""
    zero = narrow(0)
    halves = [(narrow(number), narrow(number >> 32)) for number in (seed, offset)]
    return philox((*halves[1], zero, zero), halves[0], narrow, widen)[:2]


def counter_of(query, key) -> tuple:
    """The first two words of a counter."""
    return key // BLOCK_KEYS * 4 + key % 8 // 2, query // BLOCK_QUERIES * 8 + query % 8


def num_dropped(p_dropout: float) -> int:
    """n, of 256: the nearest to p_dropout in [0, 1), as float32; if it is not 0 some are dropped, and never all."""
    (nearest,) = struct.unpack("f", struct.pack("f", p_dropout))
    return min(max(int(256 * nearest + 0.5), 1), 255) if p_dropout else 0


def effective_p(p_dropout: float) -> float:
    """The probability to drop that `num_dropped` makes of it."""
    return num_dropped(p_dropout) / 256
