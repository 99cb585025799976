"""The decode kernel of steps that append: a new key and value of each sequence, and rotary positions (new_rows.py)."""
from dataclasses import replace

import cutlass.cute as cute
from cutlass import Int32

from ...contract.append import DECODE_APPEND_ENTRY
from ..common.entry import flat_entry
from ..common.ragged import RaggedBatch
from .bundles import DecodeParams, DecodeSmem
from .kernel import FlashAttentionDecode
from .new_rows import NewRows
from .split import SplitWork


@flat_entry(DECODE_APPEND_ENTRY.arguments)
class FlashAttentionDecodeWithAppend(FlashAttentionDecode):
    """Compile `__call__`: its parameters are DECODE_APPEND_ENTRY.arguments, in order."""

    def batch(self, a) -> RaggedBatch:
        return replace(super().batch(a), num_new=Int32(1))

    def extended(self, params: DecodeParams, a, batches: Int32) -> DecodeParams:
        return replace(params, new_rows=NewRows.create(self.cfg, a))

    @cute.jit
    def append_alone(self, params: DecodeParams, smem: DecodeSmem, work: SplitWork, warp_idx: Int32):
        """For a sequence without queries, which has a key by now: what is no sequence has none."""
        if work.tile.seqlen_q == 0 and work.tile.seqlen_k > 0 and warp_idx < self.cfg.num_consumer_warps:
            tidx, batch = cute.arch.thread_idx()[0], params.places.batch
            params.new_rows.append_alone(self.cfg, smem, batch, work.tile, tidx)
