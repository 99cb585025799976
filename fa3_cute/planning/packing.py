"""Heads that share the M tiles of the forward kernel, and the windows that this is good for. Pure Python.

A tile of 128 rows of one head spans 255 keys of a window of 128, which lie in 2 tiles of 128 or in 3; 24 queries of 8
heads span 151: a single tile of 160, if it starts with the first of them. Of wide windows both span about the same.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract.formats import ELEMENT_BYTES
from .key_source import is_apart
from .problem import ProblemShape
from .score_features import FEATURES, features_of

PACKED_HEADS = (8, 4, 2)  # of one KV head, that may share a tile
PACKED_HEAD_DIMS = (64, 128)
# {(head_dim, packed heads): keys that a query sees, up to which packing is faster}. Time with packed heads by time
# without, of (127, 0), (255, 0), (383, 0), (511, 0), (1023, 0); 8 KV heads, 2 x 8k tokens, BF16, H200, 2026-11-29.
MOST_KEYS = {
    (64, 8): 1024,  # 0.63, 0.83, -, 0.92, 0.92; the last 1.02 with the tile of two warpgroups
    (64, 4): 256,  # 0.76, 0.96, 1.01, -, -
    (64, 2): 128,  # 0.87, 1.09, 1.18, -, -
    (128, 8): 512,  # 0.77, 0.87, 0.92, 0.94, -
    (128, 4): 1024,  # 0.81, 0.92, 0.97, 1.01, 0.97
    (128, 2): 128,  # 0.89, 1.08, 0.99, -, -
}
# The same with lengths on the device, of what has another tile there (tables.PACKED_VARLEN).
MOST_KEYS_VARLEN = {(64, 8): 512}
# Features that know keys by their distance from the diagonal, or not at all. The others ask for their places in the
# sequence, and K/V tiles of packed heads do not count from its first key.
PACKED_FEATURES = frozenset({"has_softcap", "has_alibi"})


@dataclass(frozen=True, kw_only=True)
class PackedFields:
    """A field of the forward kernel's config.

    packed_heads   query heads of one KV head that share an M tile: its rows are tile_m / packed_heads queries x
                   packed_heads heads, heads fastest. Of a window, K/V tiles are counted from the first key that some
                   row of the M tile sees
    """

    packed_heads: int = 1

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    def packing_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        return (
            (self.packed_heads in (1, *PACKED_HEADS), f"packed_heads={self.packed_heads}: must be 1, 2, 4 or 8"),
            (
                not self.packs_heads or self.out_dtype is None and not self.is_ragged,
                "packed_heads: only with 16-bit elements in and out, and not with is_ragged",
            ),
            (
                not (self.packs_heads and any(getattr(self, field) for field in set(FEATURES) - PACKED_FEATURES)),
                "packed_heads: not with features that ask for the places of keys",
            ),
        )

    @property
    def packs_heads(self) -> bool:
        """Consecutive rows of a tile are heads of one query."""
        return self.packed_heads > 1

    @property
    def queries_per_tile(self) -> int:
        """Whose rows are an M tile."""
        return self.tile_m // self.packed_heads

    @property
    def packing_name(self) -> str:
        """The packed heads in a name."""
        return f"_heads{self.packed_heads}" if self.packs_heads else ""


def packed_heads_of_window(shape: ProblemShape) -> int:
    """Query heads that share an M tile of the forward kernel; 1: they are not packed.

    pack_gqa=True packs the heads of any window that there are kernels for.
    """
    if shape.mask != "local" or shape.pack_gqa is False or not is_packable(shape):
        return 1
    group = shape.num_heads // shape.num_heads_k
    heads = next((heads for heads in PACKED_HEADS if group % heads == 0), 1)
    is_small = shape.window_left + shape.window_right < most_keys(shape.tile_dims[0], heads, shape.has_lengths)
    return heads if is_small or shape.pack_gqa else 1


def most_keys(head_dim: int, packed_heads: int, has_lengths: bool) -> int:
    """That a query of a window sees, up to which so many heads are packed."""
    key = head_dim, packed_heads
    return has_lengths and MOST_KEYS_VARLEN.get(key) or MOST_KEYS.get(key, 0)


def is_packable(shape: ProblemShape) -> bool:
    """Whether there are kernels for it: of 16-bit elements in and out, of keys that lie as the queries do. Those in a
    cache have the bits of the same keys in pages, whose tiles start at multiples of a box."""
    is_16_bit = ELEMENT_BYTES[shape.dtype] == 2 and shape.out_dtype is None
    has_row = is_16_bit and shape.tile_dims[0] in PACKED_HEAD_DIMS and not is_apart(shape)
    return has_row and PACKED_FEATURES.issuperset(field for field, _ in features_of(shape))
