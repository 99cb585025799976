"""Plans of ragged batches: which kernels serve them, and the bounds within which lengths on the device may be anything.

The host knows sizes: sequences, rows of all queries, the capacity of K and V. The grid and the scratch memory follow
from these; how many clusters work on a sequence follows from the lengths, on the device (kernels/decode/ragged.py). So
one captured graph is good for all lengths. Pure Python.
"""

from functools import lru_cache
from typing import NamedTuple

from ..contract.formats import MAX_SPLITS
from .config import SMEM_BYTES_PER_CTA, DecodeConfig
from .key_source import is_apart
from .problem import ProblemShape
from .splits import (
    CLUSTER_SLOTS,
    MAX_DECODE_ROWS,
    RATES,
    SplitPlan,
    fastest,
    is_decode,
    packed_heads_of,
    packs_many_rows,
)

UNLIMITED = (1 << 31) - 1
LEAST_TILES = 8  # kernels/decode/ragged.py
MOST_ROUNDS = 2  # of slots that shares of the work are made of, at most: pieces then end close enough together


class Kernels(NamedTuple):
    """Which kernels serve a call, and the number of queries up to which sequences are decode's; 0: all or none."""

    has_decode: bool
    has_forward: bool
    decode_queries: int = 0


def kernels_of(shape: ProblemShape) -> Kernels:
    """Dense queries: one kernel. Packed ones: one where a bound on their lengths says that it suits all, else both,
    each for the sequences that suit it. Of 16-bit queries over FP8 keys the decode kernel, which alone widens
    them, and of 512 columns of V that kind of it which has them."""
    if shape.kv_dtype or shape.has_wide_values:  # there is no other kernel
        return Kernels(True, False)
    if not shape.is_packed:
        decodes = is_decode(shape)
        return Kernels(decodes, not decodes)
    if shape.num_splits > 1 or packs_many_rows(shape):
        return Kernels(True, False)
    most, queries = MAX_DECODE_ROWS // packed_heads_of(shape), max_queries(shape)
    if 0 < queries <= most:
        return Kernels(True, False)
    if shape.has_packed_keys or not most:
        return Kernels(False, True)
    return Kernels(True, True, most)


def max_queries(shape: ProblemShape) -> int:
    """Queries of a sequence, at most, as far as the host can tell or is told; 0: unknown.

    With packed keys it must be told: a sequence has the same kernel, and bits, alone and among others.
    """
    if shape.is_packed and (shape.batch_size > 1 or shape.has_packed_keys):
        return shape.max_seqlen_q or (1 if shape.seqlen_q == shape.batch_size else 0)
    return shape.seqlen_q


def is_ragged(shape: ProblemShape, has_decode: bool) -> bool:
    """Whether a call needs kernels of ragged batches: keys that lie apart from packed queries, an index or a table of
    them, padding, or splits that follow from lengths on the device."""
    return is_apart(shape) or has_decode and (shape.has_lengths or shape.fixed_split_size > 0)


class Batch(NamedTuple):
    """What the host knows of the batch of a decode launch.

    items, most_items   M tiles times groups of heads, as far as lengths are known, and whatever they are
    first_items     of sequences' first M tiles
    rows            of an item, likewise
    capacity        keys of a sequence
    num_tokens      of K and V in memory
    window          keys from the first to the last that a query sees
    """

    items: int
    most_items: int
    first_items: int
    rows: int
    capacity: int
    num_tokens: int
    window: int
    num_heads_k: int


