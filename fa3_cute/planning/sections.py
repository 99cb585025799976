"""Sections of heads whose blocks run side by side, and how many heads' sums of dQ have room at a time. Pure Python.

Blocks of rows run in the order of kernels/backward/order.py. A KV head of a batch entry, with its query heads, is a
*unit*; where lengths are on the device, a KV head of all sequences. A section is some units, of as many places in the
order each. dQ of a unit is finished some sections later (kernels/backward/duties.py): when all of its tiles are done,
or a CTA would wait for others. Then its sums are free for another unit: few have room at a time, which stay in L2.
"""

from typing import NamedTuple

from .backward import BackwardConfig
from .one_side import OneSideConfig, OneSidePass
from .pair import PairConfig
from .problem import ProblemShape

L2_BYTES = 32 << 20  # of 50 MB
BYTES_PER_VALUE = 8  # Q, dO, and dQ in FP32
MIN_TILES = 128  # of a section: about one for each CTA
CTAS = 132  # of a wave: the SMs of an H100 or H200. With others the order is no other, so that bits do not differ.
# Q tiles between the starts of neighbouring tiles of keys, of deterministic calls with a mask: by a model in which
# passing a turn on takes two.
STEPS_APART = 3
# Deterministic, of calls without a mask, blocks of keys start one after the other, each when the one before has added
# to the first Q tile. The fewer of a head run side by side the sooner all do; but the more heads do, the less L2 has of
# each. From so many blocks on a section has so many waves, and so many heads at least. Of 2048, 4096 and 16k queries,
# head_dim 64, calls then take 1.05 to 1.09, 1.03 to 1.06 and 1.01 to 1.06 of the time of the same call without order;
# with one wave 1.09, 1.06 and 1.4, with as many heads as L2 has room for 1.11, 1.09 and 1.04 (BF16, H200, 2026-11-30).
MANY_BLOCKS = 16
WAVES_IN_ORDER = 2
LEAST_HEADS_IN_ORDER = 3
MOST_IDLE = 1 / 8  # of the CTAs, in the last wave of a section that is to be full
MOST_HEADS_MORE = 3  # that a section takes for that
# (sections from a tile to the duty that belongs to it, further sections whose sums have room). A wave's longest tiles
# end two waves after its start, when they run first, or three, when they run last; of packed sequences later still.
# Pairs of sections, of which one runs each way, end together.
APART = {"waves": (1, 2), "pairs": (2, 2), "one after the other": (4, 4), "varlen": (2, 3)}
# Of tiles that CTAs share, by reasoning; sharing was measured, none of these by itself.
MOST_PARTS = 8  # of a tile: the last adds what the others have
LEAST_STEPS = 4  # Q tiles of a part
SHARING_STEPS = 4  # Q tiles that take as long as the start and the end of a part, and adding
MOST_SHARED_ROWS = 1 << 24  # of a sequence: products of Q tiles and pieces are int32
TAIL_PLACES = 8 * CTAS  # behind the last keys: duties of more places are not shared by heads


