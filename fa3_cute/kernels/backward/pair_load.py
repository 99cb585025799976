"""Load role of the kernel of dK and dV: one warp brings K and V, then tiles of Q and dO with the rows' values."""
import cutlass.cute as cute

from ...planning.pair import PairConfig
from .blocks import KeyTile, query_range
from .load import QueryTiles, load_heads, load_tile
from .pair_bundles import PairParams, PairPipelines, PairSmem


@cute.jit
def load(cfg: PairConfig, params: PairParams, smem: PairSmem, pipes: PairPipelines, tile: KeyTile):
    """K and V once, then of each query head of the group all pairs of Q and dO in order.

    Runs on: warp 0. Synchronises: waits for the empty halves of the Q and dO rings; TMA signals the full halves.
    """
    queries = query_range(cfg, params.window, tile.n_block, tile.seqlen_q, tile.seqlen_k)
    if queries.m_block_max > queries.m_block_min:
        keys = tile.n_block, tile.offset_k, tile.kv_head, tile.batch
        load_tile(cfg, params.k, smem.sK, keys, pipes.k.make_producer().acquire_and_advance())
        load_tile(cfg, params.v, smem.sV, keys, pipes.v.make_producer().acquire_and_advance())
    q = QueryTiles(cfg, params.q, smem.sQ, pipes.q.make_producer(), params.shift, smem.sShift)
    do = QueryTiles(cfg, params.do, smem.sdO, pipes.do.make_producer(), params.delta, smem.sDelta)
    load_heads(cfg, params.group, tile, queries, q, do)
