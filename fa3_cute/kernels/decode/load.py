"""Load role: one warp brings the K and V tiles of a split from global to shared memory with TMA."""
import cutlass.cute as cute

from ...planning.config import DecodeConfig
from ..common.block_range import first_key
from ..common.keys_values import copy_tile, load_after_first, source_of
from .bundles import DecodeParams, DecodePipelines, DecodeSmem
from .split import SplitWork


@cute.jit
def load_split(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork):
    """K[last], then the other K and V tiles of one split (`load_after_first`).

    Runs on: the load warp. Synchronises: waits for the empty halves of the K and V rings; TMA signals the full ones.
    """
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    k = source_of(cfg, params.k, smem.sK, work.tile, params.kv_policy)
    v = source_of(cfg, params.v, smem.sV, work.tile, params.kv_policy)
    if work.blocks.n_block_max > work.blocks.n_block_min:
        copy_tile(k, k_producer.acquire_and_advance(), first_key(cfg, work.blocks.n_block_max - 1))
        k_producer, v_producer = load_after_first(cfg, k, v, work.blocks, k_producer, v_producer)
