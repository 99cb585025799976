"""Widening role: K and V tiles in FP8, as they come from memory -> tiles of 16 bit, as the GEMMs read them."""
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from ...planning.config import DecodeConfig
from ..common.layout import unhoisted
from ..common.widen import widen
from .split import SplitWork


@cute.jit
def widen_split(cfg: DecodeConfig, sX: cute.Tensor, wide_X: cute.Tensor, ring: pipeline.PipelineAsync,
                wide_ring: pipeline.PipelineAsync, work: SplitWork, thread: Int32):
    """Every K tile, or every V tile, of one split, in the order in which they are loaded.

    sX, wide_X   (tile_n, columns, slot) of a ring and of its wide one
    thread       of those that widen these
    Runs on: the warpgroup that widens K, or that of V. Synchronises: waits for the full half of the ring and the empty
    half of the wide one; empties the first, fills the second.
    """
    stored, wide = ring.make_consumer(), wide_ring.make_producer()
    for _ in cutlass.range(work.blocks.n_block_max - work.blocks.n_block_min, unroll=1):
        source = stored.wait_and_advance()
        target = wide.acquire_and_advance()
        widen(cfg, sX[None, None, source.index], wide_X[None, None, target.index], unhoisted(thread))
        cute.arch.fence_view_async_shared()      # ordinary stores before the async proxy's reads
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            target.commit()
        source.release()
