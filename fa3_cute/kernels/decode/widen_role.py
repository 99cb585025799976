"""Widening role: K and V tiles in FP8, as they come from memory -> tiles of 16 bit, as the GEMMs read them."""
import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ...planning.config import DecodeConfig
from ...planning.rings import WARP, by_name
from ..common.layout import unhoisted
from ..common.widen import widen
from .bundles import DecodePipelines, DecodeSmem
from .split import SplitWork


@cute.jit
def widen_split(cfg: DecodeConfig, smem: DecodeSmem, pipes: DecodePipelines, work: SplitWork):
    """Every K and V tile of one split, in the order in which they are loaded.

    Runs on: the widening warps. Synchronises: waits for the full halves of the K and V rings and the empty halves of
    the wide ones; empties the first, fills the second.
    """
    thread = cute.arch.thread_idx()[0] - WARP * by_name(cfg.roles)["widen"].warps[0]
    k, v = pipes.k.make_consumer(), pipes.v.make_consumer()
    wide_k, wide_v = pipes.wide_k.make_producer(), pipes.vt.make_producer()
    num_blocks = work.blocks.n_block_max - work.blocks.n_block_min
    for i in cutlass.range(num_blocks + 1, unroll=1):
        if i < num_blocks:
            k, wide_k = widen_next(cfg, smem.sK, smem.wide_K, k, wide_k, thread)
        if i > 0:
            v, wide_v = widen_next(cfg, smem.sV, smem.wide_V, v, wide_v, thread)


@cute.jit
def widen_next(cfg: DecodeConfig, sX: cute.Tensor, wide_X: cute.Tensor, stored, wide, thread: Int32):
    """The next tile of K or of V. Returns the consumer and the producer that it advanced."""
    source = stored.wait_and_advance()
    target = wide.acquire_and_advance()
    widen(cfg, sX[None, None, source.index], wide_X[None, None, target.index], unhoisted(thread))
    cute.arch.fence_view_async_shared()      # ordinary stores before the async proxy's reads
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        target.commit()
    source.release()
    return stored, wide
