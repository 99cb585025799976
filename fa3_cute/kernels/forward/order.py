"""Which tile comes where in the global order of a launch: plain arithmetic that also runs on Python ints in the tests.

A tile is (m_block, head) of one sequence. Without a causal mask m_block runs fastest, so that the CTAs running at one
time share K and V in L2. Causal tiles differ in length and run longest first, within sections of heads whose K and V
fit L2 together: heads fastest, then m_block downwards.

One CTA per tile takes 1.38 times as long as the persistent grid at 1k tokens (causal), 1.14 at 4k, 1.04 at 16k, and
1.07 at 4k without a mask. A static assignment (rounds of the grid that run forwards and backwards) gives 402 TFLOP/s
at 1k where the counter gives 455, 585 against 557 at 4k, and takes 1.6 times as long for eight packed sequences of 2k.
Sections that hold 32 MB of K and V give 443 TFLOP/s at 1k where one section of all heads gives 391; at 4k 64 MB (32
heads) give 565 and 16 MB 525, whose long last tiles leave CTAs idle. BF16, head_dim 128, 16k tokens in all, H200,
2026-11-22; the whole tables are in docs/performance.md.
"""
from dataclasses import dataclass

from cutlass import Int32

from ..common.arithmetic import ceil_div, maximum, minimum
from ..common.order import block_and_head

L2_BYTES_FOR_KV = 32 << 20   # of 50 MB: leaves room for Q, O and the next section
MIN_SECTION = 32             # heads: the last tiles of a launch are then short, and its CTAs end together


@dataclass(frozen=True)
class TileGrid:
    """Extents of the tile space of dense tensors; heads that are packed count as one."""
    num_m_blocks: Int32
    num_heads: Int32
    batch_size: Int32
    section: Int32        # heads (of any batch entry) per section; used if cfg.is_causal

    def num_tiles(self) -> Int32:
        """Tiles of the whole problem."""
        return self.num_m_blocks * self.num_heads * self.batch_size


def heads_per_section(num_heads: Int32, qhead_per_kvhead: Int32, seqlen_k: Int32, bytes_per_token: int) -> Int32:
    """Query heads whose K and V (bytes_per_token: both, of one KV head) share L2, in sections of about equal size."""
    kv_heads_in_l2 = L2_BYTES_FOR_KV // bytes_per_token // maximum(seqlen_k, 1)
    most = minimum(maximum(kv_heads_in_l2 * qhead_per_kvhead, MIN_SECTION), num_heads)
    return ceil_div(num_heads, ceil_div(num_heads, most))


def tile_of_heads(is_causal: bool, index: Int32, num_m_blocks: Int32, num_heads: Int32, section: Int32):
    """(m_block, head) at a place of the order of num_heads heads that have num_m_blocks Q tiles each."""
    return block_and_head(is_causal, is_causal, index, num_m_blocks, num_heads, section)


def dense_tile(is_causal: bool, grid: TileGrid, index: Int32):
    """(m_block, head, batch) at a place of the order of dense tensors, whose sequences are all of one length."""
    num_heads = grid.num_heads * grid.batch_size
    m_block, any_head = tile_of_heads(is_causal, index, grid.num_m_blocks, num_heads, grid.section)
    batch = any_head // grid.num_heads
    return m_block, any_head - batch * grid.num_heads, batch
