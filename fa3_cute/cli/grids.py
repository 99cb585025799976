"""How many CTAs a launch has: what the kernels' host code computes, in Python."""

from ..contract.append import SIZES
from ..contract.formats import ELEMENT_BYTES
from ..planning.append import AppendConfig, AppendShape
from ..planning.config import FwdConfig
from ..planning.operations import Launch
from ..planning.problem import ProblemShape
from ..planning.splits import NUM_SMS

PIECE_BYTES = 16  # of a row, that a thread of the append kernel has
Grid = tuple[int, int, int]


def grid_of(launch: Launch, shape: ProblemShape) -> Grid:
    """The grid of one launch of a problem, on a device of NUM_SMS SMs."""
    if isinstance(launch.config, AppendConfig):
        assert shape.append is not None, "it has something to append or to rotate"
        return append_grid(shape.append)
    if isinstance(launch.config, FwdConfig):
        num_ctas, *_ = launch.counts(NUM_SMS)
        return min(num_tiles(launch.config, shape), num_ctas), 1, 1
    cfg, plan = launch.config, launch.plan
    if cfg.is_ragged:
        return plan.num_clusters * plan.cluster_size, 1, 1
    m_tiles = -(-shape.seqlen_q * plan.packed_heads // cfg.tile_m)
    return m_tiles * (shape.num_heads // plan.packed_heads) * shape.batch_size * plan.num_splits, 1, 1


def num_tiles(cfg: FwdConfig, shape: ProblemShape) -> int:
    """Tiles of the forward kernel; of packed sequences the most that any lengths can make."""
    num_groups, queries = shape.num_heads // cfg.packed_heads, cfg.queries_per_tile
    if shape.is_packed:
        return (shape.seqlen_q // queries + shape.batch_size + shape.zero_padding) * num_groups
    return -(-shape.seqlen_q // queries) * num_groups * shape.batch_size


def append_grid(append: AppendShape) -> Grid:
    """Of what is done ahead of attention: a CTA for each query that is rotated and each new row, behind them those that
    write lengths; along y as many as the pieces of a row's heads take."""
    cfg, sizes = append.config, dict(zip(SIZES, append.sizes, strict=True))
    columns = PIECE_BYTES // ELEMENT_BYTES[cfg.dtype]
    pieces = max(sizes["head_dim"], sizes["head_dim_v"]) // columns
    heads = max(sizes["num_heads"] * (sizes["num_queries"] > 0), sizes["num_heads_k"])
    lengths = -(-sizes["batch_size"] // cfg.num_threads) * (sizes["num_new"] > 0)
    rows = sizes["num_queries"] + sizes["num_new"] + lengths
    return rows, -(-heads * pieces // cfg.num_threads), 1
