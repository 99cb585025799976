"""How a decode call is laid over the GPU: into how many splits K and V are cut, and which CTAs form a cluster.

`plan` minimises a model of the call's time. A work item (one M tile: kernels/split.py) is cut into num_splits parts,
each one CTA's; n_blocks is the K/V tiles of an item.

    time         sum over the waves of (WAVE_TIME + tiles_per_split * tile_time), + merge_time
    waves        rounds of as many CTAs as run at once; the last one, of the rest, has the bandwidth to itself
    tile_time    the larger of a CTA's latency per tile and what its tile takes at its share of the bandwidth, which is
                 the memory's or, of few SMs, theirs
    merge_time   one step within a cluster; another one, longer with more clusters, through global memory

How many CTAs run at once depends on the cluster size: a cluster lies within one GPC of 16 or 18 SMs. A launch that fits
one CTA per SM asks for so much shared memory that no SM gets two, else the hardware packs them and leaves SMs idle.

The plan is for the 132 SMs of H100 and H200 wherever it runs: it depends on the call alone, so that the same call gives
the same bits everywhere. Pure Python.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from ..contract.formats import MAX_SPLITS, UNBOUNDED_WINDOW
from .config import SMEM_BYTES_PER_CTA, DecodeConfig
from .packing import packed_heads_of_window
from .problem import ProblemShape
from .decode_rows import row_of

NUM_SMS = 132
MAX_DECODE_ROWS = 64  # of a KV head: one M tile
# {cluster size: CTAs that run at once with one CTA per SM, with two} (cuOccupancyMaxActiveClusters, H200)
CLUSTER_SLOTS = {
    1: (132, 264),
    2: (132, 264),
    3: (117, 237),
    4: (120, 248),
    5: (110, 235),
    6: (102, 234),
    7: (105, 224),
    8: (120, 240),
    16: (112, 224),
}
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a cluster size that are tried as num_splits, besides the largest
LONE_SIZES = (1, 3, 5, 6, 7)  # cluster sizes that are not tried with several clusters per item

# Microseconds, and bytes per microsecond, fitted to measurements of BF16 on an H200, 2026-11-22 (docs/performance.md).
# (K and V up to so many bytes, bandwidth, bandwidth of one SM): they may lie in L2 still, in part, or not.
RATES = ((40e6, 6.0e6, 6.0e6), (80e6, 5.0e6, 48e3), (math.inf, 4.6e6, 43e3))
WAVE_TIME = 2.0  # to start and to end a round of CTAs
CLUSTER_TIME = {1: 0.0, 16: 1.1}  # a merge within a cluster; of other sizes OTHER_CLUSTER_TIME
OTHER_CLUSTER_TIME = 0.4
CLUSTERS_TIME, ROUND_TIME = 1.3, 0.6  # a merge of clusters, in rounds of so many partial results:
ROUND = 16
# Of more columns than the fit is of, MLA's: what the last of the clusters reads of the others' rows, at such a rate.
FITTED_DIM, MERGE_RATE = 256, 45e3
# Two CTAs per SM, unless there are many and each does all of an item: a tile's latency, and its transfer, times this.
PACKED_LATENCY, PACKED_LOSS = 1.5, 1.15


class SplitPlan(NamedTuple):
    """How a decode call runs: what its launch adds to the kernel's arguments (arguments.DECODE_COUNTS), then scratch.

    packed_heads    query heads that share an M tile
    smem_bytes      dynamic shared memory to ask for: more than the kernel's where an SM shall hold one CTA
    has_padding .. partial_rows   of ragged batches: planning/ragged.py
    partial_bytes   scratch memory for the clusters' results; 0 if one cluster does all of an item
    num_arrivals    int32 arrival counts, 0 likewise
    """

    packed_heads: int
    num_splits: int
    cluster_size: int
    smem_bytes: int
    has_padding: int = 0
    decode_queries: int = 0
    num_clusters: int = 0
    num_extras: int = 0
    first_base: int = 0
    has_base: int = 0
    has_shares: int = 0
    least_clusters: int = 0
    most_clusters: int = 0
    most_tiles: int = 0
    split_tiles: int = 0
    num_partials: int = 0
    partial_rows: int = 0
    partial_bytes: int = 0
    num_arrivals: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """What the launch adds to the kernel's arguments."""
        return self[:-2]


def packed_heads_of(shape: ProblemShape) -> int:
    """Query heads that share an M tile."""
    return 1 if shape.pack_gqa is False else shape.num_heads // shape.num_heads_k


def is_decode(shape: ProblemShape) -> bool:
    """Whether the decode kernel serves a problem of dense queries: few rows per KV head, or K and V in splits."""
    if shape.has_block_lists:  # the forward kernel reads them
        return False
    rows = shape.seqlen_q * packed_heads_of(shape)
    return rows <= MAX_DECODE_ROWS or shape.is_decode_mode or shape.num_splits > 1 or packs_many_rows(shape)


def packs_many_rows(shape: ProblemShape) -> bool:
    """Whether heads are to be packed in a problem of any number of rows where only the decode kernel does."""
    return bool(shape.pack_gqa) and packed_heads_of_window(shape) == 1


def is_windowed(shape: ProblemShape) -> bool:
    """Whether some query of a problem that the decode kernel serves does not see every key: of a single one, which is
    the last, the right bound cuts nothing."""
    return shape.window_left < UNBOUNDED_WINDOW or (
        shape.window_right < UNBOUNDED_WINDOW and (shape.is_packed or shape.seqlen_q != 1)
    )


