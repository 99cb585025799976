"""Decode steps whose one new key and value of each sequence the decode kernel itself rotates, writes to the cache and
attends to: no launch ahead of it. Pure Python.
"""

from dataclasses import dataclass, fields
from functools import cache

from ..contract.append import DECODE_APPEND_ENTRY
from .config import DecodeConfig
from .tables import interned


@dataclass(frozen=True)
class AppendingConfig(DecodeConfig):
    """A DecodeConfig of steps that append.

    rotary, table_dtype   of AppendConfig
    """

    rotary: str = ""
    table_dtype: str = ""

    entries = {"append": DECODE_APPEND_ENTRY}
    entry_name = "append"

    def rules(self) -> tuple[tuple[bool, str], ...]:
        is_plain = not (self.is_fp8 or self.widens or self.is_padded or self.has_leftpad or self.has_mods)
        return (
            *super().rules(),
            (self.is_ragged, "is_ragged: lengths are on the device where rows are appended"),
            (is_plain, "FP8, is_padded, has_leftpad, mods: not in a kernel that appends"),
        )

    @property
    def name(self) -> str:
        return super().name + "_append" + f"_{self.rotary}_{self.table_dtype}" * bool(self.rotary)


@cache
def appending(cfg: DecodeConfig, rotary: str, table_dtype: str) -> AppendingConfig:
    """A DecodeConfig's, with what is appended and turned besides."""
    own = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return interned(AppendingConfig(**own, rotary=rotary, table_dtype=table_dtype))
