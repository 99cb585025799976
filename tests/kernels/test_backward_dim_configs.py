"""Backward kernels of head dims that the tables do not have compile clean: each kind, padded, and with V of its own."""

import pytest

from fa3_cute.planning.backward_kernels import (
    KeysConfig,
    MainConfig,
    PrepareConfig,
    SideConfig,
    kernels_of,
)
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.selections import backward_dim_configs
from fa3_cute.runtime.compiler import compile_and_read


def chosen() -> list:
    """Of the selection: of each main kernel's tile_m one, and what is around it; of the kernels of one or two gradients
    those of (192, 128), padded and not, and of another padded one."""
    found = {}
    for cfg in backward_dim_configs():
        for kernel in kernels_of(cfg):
            key = type(kernel), kernel.tile_m
            if isinstance(kernel, SideConfig | KeysConfig):
                key = type(kernel), kernel.head_dim_v, kernel.is_padded
            elif isinstance(kernel, PrepareConfig):
                key = type(kernel), kernel.is_padded
            found[key] = kernel
    return list(found.values())


CONFIGS = chosen()


def test_selection_covers_kinds():
    assert {type(cfg) for cfg in CONFIGS} == {PrepareConfig, MainConfig, SideConfig, KeysConfig}
    for kind in (SideConfig, KeysConfig):
        own = [cfg for cfg in CONFIGS if isinstance(cfg, kind)]
        assert {(cfg.head_dim_v, cfg.is_padded) for cfg in own} >= {(0, True), (128, False), (128, True)}


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_compiles_clean(cfg):
    """S has head_dim/16 WGMMAs and dP as many as its dim; a padded kernel has those of its tiles."""
    report, _ = compile_and_read(cfg)
    assert report.problems() == [] and report.smem_bytes == cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    if isinstance(cfg, SideConfig):
        step = cfg.dim_qk // 16 + cfg.has_dp * cfg.dim_v // 16 + cfg.tile_columns // 16
        assert report.wgmmas == step * (3 if cfg.is_local else 2)
    if isinstance(cfg, KeysConfig):
        of_values, of_keys = ((dim + cfg.tile_m) // 16 for dim in (cfg.dim_qk, cfg.dim_v))
        assert report.wgmmas == of_values * (3 if cfg.is_local else 2) + of_keys
