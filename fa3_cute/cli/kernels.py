"""Which kernels the options of `compile` and `inspect` name, and what of them goes together."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from .. import AttentionMode, DataType, FlashAttentionParams, explain
from ..contract.formats import (
    ELEMENT_BYTES,
    FP8,
    LARGE_DIM,
    MLA_DIMS,
    PARTIAL,
    SERVED_DIMS,
    VALUE_DIMS,
    WIDE_DIMS,
    tile_dims,
)
from ..contract.mla import SMALLEST_PAGE
from ..contract.status import Problem
from ..planning.append import all_append_configs
from ..planning.config import DecodeConfig, FwdConfig
from ..planning.decode_append import AppendingConfig, may_append
from ..planning.decode_append import appending as with_append
from ..planning.merge import all_merge_configs
from ..planning.mla import MlaConfig, all_mla_configs
from ..planning.score_features import Features
from ..planning.selections import appending_configs, cached_fp8_configs, dim_configs, mla_configs
from ..planning.tables import (
    DENSE,
    KeySource,
    configs_over,
    decode_config,
    dense_configs,
    forward_config,
    fp8_cache_configs,
    interned,
    packed_config,
)

# Of Q and K that have kernels, with some head_dim_v and in some element type.
HEAD_DIMS = (*sorted(SERVED_DIMS), LARGE_DIM, MLA_DIMS[0])
Dims = tuple[int, int]  # columns of Q and K, and of V and O
ADDRESS = 1 << 20  # stands for any tensor


def misplaced(args, kind: str, others: Iterable[str]) -> str | None:
    """What to say if one of these options is given, which means nothing beside that one; None if none is."""
    given = next((name for name in others if getattr(args, name) not in (None, False, "")), None)
    return given and f"--{given.replace('_', '-')}: not with --{kind}, whose kernels do not differ in it"


@cache
def problem_of(dtype: str, kv_dtype: str | None, dims: Dims, has_qv: bool) -> Problem | None:
    """Why `forward` would refuse every call of these columns and types, if it would."""
    head_dim, head_dim_v = dims
    pointers: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out"), ADDRESS) | {"q_v": ADDRESS if has_qv else None}
    problems = explain(
        FlashAttentionParams(
            **pointers,
            mode=AttentionMode.DECODE,
            batch_size=1,
            seqlen_q=1,
            seqlen_k=1,
            num_heads=1,
            num_heads_k=1,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=DataType[dtype.upper()],
            kv_dtype=DataType[kv_dtype.upper()] if kv_dtype else None,
        )
    )
    return problems[0] if problems else None


def dim_fields(dtype: str, dims: Dims, is_by_tma: bool) -> tuple[int, Features]:
    """The columns of tiles of Q and K for tensors of these, and the fields of a config that go by them.

    is_by_tma   nothing but TMA reads or writes rows of Q, K, V and O
    """
    tiles = tile_dims(ELEMENT_BYTES[dtype], *dims)
    fields = {"head_dim_v": tiles[1] * (tiles[1] < tiles[0]), "is_padded": tiles != dims and not is_by_tma}
    return tiles[0], frozenset((field, value) for field, value in fields.items() if value)


# ---- of calls of attention -------------------------------------------------------------------------------------------


def of_tables(page_size: int | None) -> list[FwdConfig | DecodeConfig]:
    """Every config of the tables and of 512 columns of V: of dense and packed tensors, of pages of so many rows, 0: of
    a cache without pages."""
    if page_size is None:
        return [*dense_configs(), *all_mla_configs()]
    wide = [] if page_size % SMALLEST_PAGE else all_mla_configs(KeySource(True, page_size, page_size > 0))
    return [*configs_over(page_size), *wide]


def fitted(cfg: FwdConfig | DecodeConfig, dims: Dims, page_size: int | None) -> FwdConfig | DecodeConfig | None:
    """The config that serves tensors of these columns where this one, `of_tables`, serves those of its tiles; None if
    that is another one."""
    if isinstance(cfg, MlaConfig) or dims in WIDE_DIMS:
        return cfg if (cfg.dim_qk, cfg.dim_v) == dims else None
    is_forward = isinstance(cfg, FwdConfig)
    columns, fields = dim_fields(
        cfg.dtype, dims, is_by_tma=is_forward and not (cfg.is_varlen or cfg.out_dtype == PARTIAL)
    )
    if cfg.head_dim != columns or not fields:
        return cfg if cfg.head_dim == columns else None
    source = DENSE
    if page_size is not None:
        is_wide = page_size > 0 and page_size % SMALLEST_PAGE == 0 and ("is_padded", True) not in fields
        source = KeySource(True, page_size, is_wide)
    if not is_forward:
        return decode_config(cfg.dtype, columns, cfg.is_local, cfg.out_dtype, fields, source, cfg.kv_dtype)
    facts = cfg.mask, cfg.has_lse, cfg.is_varlen, cfg.out_dtype
    found = forward_config(cfg.dtype, columns, *facts, fields, source)
    return packed_config(found, cfg.packed_heads) if cfg.packs_heads else found


def with_partials(configs: Iterable[FwdConfig | DecodeConfig]) -> list[FwdConfig | DecodeConfig]:
    """These, and the same with O in FP32 that is to be merged."""
    found = list(configs)
    return found + [interned(replace(cfg, out_dtype=PARTIAL)) for cfg in found if may_be_partial(cfg)]


def may_be_partial(cfg: FwdConfig | DecodeConfig) -> bool:
    """There is the same kernel with O in FP32."""
    return cfg.out_dtype in (None, "bf16") and not (isinstance(cfg, FwdConfig) and cfg.packs_heads)


# ---- beside these ----------------------------------------------------------------------------------------------------


def beside_tables() -> list[Any]:
    """What stands for kernels that are too many to be in the tables: those that tests choose, of 512 columns of V, of
    head_dim_v and of columns that tiles have and tensors have not, of 16-bit queries over FP8 keys; those of a cache
    and of pages; decode steps that append; and all that append and rotate ahead of attention, and that merge."""
    selections = mla_configs(), dim_configs(), cached_fp8_configs(), appending_configs()
    launched_beside = all_append_configs(), all_merge_configs()
    return [cfg for configs in (*selections, over_caches(), *launched_beside) for cfg in configs]


def over_caches() -> list[Any]:
    """Of 16-bit queries over FP8 keys every kernel over a cache and over pages of 64, of 16 and of a row; in BF16 those
    of 512 columns of V, without the last, and those of fewer columns of V than of K, dense, packed and over pages of 64
    rows."""
    small, sources = KeySource(True, 1), (KeySource(True), KeySource(True, 16), KeySource(True, 64))
    found: list[Any] = [cfg for source in (*sources, small) for cfg in fp8_cache_configs(source)]
    found += [cfg for source in (*sources, KeySource(True, 64, True)) for cfg in all_mla_configs(source)]
    for page_size in (None, 0, 64):
        tables = [cfg for cfg in of_tables(page_size) if cfg.dtype != FP8]
        for (_, columns), dim_v in VALUE_DIMS.items():
            found += [other for cfg in tables if (other := fitted(cfg, (columns, dim_v), page_size))]
    return [cfg for cfg in found if cfg.kv_dtype or cfg.dtype == "bf16"]


def appending(dtypes: Collection[str], kv_dtypes: Collection[str]) -> list[Any]:
    """What appends rows of such types to caches of such types, or rotates, ahead of attention."""
    return [cfg for cfg in all_append_configs() if cfg.dtype in dtypes and (cfg.kv_dtype or cfg.dtype) in kv_dtypes]


def appending_steps(dims: Collection[Dims], page_size: int) -> list[AppendingConfig]:
    """Every decode kernel that appends a row to each sequence itself, over a cache or over pages; dims: of tensors of
    these columns, if any are named. Rotary tables are of the other 16-bit type nowhere."""
    found: list[Any] = [cfg for cfg in of_tables(page_size) if may_append(cfg)]
    if dims:
        served = [(cfg, own) for cfg in found for own in dims if not problem_of(cfg.dtype, None, own, False)]
        found = [other for cfg, own in served if (other := fitted(cfg, own, page_size)) and may_append(other)]
    turned = [cfg for cfg in all_append_configs() if not cfg.kv_dtype]
    return [with_append(cfg, own.rotary, own.table_dtype) for cfg in found for own in turned if own.dtype == cfg.dtype]


def merging(dtypes: Collection[str], out_dtypes: Collection[str]) -> list[Any]:
    """What merges results of such types into such."""
    return [cfg for cfg in all_merge_configs() if cfg.dtype in dtypes and cfg.out_dtype in out_dtypes]


def is_over_fp8(cfg: Any) -> bool:
    """16-bit queries over FP8 keys."""
    return cfg.dtype != FP8 and getattr(cfg, "kv_dtype", None) == FP8
