"""Load role: one warp brings the tiles of a split from global to shared memory with TMA."""
import cutlass
import cutlass.cute as cute
from cutlass import const_expr

from ...planning.mla import MlaConfig
from ..common.block_range import first_key
from ..common.keys_values import source_of
from ..decode.bundles import DecodePipelines
from ..decode.load import load_split
from ..decode.split import SplitWork
from .bundles import MlaParams, MlaSmem


@cute.jit
def load(cfg: MlaConfig, params: MlaParams, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork):
    """K and V as the consumers take them: in one ring, or in two as decode has them.

    Runs on: the load warp. Synchronises: waits for the empty halves of the rings; TMA signals the full ones.
    """
    if const_expr(cfg.shares_slots):
        load_shared(cfg, params, smem, pipes, work)
    else:
        load_split(cfg, params, smem, pipes, work)


@cute.jit
def load_shared(cfg: MlaConfig, params: MlaParams, smem: MlaSmem, pipes: DecodePipelines, work: SplitWork):
    """The K tiles of one split, from the last one down; where V does not lie in K, each with its V in one slot."""
    k_producer = pipes.k.make_producer()
    k, v = source_of(cfg, params.k, smem.sK, work.tile, params.kv_policy, params.places), None
    if const_expr(cfg.has_qv):
        v = source_of(cfg, params.v, smem.sV, work.tile, params.kv_policy, params.places)
    n_block = work.blocks.n_block_max - 1
    for i in cutlass.range(n_block + 1 - work.blocks.n_block_min, unroll=1):
        key = first_key(cfg, n_block - i)
        found = k.find(key)
        slot = k_producer.acquire_and_advance()
        k.copy(slot, key, found)
        if const_expr(cfg.has_qv):
            v.copy(slot, key, found)
