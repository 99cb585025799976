"""Backward kernels of head dims that the tables do not have compile clean: each kind, padded, and with V of its own."""

import pytest

from fa3_cute.planning.backward_kernels import FinishConfig, MainConfig, PrepareConfig, SideConfig, kernels_of
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.one_side import SIDES
from fa3_cute.planning.selections import backward_dim_configs
from fa3_cute.runtime.compiler import compile_and_read


def chosen() -> list:
    """Of the selection: of each main kernel's tile_m one, and what is around it; of the kernels of one gradient each
    gradient once, of a padded head_dim, of (192, 128) and of that padded, in turn."""
    found, sides = {}, set(zip(SIDES, ((0, True), (128, False), (128, True)), strict=True))
    for cfg in backward_dim_configs():
        for kernel in kernels_of(cfg):
            key = type(kernel), kernel.tile_m
            if isinstance(kernel, SideConfig):
                key = kernel.side, (kernel.head_dim_v, kernel.is_padded)
            elif isinstance(kernel, PrepareConfig):
                key = type(kernel), kernel.is_padded
            if not isinstance(kernel, SideConfig) or key in sides:
                found[key] = kernel
    return list(found.values())


CONFIGS = chosen()


def test_selection_covers_kinds():
    assert {type(cfg) for cfg in CONFIGS} == {PrepareConfig, MainConfig, FinishConfig, SideConfig}
    sides = [cfg for cfg in CONFIGS if isinstance(cfg, SideConfig)]
    assert {(cfg.head_dim_v, cfg.is_padded) for cfg in sides} == {(0, True), (128, False), (128, True)}
    assert {cfg.side for cfg in sides} == set(SIDES)


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_compiles_clean(cfg):
    """S has head_dim/16 WGMMAs and dP as many as its dim; a padded kernel has those of its tiles."""
    report, _ = compile_and_read(cfg)
    assert report.problems() == [] and report.smem_bytes == cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    if isinstance(cfg, SideConfig):
        step = cfg.dim_qk // 16 + cfg.has_dp * cfg.dim_v // 16 + cfg.tile_columns // 16
        assert report.wgmmas == step * (3 if cfg.is_local else 2)
