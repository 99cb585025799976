"""Every config that a supported call can need compiles clean: no spill, no serialised WGMMA, within its budgets.

All of them, also where they differ in a type only: it is the compiler that has to agree.
"""
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from fa3_cute.config import REGISTERS_PER_SM, SMEM_BYTES_PER_CTA
from fa3_cute.heuristics import all_configs

CONFIGS = all_configs()
PROCESSES = min(4, os.cpu_count() or 1)       # a compile takes 3 s of one core and 300 MB


def _report(cfg):
    from fa3_cute.compiler import compile_report

    return compile_report(cfg)


@pytest.fixture(scope="module")
def reports():
    """{config: future of its Report}: all compiles run while the tests look at the first results."""
    pool = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield {cfg: pool.submit(_report, cfg) for cfg in CONFIGS}
    finally:
        pool.shutdown(cancel_futures=True)


def test_names_are_unique():
    assert len({cfg.name for cfg in CONFIGS}) == len(set(CONFIGS)) == len(CONFIGS)


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_compiles_clean(reports, cfg):
    report = reports[cfg].result()
    assert report.problems() == []
    assert report.smem_bytes <= cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    most_registers = REGISTERS_PER_SM // (cfg.num_threads * cfg.ctas_per_sm) // 8 * 8
    assert report.registers == most_registers if cfg.uses_setmaxnreg else report.registers <= most_registers
    # One step is head_dim/16 WGMMAs for QK and tile_n/16 for PV, in FP8 half of that; the code holds it once per kind
    # of iteration.
    step = (cfg.head_dim + cfg.tile_n) // (32 if cfg.is_fp8 else 16)
    assert step <= report.wgmmas <= 8 * step
