"""Load role: one warp brings the K and V tiles of a split from global to shared memory with TMA."""
import cutlass.cute as cute

from ...planning.config import DecodeConfig
from ..common.block_range import first_key
from ..common.keys_values import load_after_first, source_of
from .bundles import DecodeParams, DecodePipelines, DecodeSmem
from .split import SplitWork


@cute.jit
def load_split(cfg: DecodeConfig, params: DecodeParams, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork):
    """K[last], then the other K and V tiles of one split (`load_after_first`).

    Runs on: the load warp. Synchronises: waits for the empty halves of the K and V rings; TMA signals the full ones.
    """
    k_producer, v_producer = pipes.k.make_producer(), pipes.v.make_producer()
    k, v = (source_of(cfg, op, ring, work.tile, params.kv_policy, params.places)
            for op, ring in ((params.k, smem.sK), (params.v, smem.sV)))
    if work.blocks.n_block_max > work.blocks.n_block_min:
        found = k.find(first_key(cfg, work.blocks.n_block_max - 1))
        k.copy(k_producer.acquire_and_advance(), first_key(cfg, work.blocks.n_block_max - 1), found)
        k_producer, v_producer = load_after_first(cfg, k, v, work.blocks, found, k_producer, v_producer)
