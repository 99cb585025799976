"""Where a kernel's K and V come from, as far as that is a choice at compile time. Pure Python."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rings import WARP

# Features for which keys count from a sequence's first row, whether it exists or not.
KEY_PLACES = ("attn_mask", "score_mod", "mask_mod", "has_dropout")
PAGE_BOXES = (64, 32, 16, 8, 1)  # rows of a page that TMA brings at once; 1: rows come one by one with cp.async


@dataclass(frozen=True, kw_only=True)
class KeySourceFields:
    """Fields of every kernel's config.

    is_ragged     queries packed or not, keys packed, in a cache or in pages, as arrays on the device say
    page_box      rows of K or V that are copied at once where they lie in pages, else 0
    box_is_wide   a box takes all columns at once (kernels/common/pages.py)
    has_leftpad   the first rows of a sequence's keys do not exist, as many as an array says: its K/V tiles are counted
                  from the first one that does
    """

    is_ragged: bool = False
    page_box: int = 0
    box_is_wide: bool = False
    has_leftpad: bool = False

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    def source_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        return (
            (
                self.page_box == 0 or self.page_box in PAGE_BOXES and self.tile_n % self.page_box == 0,
                f"page_box={self.page_box}: must be one of {PAGE_BOXES} that divides tile_n={self.tile_n}, or 0",
            ),
            (self.is_varlen or not self.is_ragged, "is_ragged: only with is_varlen"),
            (self.is_ragged or not self.page_box, "page_box: only with is_ragged"),
            (self.page_box > 1 or not self.box_is_wide, "box_is_wide: only with page_box, of TMA"),
            (self.is_ragged or not self.has_leftpad, "has_leftpad: only with is_ragged"),
            (
                self.page_box in (0, 1) or not self.has_leftpad,
                "has_leftpad: in pages only row by row, page_box=1; a box has its place in a page",
            ),
            (
                not (self.has_leftpad and any(getattr(self, field) for field in KEY_PLACES)),
                f"has_leftpad: not with {', '.join(KEY_PLACES)}, which ask for the places of keys",
            ),
            (
                not (self.box_is_wide and self.has_descales),
                "box_is_wide: not with FP8, which consumers read by addresses",
            ),
        )

    @property
    def reads_rows(self) -> bool:
        """K and V come row by row with cp.async, from pages of sizes that TMA has no boxes for."""
        return self.page_box == 1

    @property
    def num_kv_arrivals(self) -> int:
        """That fill a slot of K or V: one of each lane that copies rows; else one, and TMA's bytes."""
        return WARP if self.reads_rows else 1

    @property
    def source_name(self) -> str:
        """Where K and V come from, in a name."""
        box = f"_p{self.page_box}{'w' * self.box_is_wide}" if self.page_box else ""
        return "_ragged" * self.is_ragged + box + "_leftpad" * self.has_leftpad


def is_apart(shape: Any) -> bool:
    """Whether keys lie otherwise than queries do, dense or packed both: in a cache or in pages, by an index or behind
    padding; or rows without any are to be filled."""
    is_split = shape.is_packed and not shape.has_packed_keys
    is_elsewhere = shape.length("kv_batch_idx") != 0 or shape.length("leftpad_k") != 0
    return is_split or shape.is_paged or is_elsewhere or shape.zero_padding
