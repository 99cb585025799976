"""Which K/V tiles a Q tile visits, from n_block_max - 1 down to n_block_min, and which of them need the causal mask.

Plain arithmetic: the same code runs on Python ints in the tests, against brute force.
"""
from dataclasses import dataclass

from cutlass import Int32

from ..config import FwdConfig
from .arithmetic import ceil_div, maximum, minimum


@dataclass(frozen=True)
class BlockRange:
    """K/V tiles [n_block_min, n_block_max), empty if no row of the Q tile sees a key."""
    n_block_min: Int32
    n_block_max: Int32
    n_block_full_max: Int32   # tiles below this one are visible to every row of the Q tile


def block_range(cfg: FwdConfig, m_block: Int32, seqlen_q: Int32, seqlen_k: Int32) -> BlockRange:
    """K/V tiles that hold a key visible to some row of Q tile `m_block`, lengths in tokens."""
    n_block_max = ceil_div(seqlen_k, cfg.tile_n)
    n_block_full_max = seqlen_k // cfg.tile_n
    if cfg.is_causal:
        # Bottom-right aligned: row i sees the first i + 1 + seqlen_k - seqlen_q keys (none if that is not positive).
        first_row_keys = maximum(m_block * cfg.tile_m + 1 + seqlen_k - seqlen_q, 0)
        last_row_keys = maximum((m_block + 1) * cfg.tile_m + seqlen_k - seqlen_q, 0)
        n_block_max = minimum(n_block_max, ceil_div(last_row_keys, cfg.tile_n))
        n_block_full_max = minimum(n_block_full_max, first_row_keys // cfg.tile_n)
    return BlockRange(0, n_block_max, n_block_full_max)
