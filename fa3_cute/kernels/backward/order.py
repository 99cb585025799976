"""Which keys a CTA of the main kernel has, and which way queries pass it: plain arithmetic that also runs on Python
ints in the tests.

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
those before them a block of keys' queries later, and so on, which is the order in which they add: nobody waits. Others
start one after the other, in the first section by waiting: without a mask in sections of one wave, which are all
alike, else a few Q tiles apart in larger sections.
"""
from cutlass import Int32

from ..common.arithmetic import ceil_div, maximum, minimum

L2_BYTES = 32 << 20      # of 50 MB
BYTES_PER_VALUE = 8      # Q, dO, and dQ in FP32
MIN_TILES = 128          # of keys: about one for each CTA, of which an H100 and an H200 have 132
STEPS_APART = 3          # Q tiles between the starts of neighbouring tiles of keys, deterministic: by a model, in which
                         # passing a turn on takes two; no other number was measured


def rows_in_l2(head_dim: int) -> int:
    """Of Q, dO and dQ."""
    return L2_BYTES // (BYTES_PER_VALUE * head_dim)


def heads_per_section(num_heads: Int32, group: Int32, seqlen_q: Int32, head_dim: int, num_blocks: Int32,
                      least: Int32 = 1) -> Int32:
    """KV heads, of any batch entry, whose Q, dO and dQ share L2, in sections of about equal size; `least` at least.

    Sections of fewer tiles than MIN_TILES leave CTAs idle at the end of a launch: of 32 tiles, where 8 heads share K
    and V of 4096 keys, 13 % of the time of 4 causal sequences of 64 heads, if a tile takes as long as it has Q tiles
    (of 128, 1 %).
    """
    most = rows_in_l2(head_dim) // maximum(seqlen_q * group, 1)
    most = minimum(maximum(maximum(most, ceil_div(MIN_TILES, maximum(num_blocks, 1))), least), num_heads)
    return ceil_div(num_heads, ceil_div(num_heads, most))


def heads_in_waves(num_heads: Int32, num_blocks: Int32, num_ctas: Int32) -> Int32:
    """KV heads, of any batch entry, in sections of about equal size and about one tile for each CTA, if a head has not
    more."""
    most = maximum((num_ctas + num_blocks // 2) // maximum(num_blocks, 1), 1)
    return ceil_div(num_heads, ceil_div(num_heads, minimum(most, num_heads)))


def rises(index: Int32, num_tiles: Int32, num_ctas: Int32) -> Int32:
    """1 if the first queries pass first, at a place of an order with num_tiles in each section: in every other wave of
    about a tile for each CTA; a section has a whole number of waves."""
    waves = maximum((num_tiles + num_ctas // 2) // num_ctas, 1)
    section = index // num_tiles
    wave = minimum((index - section * num_tiles) // num_ctas, waves - 1)
    return (section * waves + wave) % 2


def heads_apart(group: Int32, num_q_blocks: Int32, num_ctas: Int32, is_causal: bool) -> Int32:
    """In sections of so many heads a tile of keys starts STEPS_APART Q tiles behind the one before it, if CTAs start
    one after the other: what that one has added to dQ it then need not wait for."""
    return ceil_div(STEPS_APART * num_ctas * (2 if is_causal else 1), maximum(num_q_blocks * group, 1))
