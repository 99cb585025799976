"""What a kernel does to scores, as far as that is a choice at compile time. Pure Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract.arguments import Entry
from ..contract.mods import short_name

# What a call may ask for that changes the inner loop: {field of both configs: what a ProblemShape asks for}; what is
# off is false there.
FEATURES: dict[str, Callable[[Any], Any]] = {
    "has_softcap": lambda shape: shape.number("softcap") != 0,
    "has_alibi": lambda shape: shape.has_alibi,
    "attn_mask": lambda shape: shape.attn_mask,
    "has_chunks": lambda shape: shape.attention_chunk != 0,
    "score_mod": lambda shape: shape.score_mod,
    "mask_mod": lambda shape: shape.mask_mod,
    "has_block_lists": lambda shape: shape.has_block_lists,
    "has_dropout": lambda shape: shape.number("p_dropout") != 0,
}
MODS = ("score_mod", "mask_mod")
STAGED_KEYS = 32  # of a row of a staged attn_mask that a warp copies at once (kernels/common/staged_mask.py)
HEAVY = ("attn_mask", *MODS)  # features that need registers beside the scores
Features = frozenset[tuple[str, Any]]
NO_FEATURES: Features = frozenset()


def features_of(shape: Any) -> Features:
    """What a problem asks for."""
    return frozenset([(field, value) for field, ask in FEATURES.items() if (value := ask(shape))])


def has_mods(features: Features) -> bool:
    """A user's functions are among them."""
    return any(field in MODS for field, _ in features)


def take_registers(features: Features) -> bool:
    """Some of them spill where tiles are as large as without."""
    return any(field in HEAVY for field, _ in features)


@dataclass(frozen=True, kw_only=True)
class ScoreFields:
    """Fields of every kernel's config.

    has_softcap   scores become softcap * tanh(scores / softcap)
    has_alibi     less a slope times the distance from the diagonal
    attn_mask     element type of what is added to them, or "bool": bytes that hide some; "" without
    has_chunks    rows see keys of their own chunk alone
    score_mod, mask_mod   ids of functions of a user (contract/mods.py); "" without
    has_block_lists   lists say which K/V tiles a Q tile visits (contract/block_mask.py)
    has_dropout   some probabilities become 0, at random
    """

    has_softcap: bool = False
    has_alibi: bool = False
    attn_mask: str = ""
    has_chunks: bool = False
    score_mod: str = ""
    mask_mod: str = ""
    has_block_lists: bool = False
    has_dropout: bool = False

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    def score_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        has_right_rows = not self.has_block_lists or self.has_mods and not self.is_varlen
        return (
            (has_right_rows, "has_block_lists: with mods, not is_varlen"),
            (self.is_local or not self.has_chunks, "has_chunks: only with is_local, chunks are windows"),
            (
                not self.stages_mask or self.tile_n % STAGED_KEYS == 0,
                f"tile_n={self.tile_n}: must be a multiple of {STAGED_KEYS} with attn_mask={self.attn_mask!r}, staged",
            ),
        )

    @property
    def has_natural_scores(self) -> bool:
        """Scores take softmax_scale, and become what is exponentiated to the base e, before the softmax: something is
        added to them in these units. ALiBi's slopes are turned into units of raw scores instead, where these have one
        unit."""
        is_one_unit = not self.has_softcap and not self.is_fp8
        return self.has_alibi and not is_one_unit or self.has_bias or bool(self.score_mod)

    @property
    def has_bias(self) -> bool:
        """attn_mask is added to scores."""
        return self.attn_mask not in ("", "bool")

    @property
    def has_mods(self) -> bool:
        """A user's functions are called for every score."""
        return bool(self.score_mod or self.mask_mod)

    @property
    def entry(self) -> Entry:
        """What the kernel takes."""
        return self.entries[self.entry_name]

    @property
    def entry_name(self) -> str:
        """Of the entries that a kernel may have: "mods", "leftpad", or "", the one of most kernels."""
        return "mods" if self.has_mods else "leftpad" if self.has_leftpad else ""

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """(name, kind) of each."""
        return self.entry.arguments

    @property
    def kernel(self) -> str:
        """The class of the kernel, by its whole name."""
        folder, name = self.kernel_class
        of = self.entry_name
        return f"fa3_cute.kernels.{folder}." + (f"with_{of}.{name}With{of.title()}" if of else f"kernel.{name}")

    @property
    def takes_registers(self) -> bool:
        """See take_registers."""
        return any(getattr(self, field) for field in HEAVY)

    @property
    def stages_mask(self) -> bool:
        """attn_mask passes through shared memory: of 16-bit elements, where there is room; each K/V tile is followed
        by the one before it, which block lists do not promise."""
        return (
            self.has_bias and self.attn_mask != "fp32" and not (self.is_fp8 or self.splits_keys or self.has_block_lists)
        )

    @property
    def mask_row_bytes(self) -> int:
        """Between the rows of a staged attn_mask (kernels/common/staged_mask.py)."""
        return 2 * self.tile_n + 16

    @property
    def mask_slot_bytes(self) -> int:
        """A warp's rows of a staged attn_mask: it fills them itself, without mbarriers."""
        return 16 * self.mask_row_bytes

    @property
    def mod_names(self) -> str:
        """Those functions, as messages name them; "" without."""
        mods = [(field, getattr(self, field)) for field in MODS]
        return " and ".join(f"{field} {value.rpartition('_')[0]}" for field, value in mods if value)

    @property
    def transforms_scores(self) -> bool:
        """Scores are not raw when the softmax sees them."""
        return self.has_softcap or self.has_alibi or self.has_natural_scores

    @property
    def feature_names(self) -> str:
        """The features in a name."""
        values = [(field, getattr(self, field)) for field in FEATURES]
        return "".join(
            "_" + field.removeprefix("has_") + f"_{short_name(value) if field in MODS else value}" * (value is not True)
            for field, value in values
            if value
        )