def plan_of(cfg: DecodeConfig, shape: ProblemShape) -> "SplitPlan":
    """The plan of a problem that the decode kernel serves."""
    return plan(
        cfg,
        shape.batch_size,
        shape.seqlen_q,
        shape.seqlen_k,
        shape.num_heads,
        shape.num_heads_k,
        shape.window_left + shape.window_right + 1,
        (shape.pack_gqa, shape.num_splits, shape.max_num_splits or MAX_SPLITS),
    )


@lru_cache(maxsize=4096)
def plan(
    cfg: DecodeConfig,
    batch_size: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    reach: int,
    choices: tuple[bool | None, int] | tuple[bool | None, int, int],
) -> SplitPlan:
    """The plan of a call.

    reach     tokens from the first key that a query sees to its last, at most
    choices   (pack_gqa, num_splits, max_num_splits) of the params
    """
    pack_gqa, num_splits = choices[0], choices[1]
    most_splits = choices[2] if len(choices) == 3 else MAX_SPLITS
    packed_heads = 1 if pack_gqa is not None and not pack_gqa else num_heads // num_heads_k
    rows = seqlen_q * packed_heads
    num_items = -(-rows // cfg.tile_m) * (num_heads // packed_heads) * batch_size
    n_blocks = -(-seqlen_k // cfg.tile_n)
    if cfg.is_local:
        n_blocks = min(n_blocks, (reach + min(seqlen_q, cfg.tile_m)) // cfg.tile_n + 2)
    kv_bytes = batch_size * num_heads_k * min(seqlen_k, n_blocks * cfg.tile_n) * cfg.kv_bytes_per_token
    if num_splits:
        cluster_size = max(size for size in CLUSTER_SLOTS if num_splits % size == 0)
    else:
        rates = next(row[1:] for row in RATES if kv_bytes <= row[0])
        num_splits, cluster_size = fastest(cfg, num_items, n_blocks, rates)
        if num_splits > most_splits:
            num_splits, cluster_size = most_splits, max(size for size in CLUSTER_SLOTS if most_splits % size == 0)
    is_spread = num_items * num_splits <= CLUSTER_SLOTS[cluster_size][0]
    num_clusters = num_splits // cluster_size
    partials = num_items * num_clusters * min(rows, cfg.tile_m) if num_clusters > 1 else 0
    return SplitPlan(
        packed_heads,
        num_splits,
        cluster_size,
        SMEM_BYTES_PER_CTA if is_spread else cfg.smem_bytes,
        partial_bytes=4 * partials * (cfg.dim_v + 1),
        num_arrivals=num_items * cluster_size if partials else 0,
    )


@lru_cache(maxsize=4096)
def fastest(cfg: DecodeConfig, num_items: int, n_blocks: int, rates: tuple[float, float]) -> tuple[int, int]:
    """(num_splits, cluster_size) of the shortest time; of equal ones the fewest CTAs."""

    def cost(plan: tuple[int, int]) -> tuple[float, int]:
        return round(time_of(cfg, num_items, n_blocks, *plan, rates), 1), num_items * plan[0]

    return min(candidates(cfg, num_items, n_blocks), key=cost)


def candidates(cfg: DecodeConfig, num_items: int, n_blocks: int):
    """(num_splits, cluster_size) worth a look: one cluster per item, or at most a round of CTAs; no empty split."""
    for cluster_size, slots in CLUSTER_SLOTS.items():
        if cluster_size <= max(n_blocks, 1):
            yield cluster_size, cluster_size
        if cluster_size in LONE_SIZES:
            continue
        for num_slots in slots[: cfg.ctas_per_sm]:
            most = min(num_slots // num_items, n_blocks, MAX_SPLITS) // cluster_size
            for multiple in filter(range(2, most + 1).__contains__, {*MULTIPLES, most}):
                yield multiple * cluster_size, cluster_size


def time_of(
    cfg: DecodeConfig, num_items: int, n_blocks: int, num_splits: int, cluster_size: int, rates: tuple[float, float]
) -> float:
    """The model: microseconds, without what every call costs."""
    num_ctas, tiles = num_items * num_splits, -(-n_blocks // num_splits)
    slots = CLUSTER_SLOTS[cluster_size][0]
    latency = row_of(cfg).tile_us
    loss = 1.0
    if num_ctas > slots and cfg.ctas_per_sm > 1:
        slots = CLUSTER_SLOTS[cluster_size][1]
        if num_ctas <= slots or num_splits > 1:
            latency, loss = latency * PACKED_LATENCY, PACKED_LOSS
    waves, rest = divmod(num_ctas, slots)
    time = 0.0
    for count, ctas in ((waves, slots), (1, rest)):
        bandwidth = min(rates[0], rates[1] * min(ctas, NUM_SMS))
        if count and ctas:
            transfer = cfg.tile_n * cfg.kv_bytes_per_token * ctas / bandwidth
            time += count * (WAVE_TIME + tiles * max(latency, transfer * loss))
    num_clusters = num_splits // cluster_size
    if num_clusters > 1:
        time += CLUSTERS_TIME + ROUND_TIME * -(-num_clusters // ROUND)
        if cfg.dim_v > FITTED_DIM:
            time += 4 * cfg.dim_v * (cfg.tile_m / cluster_size) * num_clusters / MERGE_RATE
    return time + CLUSTER_TIME.get(cluster_size, OTHER_CLUSTER_TIME)
