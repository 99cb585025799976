"""Configs compile clean: no spill, no serialised WGMMA, within their budgets, and to the code that is on record.

A covering selection is compiled; of all others the record must be clean. `make fingerprints` compiles all of them, and
`python tests/support/fingerprints.py --check` compares.
"""

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import fingerprints
import pytest

from fa3_cute.contract.formats import PARTIAL
from fa3_cute.kernels.common.score_mask import MASK_TYPES
from fa3_cute.planning.config import REGISTERS_PER_SM, SMEM_BYTES_PER_CTA, DecodeConfig, FwdConfig
from fa3_cute.planning.decode_rows import DECODE
from fa3_cute.planning.key_source import PAGE_BOXES
from fa3_cute.planning.score_features import FEATURES, MODS
from fa3_cute.planning.selections import (
    all_configs,
    feature_configs,
    ragged_configs,
)
from fa3_cute.planning.tables import (
    DTYPES,
    FORWARD,
    PACKED,
    KeySource,
    all_decode_configs,
    all_forward_configs,
    forward_config,
)

PROCESSES = min(4, os.cpu_count() or 1)  # a compile takes 3 s of one core and 300 MB


def kind_of(cfg) -> tuple:
    """What the code of a ragged batch's kernel follows from besides its row: kernel, bytes per element, source."""
    return type(cfg), cfg.element_bytes, cfg.page_box > 0, cfg.box_is_wide, cfg.reads_rows


def feature_of(cfg) -> tuple | None:
    """(field, value) of its feature of scores, if it has one."""
    return next(((field, getattr(cfg, field)) for field in FEATURES if getattr(cfg, field)), None)


def packed_heads(cfg) -> int:
    """Of a forward kernel whose tiles have the rows of several heads; 0 of others."""
    return cfg.packed_heads if type(cfg) is FwdConfig and cfg.packs_heads else 0


def is_plain(cfg) -> bool:
    """Whether it is of dense tensors or packed sequences of a dim of the tables, in 16 bits or FP8, and no more."""
    others = feature_of(cfg), cfg.is_ragged, cfg.is_padded, cfg.head_dim_v, cfg.kv_dtype, packed_heads(cfg)
    return not any(others) and cfg.out_dtype != PARTIAL


def facts_of(cfg) -> set[tuple]:
    """What of a config has to be compiled at least once: options beside each other, where code is that of both."""
    kernel, feature, is_forward = (type(cfg), cfg.element_bytes), feature_of(cfg), type(cfg) is FwdConfig
    facts = {
        ("head_dim", *kernel, cfg.head_dim),
        ("mask", *kernel, cfg.mask),
        ("types", cfg.dtype, cfg.out_dtype, cfg.kv_dtype),
        ("source", cfg.page_box, cfg.box_is_wide),
        ("ragged", cfg.is_ragged, *kind_of(cfg)),
        ("dims", *kernel, cfg.is_padded, cfg.head_dim_v),
    }
    if is_forward:
        facts |= {("lengths", cfg.element_bytes, cfg.is_varlen, cfg.has_lse)}
    if is_plain(cfg):
        facts |= {("plain", *kernel, cfg.mask)}
    if feature:
        facts |= {("feature", type(cfg), *feature), ("feature of elements", feature[0], cfg.element_bytes)}
        facts |= {("feature of rows", feature[0], cfg.mask)} if is_forward else set()
    if packed_heads(cfg):
        facts |= {("packed", cfg.head_dim, cfg.packed_heads), ("packed lengths", cfg.is_varlen, cfg.has_lse)}
    if cfg.kv_dtype:
        facts |= {("cached", cfg.is_ragged, cfg.page_box > 0)}
    return facts


def selection() -> list:
    """Of all configs some that have all of their facts, each time the one that has most of what is left for its time:
    the larger the head_dim, the longer a compile takes."""
    facts = {cfg: facts_of(cfg) for cfg in all_configs()}
    left, chosen = set().union(*facts.values()), []
    while left:
        chosen.append(max(facts, key=lambda cfg: len(left & facts[cfg]) / (256 + cfg.head_dim)))
        left -= facts[chosen[-1]]
    return chosen


CONFIGS = selection()


@pytest.fixture(scope="module")
def made():
    """{config: future of its (Report, fingerprint)}: all compiles run while the tests look at the first results."""
    pool = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield {cfg: pool.submit(fingerprints.fingerprint, cfg) for cfg in CONFIGS}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def known():
    """{name: fingerprint} on record."""
    return fingerprints.known()


def test_names_are_unique():
    configs = all_configs()
    assert len({cfg.name for cfg in configs}) == len(set(configs)) == len(configs)


