"""Block lists of a MaskMod: which K/V blocks the rows of a Q block visit, and which of them need the mask. Pure Python;
`block_lists`, which makes them on the host, needs NumPy.

A block that is in neither list is skipped, and costs nothing. Of a partial one the kernel applies the MaskMod, causal
mask and window to every score, of a full one none of them: every query of the Q block must see every key of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .formats import ELEMENT_BYTES, FP8_SERVED_DIMS, SERVED_DIMS, tile_dims
from .mods import MaskMod

# {(bytes per element of q, columns of its tiles): rows of a Q block and of a K/V block}: tiles of the kernel.
BLOCK_SIZES = {
    (2, 64): (128, 128),
    (2, 96): (128, 128),
    (2, 128): (128, 128),
    (2, 192): (128, 96),
    (2, 256): (128, 64),
    (1, 64): (192, 128),
    (1, 96): (192, 128),
    (1, 128): (128, 128),
    (1, 192): (128, 128),
    (1, 256): (128, 64),
}
LISTS = ("partial_count", "partial_index", "full_count", "full_index")


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Block lists in device memory, int32, contiguous.

    partial_count, full_count   addresses of [batches, heads, q_blocks]: how many blocks are listed
    partial_index, full_index   addresses of [batches, heads, q_blocks, kv_blocks]: their numbers, the first `count` of
                                each row in any order; the others are not read
    q_block, kv_block           rows of a block: a multiple of block_sizes()[0], and block_sizes()[1]
    batches, heads              1: the lists are those of all sequences, of all heads; else batch_size, num_heads

    q_blocks is ceil(seqlen_q / q_block), kv_blocks ceil(seqlen_k / kv_block). A block is in one of the lists at most.
    """

    partial_count: int
    partial_index: int
    full_count: int
    full_index: int
    q_block: int
    kv_block: int
    batches: int = 1
    heads: int = 1


class BlockLists(NamedTuple):
    """What `block_lists` makes, as NumPy arrays for the four addresses of a BlockMask."""

    partial_count: Any
    partial_index: Any
    full_count: Any
    full_index: Any


def block_sizes(dtype: str, head_dim: int, head_dim_v: int = 0) -> tuple[int, int]:
    """(rows of a Q block, rows of a K/V block) of the kernel; dtype: "fp16", "bf16" or "fp8_e4m3".

    A BlockMask's q_block is a multiple of the first, its kv_block the second. head_dim_v: as in FlashAttentionParams.
    Raises KeyError for other types and dims.
    """
    element_bytes = ELEMENT_BYTES[dtype]
    served = FP8_SERVED_DIMS if element_bytes == 1 else SERVED_DIMS
    if head_dim not in served or head_dim_v and head_dim_v not in served:
        raise KeyError((head_dim, head_dim_v))
    columns, _ = tile_dims(element_bytes, head_dim, head_dim_v)
    return BLOCK_SIZES[element_bytes, columns]


def block_lists(
    mod: MaskMod,
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int],
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    arrays: Sequence[Any] = (),
    scalars: Sequence[float] = (),
) -> BlockLists:
    """The block lists of a MaskMod, together with a causal mask or a window, by its NumPy twin.

    sizes    (batches, heads, seqlen_q, seqlen_k): 1 and 1 where the mask is the same for all sequences or heads
    blocks   (q_block, kv_block): see block_sizes
    arrays, scalars   NumPy arrays of what the mod reads

    It computes batches * heads * seqlen_q * seqlen_k entries of the mask, a row of blocks at a time. Rows of the lists
    are in descending order, as the kernel walks the keys without lists. Raises ValueError for a causal mask beside a
    window.
    """
    import numpy as np

    if causal and max(window_size) >= 0:
        raise ValueError(f"window_size={window_size}: must be negative (unbounded) with causal=True")

    batches, heads, seqlen_q, seqlen_k = sizes
    q_blocks, kv_blocks = (-(-length // block) for length, block in zip(sizes[2:], blocks, strict=True))
    twin, info = mod.on_host(tuple(arrays), tuple(scalars)), Lengths(seqlen_q, seqlen_k)
    left, right = (-1, 0) if causal else window_size
    partial, full = (np.zeros((batches, heads, q_blocks, kv_blocks), bool) for _ in range(2))
    keys, pad = np.arange(seqlen_k)[None, :], kv_blocks * blocks[1] - seqlen_k
    for place in np.ndindex(batches, heads, q_blocks):
        batch, head, q_block = place
        queries = np.arange(q_block * blocks[0], min((q_block + 1) * blocks[0], seqlen_q))[:, None]
        distance = queries + seqlen_k - seqlen_q - keys  # of the key to the left of the query
        seen = np.broadcast_to(np.asarray(twin(batch, head, queries, keys, info), bool), distance.shape)
        seen = seen & ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        seen = np.pad(seen, ((0, 0), (0, pad))).reshape(len(queries), kv_blocks, blocks[1])
        full[place] = seen.all(axis=(0, 2))
        partial[place] = seen.any(axis=(0, 2)) & ~full[place]
    return BlockLists(*_listed(partial), *_listed(full))


class Lengths(NamedTuple):
    """`info` of a function."""

    n_q: int
    n_k: int


def _listed(is_listed) -> tuple[Any, Any]:
    """(counts, numbers) of the blocks that are set in each row, the last first."""
    import numpy as np

    numbers = np.arange(is_listed.shape[-1])
    order = np.argsort(np.where(is_listed, -numbers, 1), axis=-1, kind="stable")
    return is_listed.sum(-1).astype(np.int32), order.astype(np.int32)
