"""Which kernel serves a problem of 512 columns of V, what it takes of an SM, and how its work is dealt out."""

from dataclasses import replace

import pytest
from rule_calls import DENSE, PACKED, A

from fa3_cute.contract.formats import WIDE_DIMS
from fa3_cute.contract.params import DataType
from fa3_cute.contract.plain import plain
from fa3_cute.planning.config import REGISTERS_PER_SM, SMEM_BYTES_PER_CTA
from fa3_cute.planning.mla import MlaConfig, mla_config
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.rings import WARP, by_name
from fa3_cute.planning.splits import CLUSTER_SLOTS
from fa3_cute.planning.tables import DENSE as CONTIGUOUS
from fa3_cute.planning.tables import KeySource, decode_config

DIMS = {"head_dim": 576, "head_dim_v": 512, "num_heads_k": 1, "dtype": DataType.BF16}
MLA = replace(DENSE, **DIMS, num_heads=16, batch_size=128, seqlen_q=1, seqlen_k=4096)
PAGES = {"page_table": A, "page_size": 64, "num_pages": 99999, "seqused_k": A}
PAGED = replace(MLA, **PAGES)
CFG = mla_config("bf16", False)
LARGE_DIMS, QV_DIMS = (512, 512), (64, 512)
LARGE = replace(MLA, head_dim=512, head_dim_v=0, num_heads_k=2)
WITH_QV = replace(MLA, head_dim=64, q_v=A)


def launch_of(call):
    """The one launch of a call."""
    (launch,) = operation_of(ProblemShape.of(plain(call))).launches
    return launch


@pytest.mark.parametrize(
    "call, expected",
    [
        (MLA, CFG),
        (replace(MLA, is_causal=True), CFG),  # one query sees all keys
        (replace(MLA, seqlen_q=2, is_causal=True), mla_config("bf16", True)),
        (replace(MLA, seqlen_q=500, is_causal=True), mla_config("bf16", True)),  # whatever the number of rows
        (replace(MLA, dtype=DataType.FP16, out_dtype=DataType.FP32), mla_config("fp16", False, "fp32")),
        (replace(MLA, seqused_k=A), mla_config("bf16", False, None, KeySource(True))),
        (PAGED, mla_config("bf16", False, None, KeySource(True, 64, True))),
        (replace(PAGED, page_size=16), mla_config("bf16", False, None, KeySource(True, 16, True))),
        (replace(PAGED, k_batch_stride=64 * 576 + 8), mla_config("bf16", False, None, KeySource(True, 64, False))),
        (replace(PACKED, **DIMS, is_causal=True), mla_config("bf16", True, None, KeySource(True))),
        (LARGE, mla_config("bf16", False, dims=LARGE_DIMS)),
        (replace(LARGE, head_dim_v=512), mla_config("bf16", False, dims=LARGE_DIMS)),
        (replace(LARGE, seqlen_q=4096, is_causal=True), mla_config("bf16", True, dims=LARGE_DIMS)),  # no forward kernel
        (replace(LARGE, **PAGES), mla_config("bf16", False, None, KeySource(True, 64, True), LARGE_DIMS)),
        (replace(PACKED, head_dim=512), mla_config("fp16", False, None, KeySource(True), LARGE_DIMS)),
        (WITH_QV, mla_config("bf16", False, dims=QV_DIMS)),
        (replace(WITH_QV, **PAGES), mla_config("bf16", False, None, KeySource(True, 64, True), QV_DIMS)),
    ],
)
def test_one_kernel_serves_a_call(call, expected):
    assert launch_of(call).config is expected


@pytest.mark.parametrize("source", [CONTIGUOUS, KeySource(True, 64, True), KeySource(True, 8)])
def test_config_fits_an_sm(source):
    cfg = mla_config("bf16", True, None, source)
    assert cfg.smem_bytes == 1024 + 64 * 576 * 2 * 3 + 64 * 64 * 2 <= SMEM_BYTES_PER_CTA
    assert cfg.partial_bytes <= cfg.kv_ring_bytes  # they lie over Q and K
    assert cfg.num_threads == 384 and by_name(cfg.roles)["consume"].warps == range(8)
    assert sum(role.registers * WARP * len(role.warps) for role in cfg.roles) <= REGISTERS_PER_SM
    assert by_name(cfg.rings)["k"].empty == 8 and "v" not in by_name(cfg.rings)
    assert cfg.kv_bytes_per_token == 576 * 2