def test_fp8_does_not_rescale_before_pv():
    """Its steps rescale O as PV is added to it: twice would be wrong."""
    cfg = next(cfg for cfg in all_forward_configs() if cfg.is_fp8)
    with pytest.raises(ValueError, match="rescale_before_pv: not with FP8"):
        replace(cfg, rescale_before_pv=True)


def test_selection_covers_options():
    """Each kernel with each element size beside each head_dim, mask and kind of source; each feature in each kernel."""
    for fact in (
        lambda cfg: (type(cfg), cfg.element_bytes, cfg.head_dim),
        lambda cfg: (type(cfg), cfg.element_bytes, cfg.mask),
        lambda cfg: (cfg.dtype, cfg.out_dtype, cfg.kv_dtype),
        lambda cfg: (type(cfg), feature_of(cfg)),
        lambda cfg: (type(cfg), cfg.element_bytes, cfg.is_padded, cfg.head_dim_v),
        lambda cfg: (cfg.is_ragged, kind_of(cfg)),
    ):
        assert {fact(cfg) for cfg in CONFIGS} == {fact(cfg) for cfg in all_configs()}
    forward = [cfg for cfg in CONFIGS if not cfg.splits_keys]
    assert len({(cfg.is_fp8, cfg.is_varlen, cfg.has_lse) for cfg in forward if not cfg.packs_heads}) == 8
    packed = [cfg for cfg in forward if cfg.packs_heads]
    assert {(cfg.head_dim, cfg.packed_heads) for cfg in packed} == set(PACKED)
    assert len({(cfg.is_varlen, cfg.has_lse) for cfg in packed}) == 4
    plain = {(type(cfg), cfg.element_bytes, cfg.mask) for cfg in CONFIGS if is_plain(cfg)}
    assert plain == {(type(cfg), cfg.element_bytes, cfg.mask) for cfg in all_configs()}


def unclean(known: dict) -> list[str]:
    """Names of the kernels on record that have a stack or spills, or other shared memory or more registers than they
    are to have."""
    found = []
    for cfg in fingerprints.recorded():
        fingerprint = known.get(cfg.name, [0, 0, 0, 0, cfg.smem_bytes])  # test_every_config_is_on_record says so
        registers, *spilled, smem_bytes = fingerprint[:5]
        most_registers = REGISTERS_PER_SM // cfg.num_threads // 8 * 8
        is_within = smem_bytes == cfg.smem_bytes <= SMEM_BYTES_PER_CTA and registers <= most_registers
        found += [cfg.name] * (any(spilled) or not is_within)
    return found


def test_what_is_on_record_is_clean(known):
    """Every kernel, compiled here or not."""
    assert unclean(known) == []


@pytest.mark.parametrize("field, more", [(0, 200), (1, 8), (2, 8), (3, 8), (4, 16)])
def test_a_kernel_on_record_that_is_not_clean_is_found(field, more):
    cfg = fingerprints.recorded()[0]
    fingerprint = [64, 0, 0, 0, cfg.smem_bytes, 3000, "0123"]
    assert unclean({cfg.name: fingerprint}) == []
    fingerprint[field] += more
    assert unclean({cfg.name: fingerprint}) == [cfg.name]


def test_ragged_configs_cover_rows_and_options():
    """Each row with both element types, forward rows with LSE and without; each source in each kernel and size."""
    configs = ragged_configs()
    assert all(cfg.is_ragged and cfg.is_varlen for cfg in configs)
    rows = {(type(cfg), cfg.dtype, cfg.out_dtype, cfg.head_dim, cfg.mask) for cfg in configs}
    dense = [cfg for cfg in (*all_forward_configs(), *all_decode_configs()) if (cfg.dtype, cfg.out_dtype) in DTYPES]
    assert rows == {(type(cfg), cfg.dtype, cfg.out_dtype, cfg.head_dim, cfg.mask) for cfg in dense}
    forward = [cfg for cfg in configs if not cfg.splits_keys]
    has_lse = {(cfg.element_bytes, cfg.head_dim, cfg.mask, cfg.has_lse) for cfg in forward}
    assert len(has_lse) == 2 * len({row[:3] for row in has_lse})
    for size, kind in product((2, 1), (FwdConfig, DecodeConfig)):
        sources = {
            (cfg.page_box, cfg.box_is_wide) for cfg in configs if type(cfg) is kind and cfg.element_bytes == size
        }
        assert {box for box, _ in sources} == {0, *PAGE_BOXES}
        wide = {box for box, is_wide in sources if is_wide}
        assert wide == ({box for box in PAGE_BOXES if box >= 8} if size == 2 else set())
    assert {kind_of(cfg) for cfg in CONFIGS if cfg.is_ragged} == {kind_of(cfg) for cfg in configs}


