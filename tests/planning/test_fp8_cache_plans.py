"""16-bit queries over FP8 keys: which kernel serves them, what it is made of, what its arguments are."""

from dataclasses import replace
from pathlib import Path

import pytest
from rule_calls import BF16, DENSE, DESCALES, FP8, FP16, PACKED, PER_HEAD, A

from fa3_cute.contract.plain import plain
from fa3_cute.planning.config import REGISTERS_PER_SM, SMEM_BYTES_PER_CTA, DecodeConfig, FwdConfig
from fa3_cute.planning.decode_rows import FP8_CACHE
from fa3_cute.planning.operations import checked, operation_of
from fa3_cute.planning.rings import WARP, by_name
from fa3_cute.planning.selections import cached_fp8_configs
from fa3_cute.planning.stored_keys import NUM_WIDEN_WARPS
from fa3_cute.planning.tables import (
    KeySource,
    configs_over,
    decode_config,
    dense_configs,
    forward_config,
    fp8_cache_configs,
)
from fa3_cute.runtime.arguments import addresses_of, layout_of

CACHE = replace(DENSE, dtype=BF16, kv_dtype=FP8, seqlen_q=1, seqlen_k=8192)
PAGES = {"page_table": A, "page_size": 16, "num_pages": 4096, "seqused_k": A}


def launches(params):
    return operation_of(checked(plain(params))).launches


@pytest.mark.parametrize(
    "params, source",
    [
        (CACHE, None),
        (replace(CACHE, seqlen_q=4096), None),  # no prefill kernel widens keys
        (replace(CACHE, seqused_k=A), KeySource(True)),
        (replace(CACHE, **PAGES), KeySource(True, 16)),
        (replace(CACHE, **PAGES | {"page_size": 1}), KeySource(True, 1)),
        (replace(PACKED, dtype=BF16, kv_dtype=FP8), KeySource(True)),
    ],
)
def test_the_decode_kernel_serves_all(params, source):
    (launch,) = launches(params)
    given = {} if source is None else {"source": source}
    assert launch.config is decode_config("bf16", 128, False, kv_dtype="fp8_e4m3", **given)
    assert launch.reason == FP8_CACHE[128].reason


def test_what_is_stored_counts_for_memory_and_what_is_computed_for_wgmma():
    cfg = decode_config("fp16", 128, False, kv_dtype="fp8_e4m3")
    (plan,) = (launch.plan for launch in launches(replace(CACHE, dtype=FP16)))
    rings = by_name(cfg.rings)
    assert cfg.kv_bytes_per_token == 2 * 128 and cfg.q_slot_bytes == 64 * 128 * 2
    assert rings["k"].slot_bytes == rings["v"].slot_bytes == cfg.tile_n * 128
    assert rings["wide_k"].slot_bytes == rings["wide_v"].slot_bytes == cfg.tile_n * 128 * 2
    assert plan.smem_bytes >= cfg.smem_bytes and plan.packed_heads == 4


def test_operands_are_fp16_and_q_stays_in_registers():
    for cfg in cached_fp8_configs():
        assert cfg.gemm_dtype == "fp16" and cfg.has_q_in_registers and "q" not in by_name(cfg.rings)
        assert cfg.smem_bytes <= SMEM_BYTES_PER_CTA
    deepest = decode_config("bf16", 128, False, kv_dtype="fp8_e4m3")
    with pytest.raises(ValueError, match="bytes of shared memory: 1 CTAs per SM have 232448 each"):
        replace(deepest, num_kv_stages=deepest.num_kv_stages + 1)
    for dtype in ("bf16", "fp16", "fp8_e4m3"):
        cfg = decode_config(dtype, 128, False, "fp32")
        assert cfg.gemm_dtype == dtype and not cfg.has_q_in_registers and by_name(cfg.rings)["q"].slots == 1


def test_values_pass_in_parts_where_two_ctas_share_an_sm():
    cfg = decode_config("fp8_e4m3", 128, False, "bf16")
    parts = [replace(cfg, num_kv_stages=3, ctas_per_sm=ctas).num_value_parts for ctas in (1, 2)]
    assert parts == [1, 2]
    assert decode_config("fp8_e4m3", 96, False, "bf16").num_value_parts == 1
    assert forward_config("fp8_e4m3", 128, "full", False, False, "bf16").num_value_parts == 1