@pytest.mark.parametrize("source", [CONTIGUOUS, KeySource(True, 64, True), KeySource(True, 8)])
def test_config_of_heads_of_512_fits_an_sm(source):
    """K and V have rings of their own, of which the second warpgroup reads that of V alone."""
    cfg = mla_config("bf16", True, None, source, LARGE_DIMS)
    rings = by_name(cfg.rings)
    assert (cfg.tile_n, cfg.dim_qk, cfg.dim_v) == (32, 512, 512) and not (cfg.has_qv or cfg.shares_slots)
    assert cfg.smem_bytes == 1024 + 64 * 512 * 2 + 4 * 32 * 512 * 2 + 64 * 32 * 2 <= SMEM_BYTES_PER_CTA
    assert (rings["k"].empty, rings["v"].empty) == (4, 8) and rings["k"].full == rings["v"].full == 1
    assert cfg.tx_bytes == {"k": 32 * 1024, "v": 32 * 1024} and cfg.kv_bytes_per_token == 2048
    assert cfg.partial_bytes <= cfg.kv_ring_bytes == cfg.smem_bytes - 1024 - 64 * 32 * 2


def test_config_of_qv_fits_an_sm():
    """A slot is one of K and one of V: its mbarriers are K's."""
    cfg = mla_config("bf16", True, None, CONTIGUOUS, QV_DIMS)
    rings = by_name(cfg.rings)
    assert cfg.has_qv and cfg.shares_slots and cfg.smem_bytes == CFG.smem_bytes <= SMEM_BYTES_PER_CTA
    assert (rings["k"].full, rings["k"].empty) == (1, 8) and (rings["v"].full, rings["v"].empty) == (0, 0)
    assert cfg.tx_bytes["k"] == 64 * 576 * 2 and cfg.kv_bytes_per_token == 576 * 2
    assert [name for name, _ in cfg.arguments if name.startswith("q_v")] == [
        "q_v",
        *(f"q_v_{dim}_stride" for dim in ("batch", "row", "head")),
    ]
    assert not any(name.startswith("q_v") for name, _ in CFG.arguments)
    assert cfg.kernel == "fa3_cute.kernels.mla.with_qv.FlashAttentionMlaWithQv"


def test_the_scale_is_of_all_columns():
    """Of both parts of q."""
    scales = [ProblemShape.of(plain(call)).softmax_scale for call in (MLA, WITH_QV, LARGE)]
    assert scales == pytest.approx([1 / 24, 1 / 24, 512**-0.5], rel=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head_dim_v": 0}, r"head_dim, head_dim_v: must be of \(\(576, 512\), \(512, 512\), \(64, 512\)\)"),
        ({"is_padded": True}, "FP8 and is_padded: not with 512 columns of V"),
        ({"has_softcap": True}, "has_softcap.*: not with 512 columns of V"),
        ({"is_ragged": True, "has_leftpad": True}, "has_leftpad: TMA alone brings K"),
        ({"num_kv_stages": 3}, "bytes of shared memory"),
        ({"num_kv_stages": 1}, "cannot hold partial results"),
        ({"is_ragged": True, "page_box": 1}, "page_box, has_leftpad: TMA alone brings K"),
    ],
)
def test_configs_without_a_kernel(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(CFG, **changes)


def test_names_tell_kernels_apart():
    sources = CONTIGUOUS, KeySource(True), *(KeySource(True, box, wide) for box in (64, 8) for wide in (False, True))
    configs = [
        mla_config(dtype, local, None, source, dims)
        for dims in WIDE_DIMS
        for dtype in ("bf16", "fp16")
        for local in (False, True)
        for source in sources
    ]
    assert len({cfg.name for cfg in configs}) == len(configs) == 3 * 24
    assert {type(cfg) for cfg in configs} == {MlaConfig} != {type(decode_config("bf16", 128, False))}


def test_heads_share_tiles():
    """16 heads are one item of a sequence, 128 of two queries four."""
    plan = launch_of(MLA).plan
    assert (plan.packed_heads, plan.num_splits, plan.cluster_size) == (16, 1, 1)
    plan = launch_of(replace(MLA, num_heads=128, seqlen_q=2, batch_size=32, is_causal=True)).plan
    assert (plan.packed_heads, plan.num_splits, plan.cluster_size) == (128, 1, 1)


def test_partial_results_have_512_columns():
    call = replace(MLA, batch_size=3, num_splits=44, num_heads=24)
    launch = launch_of(call)
    assert launch.plan.cluster_size == 4 and launch.scratch == "splits"
    assert launch.plan.partial_bytes == 3 * 11 * 24 * 4 * 513


@pytest.mark.parametrize(
    "heads, batch, seqlen", [(16, 1, 4096), (128, 1, 4096), (16, 16, 4096), (128, 4, 8192), (16, 1, 65536)]
)
def test_few_items_fill_the_gpu(heads, batch, seqlen):
    """In one round of CTAs, no more than there are tiles."""
    plan = launch_of(replace(MLA, num_heads=heads, batch_size=batch, seqlen_k=seqlen)).plan
    num_ctas = batch * -(-heads // 64) * plan.num_splits
    assert plan.num_splits <= seqlen // 64
    assert min(seqlen // 64 * batch, 132) / 3 <= num_ctas <= CLUSTER_SLOTS[plan.cluster_size][0]