def test_feature_configs_cover_rows_and_options():
    """Each row with two features; each feature with every row's head_dim and element size, each kernel, mask, number of
    bytes, kind of lengths, and with LSE and without."""
    configs = feature_configs()
    rows = Counter((type(cfg), cfg.element_bytes, cfg.head_dim, cfg.mask) for cfg in configs)
    forward_rows = {(FwdConfig, *row): 2 for row in FORWARD}
    assert rows == forward_rows | {(DecodeConfig, *row, mask): 1 for row in DECODE for mask in ("full", "local")}
    features = {tuple((field, getattr(cfg, field)) for field in FEATURES if getattr(cfg, field)) for cfg in configs}
    kinds = [(("attn_mask", kind),) for kind in MASK_TYPES]
    others = [((field, True),) for field in FEATURES if field not in ("attn_mask", "has_block_lists", *MODS)]
    assert features == {*kinds, *others}
    for ((field, value),) in features:
        own = [cfg for cfg in configs if getattr(cfg, field) == value]
        forward = [cfg for cfg in own if type(cfg) is FwdConfig]
        assert {(cfg.element_bytes, cfg.head_dim) for cfg in own} == set(DECODE)
        assert {type(cfg) for cfg in own} == {FwdConfig, DecodeConfig}
        assert {cfg.mask for cfg in forward} == ({"local"} if field == "has_chunks" else {"full", "causal", "local"})
        assert {(cfg.is_varlen, cfg.is_ragged) for cfg in forward} == {(False, False), (True, False), (True, True)}
        assert {cfg.has_lse for cfg in forward} == {False, True}
        assert {cfg.element_bytes for cfg in forward} == {1, 2}
    assert {(cfg.dtype, cfg.out_dtype) for cfg in configs} == set(DTYPES)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"page_box": 24}, "page_box=24: must be one of"),
        ({"page_box": 64}, r"that divides tile_n=112, or 0"),
        ({"page_box": 16, "is_ragged": False}, "page_box: only with is_ragged"),
        ({"is_varlen": False}, "is_ragged: only with is_varlen"),
        ({"box_is_wide": True}, "box_is_wide: only with page_box"),
    ],
)
def test_sources_that_do_not_exist_are_refused(changes, problem):
    cfg = forward_config("bf16", 64, "full", False, True, source=KeySource(True))
    with pytest.raises(ValueError, match=problem):
        replace(cfg, **changes)


def test_every_config_is_on_record(known):
    if not known:
        pytest.skip(f"no fingerprints for {fingerprints.environment()}: make fingerprints")
    assert sorted(known) == sorted(cfg.name for cfg in fingerprints.recorded())


@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda cfg: cfg.name)
def test_compiles_clean(made, known, cfg):
    report, fingerprint = made[cfg].result()
    assert report.problems() == []
    assert report.smem_bytes <= cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    most_registers = REGISTERS_PER_SM // (cfg.num_threads * cfg.ctas_per_sm) // 8 * 8
    assert report.registers == most_registers if cfg.uses_setmaxnreg else report.registers <= most_registers
    # One step is head_dim/16 WGMMAs for QK and tile_n/16 for PV, in FP8 half of that; the code holds it once per kind
    # of iteration, of which there are at most eight, and the last PV once more.
    depth = 32 if cfg.is_fp8 else 16
    step = (cfg.head_dim + cfg.tile_n) // depth
    assert step <= report.wgmmas <= 8 * step + cfg.tile_n // depth
    assert fingerprint == known.get(cfg.name, fingerprint), "the kernel changed: on purpose? make fingerprints, say why"


def test_a_changed_instruction_changes_the_hash():
    """But where a kernel parameter lies in constant memory does not (0xA24 is IMAD with such an operand)."""
    code = bytes(range(16)) * 2
    constant = (0xA24).to_bytes(2, "little") + bytes(14)
    moved = (0xA24 | 0x210 << 38).to_bytes(8, "little") + bytes(8)
    assert fingerprints.code_hash(code) != fingerprints.code_hash(code[:16] + bytes(16))
    assert fingerprints.code_hash(constant) == fingerprints.code_hash(moved)
    assert fingerprints.code_hash(constant) != fingerprints.code_hash(moved[:9] + b"\1" + bytes(6))
    assert fingerprints.opcode_hash(Counter({5: 1, 6: 2})) == fingerprints.opcode_hash(Counter({6: 2, 5: 1}))
    assert fingerprints.opcode_hash(Counter({5: 1, 6: 2})) != fingerprints.opcode_hash(Counter({5: 2, 6: 1}))
