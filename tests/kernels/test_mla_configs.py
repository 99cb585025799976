"""MLA kernels, those of q_v and of heads of 512 compile clean: dense ones, causal ones of ragged batches, over wide
pages and over narrow ones."""

import pytest
from fingerprints import fingerprint, known

from fa3_cute.planning.config import REGISTERS_PER_SM
from fa3_cute.planning.selections import mla_configs


@pytest.mark.parametrize("cfg", mla_configs(), ids=lambda cfg: cfg.name)
def test_compiles_clean(cfg):
    report, found = fingerprint(cfg)
    assert report.problems() == [] and not report.notes
    assert report.registers == REGISTERS_PER_SM // cfg.num_threads // 8 * 8
    assert report.smem_bytes == cfg.smem_bytes
    # S for each kind of tile; P V for each but the first and after the last, and for the other half
    kinds, columns = 3 if cfg.is_local else 2, cfg.dim_qk + cfg.dim_v * cfg.has_qv
    assert report.wgmmas == columns // 16 * kinds + cfg.tile_n // 16 * (kinds + 1)
    assert found == known().get(cfg.name, found), "the kernel changed: on purpose? make fingerprints, say why"
