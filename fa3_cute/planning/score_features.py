"""What a kernel does to scores, as far as that is a choice at compile time. Pure Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    "has_dropout": lambda shape: shape.number("p_dropout") != 0,
}
MODS = ("score_mod", "mask_mod")
Features = frozenset[tuple[str, Any]]
NO_FEATURES: Features = frozenset()


def features_of(shape: Any) -> Features:
    """What a problem asks for."""
    asked = [(field, ask(shape)) for field, ask in FEATURES.items()]
    return frozenset([feature for feature in asked if feature[1]])


@dataclass(frozen=True, kw_only=True)
class ScoreFields:
    """Fields of every kernel's config.

    has_softcap   scores become softcap * tanh(scores / softcap)
    has_alibi     less a slope times the distance from the diagonal
    attn_mask     element type of what is added to them, or "bool": bytes that hide some; "" without
    has_chunks    rows see keys of their own chunk alone
    score_mod, mask_mod   ids of functions of a user (contract/mods.py); "" without
    has_dropout   some probabilities become 0, at random
    """

    has_softcap: bool = False
    has_alibi: bool = False
    attn_mask: str = ""
    has_chunks: bool = False
    score_mod: str = ""
    mask_mod: str = ""
    has_dropout: bool = False

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    @property
    def has_natural_scores(self) -> bool:
        """Scores take softmax_scale, and become what is exponentiated to the base e, before the softmax: something is
        added to them in these units."""
        return self.has_alibi or self.has_bias or bool(self.score_mod)

    @property
    def has_bias(self) -> bool:
        """attn_mask is added to scores."""
        return self.attn_mask not in ("", "bool")

    @property
    def has_mods(self) -> bool:
        """A user's functions are called for every score."""
        return bool(self.score_mod or self.mask_mod)

    @property
    def transforms_scores(self) -> bool:
        """Scores are not raw when the softmax sees them."""
        return self.has_softcap or self.has_natural_scores

    @property
    def feature_names(self) -> str:
        """The features in a name."""
        values = [(field, getattr(self, field)) for field in FEATURES]
        return "".join(
            "_" + field.removeprefix("has_") + f"_{short_name(value) if field in MODS else value}" * (value is not True)
            for field, value in values
            if value
        )