def batch_of(cfg: DecodeConfig, shape: ProblemShape, decode_queries: int) -> Batch:
    """The batch of a problem; decode_queries as Kernels has them."""
    packed_heads, num_sequences = packed_heads_of(shape), shape.batch_size + shape.zero_padding
    num_groups = shape.num_heads // packed_heads
    rows = max(1, decode_queries or max_queries(shape) or shape.seqlen_q) * packed_heads
    items = most_items = num_sequences * -(-rows // cfg.tile_m)
    if shape.is_packed and not decode_queries:
        most_items = max(shape.seqlen_q * packed_heads - 1, 0) // cfg.tile_m + num_sequences
    capacity = -(-shape.seqlen_k // shape.batch_size) if shape.has_packed_keys else shape.seqlen_k
    num_tokens = shape.batch_size * capacity
    if shape.is_paged:
        num_tokens = min(num_tokens, shape.num_pages * shape.page_size)
    window = shape.window_left + shape.window_right + 1
    return Batch(
        min(items, most_items) * num_groups,
        most_items * num_groups,
        num_sequences * num_groups,
        min(rows, cfg.tile_m),
        shape.seqlen_k if shape.has_packed_keys else capacity,
        num_tokens,
        window,
        shape.num_heads_k,
    )


def ragged_plan_of(cfg: DecodeConfig, shape: ProblemShape, decode_queries: int) -> SplitPlan:
    """The plan of the decode launch of a ragged batch."""
    plan = ragged_plan(
        cfg,
        batch_of(cfg, shape, decode_queries),
        (shape.num_splits, shape.max_num_splits or MAX_SPLITS, shape.fixed_split_size),
    )
    return plan._replace(
        packed_heads=packed_heads_of(shape),
        has_padding=int(shape.zero_padding),
        decode_queries=decode_queries or UNLIMITED,
    )


@lru_cache(maxsize=4096)
def ragged_plan(cfg: DecodeConfig, batch: Batch, splits: tuple[int, int, int]) -> SplitPlan:
    """The plan but for what is in the shape; splits: num_splits, max_num_splits, fixed_split_size of the params."""
    num_splits, most_splits, split_size = splits
    most_tiles = -(-batch.capacity // cfg.tile_n)
    if cfg.is_local:
        most_tiles = min(most_tiles, (batch.window + cfg.tile_m) // cfg.tile_n + 2)
    wanted, cluster_size = num_splits or 1, 1
    if num_splits:
        cluster_size = max(size for size in CLUSTER_SLOTS if num_splits % size == 0)
    elif not split_size:
        kv_bytes = min(batch.num_tokens * batch.num_heads_k, batch.items * most_tiles * cfg.tile_n)
        rates = next(row[1:] for row in RATES if kv_bytes * cfg.kv_bytes_per_token <= row[0])
        wanted, cluster_size = fastest(cfg, batch.items, most_tiles, rates)
        cluster_size = max(size for size in CLUSTER_SLOTS if size <= min(cluster_size, most_splits))
    is_spread = batch.items * wanted <= CLUSTER_SLOTS[cluster_size][0]
    num_slots = CLUSTER_SLOTS[cluster_size][0 if is_spread or cfg.ctas_per_sm == 1 else 1] // cluster_size
    most_clusters = max(1, most_splits // cluster_size)
    least_clusters = num_splits // cluster_size or 1
    split_tiles = 0 if num_splits else min(-(-split_size // cfg.tile_n), max(1, most_tiles))
    # Of few items: what runs at once besides them. Of many: as many as they are, or as run in MOST_ROUNDS.
    has_few = batch.items < num_slots
    num_extras = num_slots - batch.items if has_few else min(batch.most_items, MOST_ROUNDS * num_slots)
    has_shares = (
        not (num_splits or split_size)
        and most_clusters > 1
        and most_tiles >= LEAST_TILES * cluster_size * (1 if has_few else 2)
        and most_tiles * batch.most_items < 1 << 31
    )
    most = least_clusters  # clusters of an item
    if split_tiles:
        most = max(1, min(-(-most_tiles // split_tiles), most_clusters))
    has_base = has_few or not has_shares
    if has_shares:
        num_partials = num_extras + min(num_extras, batch.most_items) * has_base
        num_further = batch.most_items - batch.first_items + num_extras
    else:
        num_partials = batch.most_items * most if most > 1 else 0
        num_further = batch.most_items * most - batch.first_items
    # What is asked for by number or by size holds for items of any rows, whatever the hint.
    partial_rows = batch.rows if has_shares else cfg.tile_m
    return SplitPlan(
        packed_heads=1,
        num_splits=max(1, num_splits),
        cluster_size=cluster_size,
        smem_bytes=SMEM_BYTES_PER_CTA if is_spread else cfg.smem_bytes,
        num_clusters=num_further + batch.first_items,
        num_extras=num_extras,
        first_base=0 if has_base else min(num_further, num_slots // 2),
        has_base=int(has_base),
        has_shares=int(has_shares),
        least_clusters=least_clusters,
        most_clusters=max(most_clusters, least_clusters),
        most_tiles=most_tiles,
        split_tiles=split_tiles,
        num_partials=num_partials,
        partial_rows=partial_rows,
        # No less than what arrival counts in the caller's tile_counter follow from: an eighth of it.
        partial_bytes=max(4 * num_partials * partial_rows * (cfg.dim_v + 1), 32 * num_partials * cluster_size),
        num_arrivals=num_partials * cluster_size,
    )