class Sections(NamedTuple):
    """Of a launch.

    heads       units of a section
    is_rising   deterministic causal tiles run from the last keys on, and the first queries pass them first: dense ones
                of every other section
    num_behind  places of the order between a tile and the duty that belongs to it
    num_slots   units whose sums of dQ have room at a time
    """

    heads: int
    is_rising: int
    num_behind: int
    num_slots: int


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for a >= 0, b > 0."""
    return -(-a // b)


def rows_in_l2(head_dim: int) -> int:
    """Of Q, dO and dQ."""
    return L2_BYTES // (BYTES_PER_VALUE * head_dim)


def heads_per_section(num_heads: int, group: int, seqlen_q: int, head_dim: int, num_blocks: int, least: int = 1) -> int:
    """Units whose Q, dO and dQ share L2, in sections of about equal size; `least` at least.

    Sections of fewer tiles than MIN_TILES leave CTAs idle at the end of a launch: of 32 tiles, where 8 heads share K
    and V of 4096 keys, 13 % of the time of 4 causal sequences of 64 heads, if a tile takes as long as it has Q tiles
    (of 128, 1 %).
    """
    most = rows_in_l2(head_dim) // max(seqlen_q * group, 1)
    most = max(most, ceil_div(MIN_TILES, max(num_blocks, 1)), least)
    return in_equal_parts(num_heads, most)


def heads_in_waves(num_heads: int, num_blocks: int, waves: int = 1, least: int = 1) -> int:
    """Units in sections of about equal size and about so many tiles for each CTA, if so many units have not more."""
    return in_equal_parts(num_heads, max((waves * CTAS + num_blocks // 2) // max(num_blocks, 1), least))


def heads_in_whole_waves(num_heads: int, num_blocks: int, heads: int) -> int:
    """So many units, or as few more as fill their last wave, if some do.

    Tiles of 96 keys do not: 16k of them are 171, of which 39 run alone in a second wave. With three units in a section
    of 12 causal calls take about 0.95 of the time (head_dim 192, BF16, H200, 2026-11-30).
    """
    for more in range(heads, min(heads + MOST_HEADS_MORE, num_heads) + 1):
        found = in_equal_parts(num_heads, more)
        if -found * num_blocks % CTAS <= MOST_IDLE * CTAS:
            return found
    return heads


def in_equal_parts(num_heads: int, most: int) -> int:
    """Of the parts of so many heads, of `most` each at most."""
    return ceil_div(num_heads, ceil_div(num_heads, min(most, max(num_heads, 1)))) if num_heads else 1


def heads_apart(group: int, num_q_blocks: int, is_causal: bool) -> int:
    """In sections of so many heads a tile of keys starts STEPS_APART Q tiles behind the one before it, if CTAs start
    one after the other: what that one has added to dQ it then need not wait for."""
    return ceil_div(STEPS_APART * CTAS * (2 if is_causal else 1), max(num_q_blocks * group, 1))


def main_sections(cfg: BackwardConfig, of: ProblemShape) -> Sections:
    """Of the main kernel."""
    group, num_blocks = of.num_heads // of.num_heads_k, max(ceil_div(of.seqlen_k, cfg.tile_n), 1)
    units, per_unit = of.num_heads_k * of.batch_size, num_blocks
    if cfg.is_varlen:
        units, per_unit = of.num_heads_k, num_blocks * of.batch_size
        if of.is_packed:
            per_unit = of.seqlen_k // cfg.tile_n + of.batch_size
    heads, (behind, spare) = heads_in_waves(units, per_unit), APART["varlen" if cfg.is_varlen else "waves"]
    if cfg.is_split and cfg.is_causal and not cfg.is_varlen:
        heads = heads_in_whole_waves(units, per_unit, heads)
    is_rising = int(cfg.has_directions and cfg.is_varlen)
    if cfg.is_deterministic:
        behind, spare = APART["one after the other"]
    if cfg.is_deterministic and not cfg.is_varlen:
        is_rising = int(cfg.has_directions and heads * group * of.seqlen_q <= rows_in_l2(cfg.head_dim))
        if is_rising:
            behind, spare = APART["pairs"]
        elif cfg.mask != "full":
            behind, spare = APART["waves"]
            least = heads_apart(group, ceil_div(of.seqlen_q, cfg.tile_m), cfg.is_causal)
            heads = heads_per_section(units, group, of.seqlen_q, cfg.head_dim, num_blocks, least)
        elif num_blocks >= MANY_BLOCKS:
            behind, spare = APART["waves"]
            heads = heads_in_waves(units, per_unit, WAVES_IN_ORDER, LEAST_HEADS_IN_ORDER)
    return Sections(heads, is_rising, min(behind * heads, units) * per_unit, min((behind + spare) * heads, units))


class Shares(NamedTuple):
    """Of the last tiles of a launch, which CTAs share: how many, and into how many parts they are cut."""

    num_shared: int
    num_parts: int


def shares_of(cfg: object, of: ProblemShape) -> Shares:
    """Of the main kernel's tiles those that are not a whole number for each CTA, if they take less time in parts."""
    if not (isinstance(cfg, BackwardConfig) and cfg.shares_tiles) or max(of.seqlen_q, of.seqlen_k) >= MOST_SHARED_ROWS:
        return Shares(0, 0)
    group, q_blocks = of.num_heads // of.num_heads_k, ceil_div(of.seqlen_q, cfg.tile_m)
    shared = of.num_heads_k * of.batch_size * ceil_div(of.seqlen_k, cfg.tile_n) % CTAS
    most = min(MOST_PARTS * shared, shared * q_blocks * group // LEAST_STEPS, shared * q_blocks)
    parts = min(CTAS, most, of.num_heads * of.batch_size * q_blocks)
    saves = parts > shared and q_blocks * group * (parts - shared) > SHARING_STEPS * parts
    return Shares(shared, parts) if saves else Shares(0, 0)


def floats_of_shares(cfg: object, of: ProblemShape) -> int:
    """What parts leave of dK and dV."""
    parts = shares_of(cfg, of).num_parts  # the last of which leaves nothing
    return (parts - 1) * 2 * cfg.tile_n * cfg.head_dim if parts and isinstance(cfg, BackwardConfig) else 0


def side_section(cfg: OneSideConfig | PairConfig, of: ProblemShape) -> int:
    """Heads of a section of the kernels of one gradient or of two."""
    is_of_queries = isinstance(cfg, OneSideConfig) and cfg.is_of_queries
    heads, rows, tile = (
        (of.num_heads, of.seqlen_q, cfg.tile_rows) if is_of_queries else (of.num_heads_k, of.seqlen_k, cfg.tile_n)
    )
    group = of.num_heads // of.num_heads_k
    return heads_per_section(heads * of.batch_size, group, of.seqlen_q, cfg.head_dim, ceil_div(rows, tile))


def num_blocks(of: ProblemShape, tile_m: int) -> int:
    """Q tiles of one head of a batch, as kernels/backward/blocks.py lays them out."""
    return of.seqlen_q // tile_m + of.batch_size if of.is_packed else of.batch_size * -(-of.seqlen_q // tile_m)


class Sums(NamedTuple):
    """What a pass whose dQ is a sum has room for; see sections.py.

    units             KV heads of batch entries, or of all sequences where lengths are on the device
    blocks_per_unit   Q tiles of each of their query heads
    num_slots         how many of them have room
    blocks            Q tiles that have room
    """

    units: int
    blocks_per_unit: int
    num_slots: int
    blocks: int


def sums_of(cfg: BackwardConfig | OneSidePass, of: ProblemShape) -> Sums:
    """Of a pass."""
    if isinstance(cfg, OneSidePass):
        return Sums(0, 0, 0, 0)
    per_head, num_slots = num_blocks(of, cfg.tile_m), main_sections(cfg, of).num_slots
    units, per_unit = of.num_heads_k * of.batch_size, per_head // of.batch_size
    if cfg.is_varlen:
        units, per_unit = of.num_heads_k, per_head
    return Sums(units, per_unit, num_slots, num_slots * per_unit * (of.num_heads // of.num_heads_k))


def launch_values(cfg: object, of_pass: BackwardConfig | OneSidePass, of: ProblemShape) -> dict[str, int]:
    """What kernels are told of all this, by name. cfg: of a launch of the pass."""
    sums, sections = sums_of(of_pass, of), Sections(0, 0, 0, 0)
    if isinstance(cfg, BackwardConfig):
        sections = main_sections(cfg, of)
    elif isinstance(cfg, OneSideConfig | PairConfig):
        sections = Sections(side_section(cfg, of), 0, 0, 0)
    shared, parts = shares_of(cfg, of)
    return {
        "num_shared": shared,
        "num_parts": parts,
        "section": sections.heads,
        "is_rising": sections.is_rising,
        "num_behind": sections.num_behind * (of.seqlen_q > 0),
        "tail_split": of.num_heads // of.num_heads_k if sections.num_behind <= TAIL_PLACES else 1,
        "num_sum_slots": sums.num_slots,
        "blocks_per_unit": sums.blocks_per_unit,
        "num_units": sums.units,
    }
