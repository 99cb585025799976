"""Which keys a CTA of the main kernel has, and which way queries pass it: plain arithmetic that also runs on Python
ints in the tests. How many heads are a section is the host's (planning/sections.py).

Blocks of keys of one head run next to one another, since they read the same Q and dO and add to the same dQ. Causal
ones differ in length: the first keys are seen by most queries and run first, within sections of heads.

Past a CTA go the last queries first, and of each block of queries one head of the group after the other: the same
sequence for all blocks of keys that a KV head has, of which causal ones stop at their diagonal. What a CTA brings to L2
is found there by those that are at the same queries, however many heads share the keys.

Dense causal blocks start together in the first section of a tile for each CTA, and are together: at the last queries.
They end one after the other, the last keys first; so those of the next section start one after the other, the longest
first. Were the last queries the first again, each block would be as far behind the one before it as it started later,
and all of them together spread over all queries of a section: 134 MB of Q, dO and dQ of 4 KV heads with 8 heads each
of 4096 queries. With the first queries first each starts, at its diagonal, where those before it have come to; they
end together, at the last queries, as the third section starts. So directions alternate: of 4 x 4096 queries of 64:8
heads of 128 columns 1.2 GB are read from memory where it were 8.6, and a call takes 5.5 ms instead of 6.3 (BF16,
causal, H200, 2026-11-30).

Deterministic: the CTAs add to a block of dQ in the order in which they took their keys; what one waits for is with a
CTA that runs, or done. Dense causal blocks of a section that share L2 are taken from the last keys on, and queries
pass each from its diagonal up: where they start together, a block of queries meets the keys at its diagonal first,
those before them a block of keys' queries later, and so on, which is the order in which they add: nobody waits. They
end one after the other, the first keys last, and in the next section the first keys start first, at the last queries:
each where the one before it was a block of keys' queries ago. Both sections together take as long for every CTA, and
the next two start together; where all were taken from the last keys on, the longest would start last: 16 heads of 16k
queries of 128 columns take 1.07 times as long, by a count of steps. Others start one after the other, in the first
section by waiting.
"""
from cutlass import Int32

from ...planning.sections import CTAS
from ..common.arithmetic import ceil_div, maximum, minimum


def rises(index: Int32, num_tiles: Int32) -> Int32:
    """1 if the first queries pass first, at a place of an order with num_tiles in each section: in every other wave of
    about a tile for each CTA; a section has a whole number of waves."""
    waves = maximum((num_tiles + CTAS // 2) // CTAS, 1)
    section = index // num_tiles
    wave = minimum((index - section * num_tiles) // CTAS, waves - 1)
    return (section * waves + wave) % 2


def rises_in_order(index: Int32, num_in_section: Int32, num_tiles: Int32) -> Int32:
    """The same of deterministic tiles, of sections with so many places: in every other one, not in the last."""
    return (ceil_div(num_tiles, num_in_section) - 1 - index // num_in_section) % 2
