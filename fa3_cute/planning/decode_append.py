"""Decode steps whose one new key and value of each sequence the decode kernel itself rotates, writes to the cache and
attends to: no launch ahead of it. Pure Python.
"""

from dataclasses import dataclass, fields
from functools import cache

from ..contract.append import DECODE_APPEND_ENTRY
from .append import AppendShape
from .config import DecodeConfig, KernelConfig
from .problem import ProblemShape
from .tables import interned

# What the new row, turned, adds to a step of sequences x keys. H200, 2026-11-30, the method of `bench --suite append`,
# BF16, 16:2 and 32:8 heads of 128, contiguous and in pages of 64. Of these 12 steps one, 1x4k of 32:8 heads,
# contiguous, takes 0.2 less in two launches.
ONE_LAUNCH = "1x4k +0.6-1.6 us, 16x8k +0.2-1.6, 64x4k +0.4-1.4; in two launches +1.2-1.5, +1.5-3.5, +1.6-4.2"


@dataclass(frozen=True)
class AppendingConfig(DecodeConfig):
    """A DecodeConfig of steps that append.

    rotary, table_dtype   of AppendConfig
    """

    rotary: str = ""
    table_dtype: str = ""

    entries = {"append": DECODE_APPEND_ENTRY}

    @property
    def entry_name(self) -> str:
        return "append"

    def rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            *super().rules(),
            (may_append(self), "FP8, is_padded, has_leftpad, mods, or not is_ragged: not in a kernel that appends"),
        )

    @property
    def name(self) -> str:
        return super().name + "_append" + f"_{self.rotary}_{self.table_dtype}" * bool(self.rotary)


def may_append(cfg: KernelConfig) -> bool:
    """Whether a kernel like this one may append as well."""
    if type(cfg) not in (DecodeConfig, AppendingConfig):
        return False
    other = cfg.has_descales or cfg.is_padded or cfg.has_leftpad or cfg.has_mods
    return cfg.is_ragged and not other


def appends_one_row(append: AppendShape) -> bool:
    """Whether what is ahead of attention is one new row of each sequence, stored as it is given."""
    return (
        append.has_new and not append.packed_new and append.num_new == append.batch_size and not append.config.kv_dtype
    )


@cache
def appending(cfg: DecodeConfig, rotary: str, table_dtype: str) -> AppendingConfig:
    """A DecodeConfig's, with what is appended and turned besides."""
    own = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return interned(AppendingConfig(**own, rotary=rotary, table_dtype=table_dtype))


def launched(shape: ProblemShape) -> ProblemShape:
    """What a launch of an AppendingConfig takes: there is nothing ahead of it, and its entry has more at its end."""
    append = shape.append
    return shape._replace(append=None, mod_values=append.of_decode) if append else shape
