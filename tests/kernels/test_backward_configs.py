"""The kernels of a backward pass compile clean: a selection that has each of their options."""

import fingerprints
import pytest
from test_merge_configs import LDG, STG, accesses

from fa3_cute.planning.backward_kernels import (
    MASKS,
    KeysConfig,
    MainConfig,
    PrepareConfig,
    SideConfig,
    kernels_of,
)
from fa3_cute.planning.backward_tables import SHORT, TABLE
from fa3_cute.planning.config import REGISTERS_PER_SM, ROWS_PER_WARPGROUP, SMEM_BYTES_PER_CTA
from fa3_cute.planning.one_side import TABLE as ONE_SIDE
from fa3_cute.planning.selections import backward_configs
from fa3_cute.runtime.compiler import compile_and_read

VECTOR = 16  # bytes
MOST_WITHOUT_SUMS = REGISTERS_PER_SM // 512  # whose threads have up to six pieces of rows in flight, of O and of dO
MOST_REGISTERS = REGISTERS_PER_SM // 1024  # around the main kernel: a thousand threads on an SM hide memory's latency


def facts_of(cfg) -> set[tuple]:
    """What of a kernel has to be compiled at least once."""
    kind = type(cfg)
    if kind is MainConfig:
        options = {("mask", cfg.mask, cfg.is_deterministic), ("types", cfg.dtype, cfg.is_varlen)}
        return {(kind, *fact) for fact in {("tiles", cfg.head_dim, cfg.tile_m), *options}}
    if kind in (SideConfig, KeysConfig):
        sides = {("mask", cfg.mask), ("head_dim", cfg.head_dim)}
        return {(kind, *fact) for fact in {*sides, ("types", cfg.dtype), ("lengths", cfg.is_varlen)}}
    return {(kind, "tiles", cfg.head_dim, cfg.tile_m), (kind, "types", cfg.dtype)}


def selection() -> list:
    """Of all kernels some that have all of their facts, each time the one that has most of what is left."""
    facts = {kernel: facts_of(kernel) for cfg in backward_configs() for kernel in kernels_of(cfg)}
    left, chosen = set().union(*facts.values()), []
    while left:
        chosen.append(max(facts, key=lambda cfg: len(left & facts[cfg]) / (256 + cfg.head_dim)))
        left -= facts[chosen[-1]]
    return chosen


CONFIGS = selection()
of_kind = lambda kind: [cfg for cfg in CONFIGS if isinstance(cfg, kind)]


def test_selection_covers_options():
    """Each row's tiles, every mask with sums in an order and without, each gradient; test_configs.py has the record."""
    mains, sides, pairs = of_kind(MainConfig), of_kind(SideConfig), of_kind(KeysConfig)
    rows = {(head_dim, row.tile_m) for table in (TABLE, SHORT) for (head_dim, *_), row in table.items()}
    assert {(cfg.head_dim, cfg.tile_m) for cfg in mains} == rows
    passes = backward_configs()
    every = [kernel for cfg in passes for kernel in kernels_of(cfg) if isinstance(kernel, MainConfig)]
    options = lambda configs: {(cfg.mask, cfg.is_deterministic) for cfg in configs}
    assert options(mains) == options(every)
    assert {(cfg.dtype, cfg.is_varlen) for cfg in mains} == {(cfg.dtype, cfg.is_varlen) for cfg in every}
    for configs in (sides, pairs):
        assert {cfg.dtype for cfg in configs} == {"bf16", "fp16"} and {cfg.is_varlen for cfg in configs} == {
            False,
            True,
        }
        for name, values in (("head_dim", ONE_SIDE), ("mask", MASKS)):
            assert {getattr(cfg, name) for cfg in configs} == set(values)
    assert {type(kernel) for cfg in passes for kernel in kernels_of(cfg)} == {type(cfg) for cfg in CONFIGS}


def compiled(cfg):
    """(Report, its cubin's kernel) of a clean config that is as on record, if it is there."""
    report, kernel = compile_and_read(cfg)
    assert report.problems() == []
    assert report.smem_bytes == cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    known, found = fingerprints.known().get(cfg.name), fingerprints.of_compiled(cfg, report, kernel)
    assert known in (None, found), "the kernel changed: on purpose? make fingerprints, say why"
    return report, kernel


