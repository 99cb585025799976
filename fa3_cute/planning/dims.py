"""How many columns the tiles of a kernel have, and whether the tensors have as many. Pure Python."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..contract.formats import FP8_HEAD_DIMS, HEAD_DIMS, VALUE_DIMS
from .score_features import Features


@dataclass(frozen=True, kw_only=True)
class DimFields:
    """Fields of every kernel's config, besides head_dim, the columns of Q and K.

    head_dim_v   columns of V and O; 0: head_dim
    is_padded    tensors may have fewer columns than tiles. TMA always goes by those of the tensors; what reads or
                 writes rows without it asks
    """

    head_dim_v: int = 0
    is_padded: bool = False

    if TYPE_CHECKING:  # of the config

        def __getattr__(self, name: str) -> Any: ...

    def dim_rules(self) -> tuple[tuple[bool, str], ...]:
        """(whether it holds, what to say if it does not)."""
        dims = FP8_HEAD_DIMS if self.element_bytes == 1 else HEAD_DIMS
        own = VALUE_DIMS.get((self.element_bytes, self.head_dim), 0)
        return (
            (self.head_dim in dims, f"head_dim={self.head_dim}: must be one of {dims}"),
            (self.head_dim_v in (0, own), f"head_dim_v={self.head_dim_v}: must be {own or 0} or 0, head_dim"),
            (not (self.is_padded and self.box_is_wide), "box_is_wide: not with is_padded"),
        )

    @property
    def dim_qk(self) -> int:
        """Columns of Q and K."""
        return self.head_dim

    @property
    def dim_v(self) -> int:
        """Columns of V and O."""
        return self.head_dim_v or self.head_dim

    @property
    def dims_name(self) -> str:
        """The columns in a name."""
        return f"d{self.head_dim}" + f"v{self.head_dim_v}" * bool(self.head_dim_v) + "_padded" * self.is_padded


def dim_fields(shape: Any, is_by_tma: bool) -> Features:
    """The fields of a problem's config that are not off.

    is_by_tma   nothing but TMA reads or writes rows of Q, K, V and O
    """
    columns, value_columns = shape.tile_dims
    fields = {"head_dim_v": value_columns * (value_columns < columns), "is_padded": shape.is_padded and not is_by_tma}
    return frozenset([(field, value) for field, value in fields.items() if value])


def has_fewer_values(fields: Features) -> bool:
    """Tiles of V have fewer columns than those of K."""
    return any(field == "head_dim_v" for field, _ in fields)