def test_registers_and_arrivals():
    """What setmaxnreg hands out is there at launch; a slot is full or free once all warps of the other side say so."""
    for cfg in cached_fp8_configs():
        at_launch = REGISTERS_PER_SM // cfg.num_threads // 8 * 8 * cfg.num_threads
        assert sum(WARP * len(role.warps) * role.registers for role in cfg.roles) <= at_launch
        roles, rings = by_name(cfg.roles), by_name(cfg.rings)
        assert all(len(roles[name].warps) % 4 == 0 for name in ("consume", "widen_k", "widen_v"))
        assert len(roles["load"].warps) + len(roles["retire"].warps) == 4
        assert rings["k"].empty == rings["v"].empty == len(roles["widen_k"].warps) == NUM_WIDEN_WARPS
        for name in ("wide_k", "wide_v"):
            assert (rings[name].full, rings[name].empty) == (NUM_WIDEN_WARPS, len(roles["consume"].warps))


def test_the_kernels_contract_states_the_bytes():
    text = (Path(__file__).resolve().parents[2] / "fa3_cute" / "kernels" / "README.md").read_text()
    text = " ".join(text.partition("With FP8 keys and 16-bit queries the wide rings")[2].split())
    for cfg in fp8_cache_configs():
        rings = by_name(cfg.rings)
        stored, wide = (f"{rings[name].slots} x {rings[name].slot_bytes}" for name in ("k", "wide_k"))
        assert stored in text and wide in text and f"all {cfg.smem_bytes}" in text


def test_every_config_can_be_compiled_ahead():
    assert set(fp8_cache_configs()) <= set(dense_configs())
    for page_size in (0, 1, 16):
        assert set(fp8_cache_configs(KeySource(True, page_size))) <= set(configs_over(page_size))
    assert len({cfg.name for cfg in dense_configs()}) == len(dense_configs())


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"dtype": "fp8_e4m3", "out_dtype": "bf16"}, "kv_dtype='fp8_e4m3': must be None, or 'fp8_e4m3' in the decode"),
        ({"kv_dtype": "fp16"}, "kv_dtype='fp16': must be None, or"),
        ({"head_dim": 96}, r"kv_dtype: only with head_dim of \(64, 128\)"),
        ({"tile_n": 112}, "tile_n=112: must be a multiple of 32"),
        ({"num_wide_slots": 0}, "num_wide_slots=0: must be at least 1 with kv_dtype"),
        ({"kv_dtype": None}, "num_wide_slots=2: must be at least 1 with kv_dtype, else 0"),
        ({"num_kv_stages": 5}, "bytes of shared memory"),
        ({"is_ragged": True, "page_box": 16, "box_is_wide": True}, "box_is_wide: not with FP8"),
    ],
)
def test_illegal_configs(changes, problem):
    cfg = decode_config("bf16", 128, False, kv_dtype="fp8_e4m3")
    with pytest.raises(ValueError, match=problem):
        replace(cfg, **changes)


def test_the_forward_kernel_has_none():
    with pytest.raises(ValueError, match="in the decode kernel"):
        FwdConfig("bf16", 128, False, False, 128, 128, kv_dtype="fp8_e4m3", num_wide_slots=1)
    assert not DecodeConfig("bf16", 128, False, 64, 3, 2).widens


def test_descales_reach_the_kernel():
    """As of FP8 queries: the buffer has places for them, and the call's addresses."""
    params = replace(CACHE, **DESCALES | PER_HEAD)
    (launch,) = launches(params)
    layout = layout_of(launch.config.entry, launch.config.has_descales)
    assert {"k_descale", "v_descale", "q_descale"} <= set(layout.per_call)
    assert {"k_descale_batch_stride", "v_descale_head_stride"} <= set(layout.per_shape)
    values = dict(zip(layout.per_shape, layout.values(checked(plain(params)), launch.counts(132)), strict=True))
    assert values["k_descale_head_stride"] == PER_HEAD["k_descale_head_stride"]
    assert addresses_of(plain(params))[-3:] == (A + 4,) * 3
    assert len(addresses_of(plain(replace(CACHE, kv_dtype=None)))) == 5


def test_pointers_have_the_types_of_what_they_point_at():
    from cutlass import BFloat16, Float8E4M3FN

    from fa3_cute.runtime.build import typed_arguments

    cfg = decode_config("bf16", 128, False, kv_dtype="fp8_e4m3")
    names = [name for name, _ in cfg.arguments]
    typed = dict(zip(names, typed_arguments(cfg, [0] * len(names)), strict=True))
    assert [typed[name].dtype for name in ("q", "k", "v", "out")] == [BFloat16, Float8E4M3FN, Float8E4M3FN, BFloat16]
