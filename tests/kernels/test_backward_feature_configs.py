"""Backward kernels with features of scores compile clean: each feature and each kind of kernel, registers being few."""

import pytest

from fa3_cute.planning.backward_kernels import ClearConfig, MainConfig, SideConfig, SinksConfig, kernels_of, pass_config
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.score_features import FEATURES
from fa3_cute.runtime.compiler import compile_and_read

SERVED = ("has_softcap", "has_alibi", "attn_mask", "has_chunks", "has_dropout")
ALL = {"has_softcap": True, "has_alibi": True, "has_chunks": True}
# (dtype, head_dim, mask, is_varlen, is_deterministic), features, the gradient of its kernel; "": of all three
CHOSEN = (
    (("bf16", 64, "full", False, False), {"has_alibi": True}, ""),
    (("fp16", 64, "local", True, True), {"has_chunks": True}, ""),
    (("bf16", 128, "causal", True, True), {"has_softcap": True}, ""),
    (("fp16", 96, "local", True, False), ALL, "dq"),
    (("bf16", 64, "local", True, False), ALL | {"attn_mask": "fp32"}, "d_bias"),
    (("fp16", 256, "causal", True, False), {"attn_mask": "bool"}, "dv"),
    (("bf16", 128, "local", True, False), ALL | {"attn_mask": "bool", "has_dropout": True}, "dk"),
)


def config_of(row: tuple, features: dict, side: str) -> MainConfig | SideConfig:
    """Of the pass that the tables have."""
    kernels = kernels_of(pass_config(*row, frozenset(features.items())))
    (found,) = (cfg for cfg in kernels if isinstance(cfg, MainConfig) or getattr(cfg, "side", "no side") == side)
    return found


CONFIGS = [config_of(*facts) for facts in CHOSEN]


def test_selection_covers_features():
    asked = {field for _, features, _ in CHOSEN for field in features}
    assert asked == set(SERVED) <= set(FEATURES)
    assert {getattr(cfg, "side", "") for cfg in CONFIGS} == {"", "dq", "dk", "dv", "d_bias"}


@pytest.mark.parametrize("cfg", [*CONFIGS, SinksConfig(), ClearConfig()], ids=lambda cfg: cfg.name)
def test_compiles_clean(cfg):
    report, _ = compile_and_read(cfg)
    assert report.problems() == [] and report.smem_bytes == cfg.smem_bytes <= SMEM_BYTES_PER_CTA