@pytest.mark.parametrize("cfg", of_kind(MainConfig), ids=lambda cfg: cfg.name)
def test_main(cfg):
    report, _ = compiled(cfg)
    assert report.registers == REGISTERS_PER_SM // cfg.num_threads // 8 * 8
    assert report.wgmmas == (wgmmas_of_roles if cfg.is_split else wgmmas)(cfg)


def kinds_of(cfg) -> int:
    """Of iterations: tiles cut by the diagonal, passed first or last; tiles that all see; those of a window's left
    end."""
    return 2 + cfg.is_local + cfg.has_directions


def wgmmas(cfg) -> int:
    """A Q tile is head_dim/16 for S and dP each, tile_m/16 for dV and dK each, and for dQ tile_n/16 per tile of its M;
    the code holds it once per kind of iteration, and where dQ is a Q tile behind once more: the first tile without dQ,
    and the last dQ."""
    tiles_of_dq = cfg.head_dim if cfg.is_dq_transposed else cfg.tile_m
    of_dq = cfg.tile_n // 16 * (tiles_of_dq // (ROWS_PER_WARPGROUP * cfg.num_dq_wgs))
    step, kinds = 2 * cfg.head_dim // 16 + 2 * cfg.tile_m // 16 + of_dq, kinds_of(cfg)
    # In turns: each kind of iteration with dQ and without.
    without = (step - of_dq) * kinds * cfg.is_dq_in_turns
    return step * (kinds + cfg.is_dq_behind) + without


def wgmmas_of_roles(cfg) -> int:
    """Scores: two halves of S and three blocks of gradients in each kind of iteration, S in the first, gradients in the
    last. Products: dP and two blocks, in the loop and in the first and the last. Queries: a block and a third of
    dQ."""
    own, block = cfg.head_dim // 16, cfg.tile_m // 16
    scores = (2 * own + 3 * block) * (kinds_of(cfg) + 1)
    return scores + 2 * (own + 2 * block) + block + cfg.tile_n // 16


@pytest.mark.parametrize("cfg", of_kind(SideConfig), ids=lambda cfg: cfg.name)
def test_one_gradient(cfg):
    """A tile of the other side is head_dim/16 WGMMAs for S, as many for dP but for dV, and tile_columns/16 for the
    gradient; the code holds it once per kind of iteration."""
    report, _ = compiled(cfg)
    assert report.registers == REGISTERS_PER_SM // cfg.num_threads // 8 * 8
    step = (1 + cfg.has_dp) * cfg.head_dim // 16 + cfg.tile_columns // 16
    assert report.wgmmas == step * (3 if cfg.is_local else 2)


@pytest.mark.parametrize("cfg", of_kind(KeysConfig), ids=lambda cfg: cfg.name)
def test_dk_and_dv(cfg):
    """A Q tile is head_dim/16 WGMMAs for S and for dP, and tile_m/16 for each gradient; dK's warpgroup masks nothing:
    the code holds its part once."""
    report, _ = compiled(cfg)
    assert report.registers == REGISTERS_PER_SM // cfg.num_threads // 8 * 8
    of_values, of_keys = ((dim + cfg.tile_m) // 16 for dim in (cfg.dim_qk, cfg.dim_v))
    assert report.wgmmas == of_values * (3 if cfg.is_local else 2) + of_keys


@pytest.mark.parametrize("cfg", of_kind(PrepareConfig), ids=lambda cfg: cfg.name)
def test_prepare(cfg):
    """It is as fast as memory: tensors are read and written 16 bytes at a time."""
    report, kernel = compiled(cfg)
    is_thin = cfg.has_sums and cfg.head_dim not in (96, 192)  # whose threads have three pieces of a row
    assert report.wgmmas == 0 and report.registers <= (MOST_REGISTERS if is_thin else MOST_WITHOUT_SUMS)
    vectors = cfg.tile_m * cfg.head_dim * 2 // VECTOR // cfg.num_threads  # of 16-bit elements
    assert accesses(kernel.code, LDG)[VECTOR] >= 2 * min(2, vectors)  # pieces of O and dO, in a loop
    if cfg.has_sums:
        assert accesses(kernel.code, STG)[VECTOR] >= 2 * vectors
