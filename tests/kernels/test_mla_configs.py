"""MLA kernels compile clean: a dense one, a causal one of ragged batches, one over wide pages, one over narrow ones."""

import pytest
from fingerprints import fingerprint, known

from fa3_cute.planning.config import REGISTERS_PER_SM
from fa3_cute.planning.mla import mla_config
from fa3_cute.planning.tables import DENSE, KeySource

CONFIGS = [
    mla_config("bf16", False, None, DENSE),
    mla_config("fp16", True, None, KeySource(True)),
    mla_config("bf16", True, None, KeySource(True, 64, True)),
    mla_config("fp16", False, "fp32", KeySource(True, 16)),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_compiles_clean(cfg):
    report, found = fingerprint(cfg)
    assert report.problems() == [] and not report.notes
    assert report.registers == REGISTERS_PER_SM // cfg.num_threads // 8 * 8
    assert report.smem_bytes == cfg.smem_bytes
    # S, 36 of them, for each kind of tile; P V, four, for each but the first and after the last, and for the other half
    kinds = 3 if cfg.is_local else 2
    assert report.wgmmas == 36 * kinds + 4 * kinds + 4
    assert found == known().get(cfg.name, found), "the kernel changed: on purpose? make fingerprints, say why"
