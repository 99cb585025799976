"""Load role: one warp brings the K tiles of a split from global to shared memory with TMA."""
import cutlass
import cutlass.cute as cute

from ...planning.mla import MlaConfig
from ..common.block_range import first_key
from ..common.keys_values import source_of
from ..decode.bundles import DecodeParams, DecodePipelines
from ..decode.split import SplitWork
from .bundles import MlaSmem


@cute.jit
def load_keys(cfg: MlaConfig, params: DecodeParams, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork):
    """The K tiles of one split, from the last one down.

    Runs on: the load warp. Synchronises: waits for the empty halves of the K ring; TMA signals the full ones.
    """
    k_producer = pipes.k.make_producer()
    k = source_of(cfg, params.k, smem.sK, work.tile, params.kv_policy, params.places)
    n_block = work.blocks.n_block_max - 1
    for i in cutlass.range(n_block + 1 - work.blocks.n_block_min, unroll=1):
        key = first_key(cfg, n_block - i)
        found = k.find(key)
        k.copy(k_producer.acquire_and_advance(), key, found)
