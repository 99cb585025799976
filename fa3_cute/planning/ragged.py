"""Plans of ragged batches: which kernels serve them, and the bounds within which lengths on the device may be anything.

The host knows sizes: sequences, rows of all queries, the capacity of K and V. The grid and the scratch memory follow
from these; how many clusters work on a sequence follows from the lengths, on the device (kernels/decode/ragged.py). So
one captured graph is good for all lengths. Pure Python.
"""

from functools import lru_cache
from typing import NamedTuple

from ..contract.formats import MAX_SPLITS
from .config import SMEM_BYTES_PER_CTA, DecodeConfig
from .problem import ProblemShape
from .splits import CLUSTER_SLOTS, MAX_DECODE_ROWS, RATES, SplitPlan, fastest, is_decode, packed_heads_of

MOST_ROUNDS = 2  # of slots that shares of the work are made of, at most: pieces then end close enough together


class Kernels(NamedTuple):
    """Which kernels serve a call, and the number of queries up to which sequences are decode's; 0: all or none."""

    has_decode: bool
    has_forward: bool
    decode_queries: int = 0


def kernels_of(shape: ProblemShape) -> Kernels:
    """Dense queries: one kernel. Packed ones: one where a bound on their lengths says that it suits all, else both, each
    for the sequences that suit it."""
    if not shape.is_packed:
        decodes = is_decode(shape)
        return Kernels(decodes, not decodes)
    if shape.num_splits > 1 or shape.pack_gqa:
        return Kernels(True, False)
    most, queries = MAX_DECODE_ROWS // packed_heads_of(shape), max_queries(shape)
    if 0 < queries <= most:
        return Kernels(True, False)
    if shape.has_packed_keys or shape.batch_size == 1 or not most:
        return Kernels(False, True)
    return Kernels(True, True, most)


def max_queries(shape: ProblemShape) -> int:
    """Queries of a sequence, at most, as far as the host can tell or is told; 0: unknown."""
    if shape.is_packed and shape.batch_size > 1:
        return shape.max_seqlen_q or (1 if shape.seqlen_q == shape.batch_size else 0)
    return shape.seqlen_q


def is_ragged(shape: ProblemShape, has_decode: bool) -> bool:
    """Whether a call needs kernels of ragged batches: keys that lie apart from packed queries, an index or a table of
    them, padding, or splits that follow from lengths on the device."""
    apart = shape.is_packed and not shape.has_packed_keys or shape.is_paged or shape.length("kv_batch_idx") != 0
    return apart or shape.zero_padding or has_decode and (shape.has_lengths or shape.fixed_split_size > 0)


def ragged_plan_of(cfg: DecodeConfig, shape: ProblemShape, decode_queries: int) -> SplitPlan:
    """The plan of the decode launch of a ragged batch."""
    rows_k = shape.seqlen_k if not shape.has_packed_keys else -(-shape.seqlen_k // shape.batch_size)
    tokens = shape.batch_size * rows_k
    return ragged_plan(
        cfg,
        shape.batch_size + shape.zero_padding,
        shape.seqlen_q,
        Reach(
            rows_k, min(tokens, shape.num_pages * shape.page_size or tokens), shape.window_left + shape.window_right + 1
        ),
        (shape.num_heads, shape.num_heads_k, packed_heads_of(shape)),
        Queries(shape.is_packed, decode_queries or max_queries(shape) or shape.seqlen_q, decode_queries),
        (shape.num_splits, shape.max_num_splits, shape.fixed_split_size),
        shape.zero_padding,
    )


class Reach(NamedTuple):
    """Keys: of a sequence at most (capacity), of all in memory, and those between the first and last that a query
    sees."""

    capacity: int
    in_memory: int
    window: int


class Queries(NamedTuple):
    """Whether they are packed, of a sequence at most as far as is known, and those up to which sequences are served."""

    are_packed: bool
    most: int
    served: int


@lru_cache(maxsize=4096)
def ragged_plan(
    cfg: DecodeConfig,
    num_sequences: int,
    rows_q: int,
    keys: Reach,
    heads: tuple[int, int, int],
    queries: Queries,
    splits: tuple[int, int, int],
    has_padding: bool,
) -> SplitPlan:
    """The plan of a launch.

    rows_q   rows of packed queries, or of each sequence
    heads    num_heads, num_heads_k, packed_heads
    splits   num_splits, max_num_splits, fixed_split_size
    """
    num_heads, num_heads_k, packed_heads = heads
    num_groups = num_heads // packed_heads
    num_splits, max_num_splits, split_size = splits
    rows = min(queries.most, rows_q) * packed_heads  # of an item, mostly
    num_items = num_sequences * -(-rows // cfg.tile_m) * num_groups
    most_items = num_items
    if queries.are_packed and not queries.served:  # whatever the lengths are
        most_items = (rows_q * packed_heads // cfg.tile_m + num_sequences) * num_groups
    n_blocks = -(-keys.capacity // cfg.tile_n)
    if cfg.is_local:
        n_blocks = min(n_blocks, (keys.window + min(queries.most, cfg.tile_m)) // cfg.tile_n + 2)
    kv_bytes = min(keys.in_memory, num_sequences * n_blocks * cfg.tile_n) * num_heads_k * cfg.kv_bytes_per_token
    most_splits = max_num_splits or MAX_SPLITS
    if num_splits:
        cluster_size = max(size for size in CLUSTER_SLOTS if num_splits % size == 0)
    elif split_size:
        cluster_size = 1
    else:
        rates = next(row[1:] for row in RATES if kv_bytes <= row[0])
        wanted, cluster_size = fastest(cfg, num_items, n_blocks, rates)
        cluster_size = max(size for size in CLUSTER_SLOTS if size <= min(cluster_size, most_splits))
    slots = CLUSTER_SLOTS[cluster_size]
    is_spread = num_items * (num_splits or (1 if split_size else wanted)) <= slots[0]
    num_slots = slots[0 if is_spread or cfg.ctas_per_sm == 1 else 1] // cluster_size
    most_slots = MOST_ROUNDS * num_slots
    most_clusters = max(1, most_splits // cluster_size)
    clusters_of_item = num_splits // cluster_size
    split_tiles = -(-split_size // cfg.tile_n)
    if num_splits:
        num_partials = most_items * clusters_of_item if clusters_of_item > 1 else 0
    elif split_size:
        num_partials = most_items * min(-(-n_blocks // split_tiles), most_clusters)
    else:
        num_partials = min(most_slots, max(num_slots, most_items)) if most_clusters > 1 else 0
    partial_rows = cfg.tile_m if num_splits or split_size else min(rows, cfg.tile_m)
    return SplitPlan(
        packed_heads,
        max(1, num_splits),
        cluster_size,
        SMEM_BYTES_PER_CTA if is_spread else cfg.smem_bytes,
        int(has_padding),
        queries.served or (1 << 31) - 1,
        most_items + num_partials,
        num_slots,
        most_slots,
        most_clusters,
        clusters_of_item,
        split_tiles,
        max(0, (n_blocks * most_items).bit_length() - 30),
        num_partials,
        partial_rows,
        partial_bytes=4 * num_partials * partial_rows * (cfg.head_dim + 1),
        num_arrivals=num_partials * cluster_size,
    )
