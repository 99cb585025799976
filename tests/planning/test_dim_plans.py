"""Which kernels serve head dims that the tables do not have, and columns of V of their own."""

from dataclasses import replace

import pytest
from rule_calls import BF16, DENSE, DENSE_FP8, FP32, PACKED, PACKED_FP8, A

from fa3_cute.contract.formats import FP8_SERVED_DIMS, HEAD_DIMS, SERVED_DIMS, tile_dims
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.packing import packed_heads_of_window
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.tables import (
    all_decode_configs,
    all_forward_configs,
    decode_config,
    dense_configs,
    forward_config,
)

DENSE, PACKED = (replace(call, dtype=BF16) for call in (DENSE, PACKED))
PAGED = replace(DENSE, page_table=A, page_size=16, num_pages=99, seqused_k=A)
DECODE = replace(DENSE, seqlen_q=1)


def shape_of(call) -> ProblemShape:
    return ProblemShape.of(plain(call))


def config_of(call):
    return operation_of(shape_of(call)).launches[-1].config


def test_tiles_have_room_for_all_columns():
    """And no more than the next larger tile; V has fewer only where there is a kernel of fewer."""
    for head_dim in SERVED_DIMS:
        for head_dim_v in SERVED_DIMS:
            columns, value_columns = tile_dims(2, head_dim, head_dim_v)
            assert columns == min(dim for dim in HEAD_DIMS if dim >= max(head_dim, head_dim_v))
            assert value_columns == (128 if columns == 192 and head_dim_v <= 128 else columns)
        assert tile_dims(2, head_dim, 0) == (min(dim for dim in HEAD_DIMS if dim >= head_dim),) * 2
    assert {tile_dims(1, dim, 0) for dim in FP8_SERVED_DIMS} == {(dim, dim) for dim in HEAD_DIMS}


@pytest.mark.parametrize("base", [DENSE, DENSE_FP8], ids=["16 bit", "fp8"])
def test_dense_prefill_needs_no_further_kernel(base):
    """TMA alone reads and writes rows there, by the extents of the tensors."""
    known = set(dense_configs())
    for head_dim in FP8_SERVED_DIMS if base is DENSE_FP8 else SERVED_DIMS:
        for masked in ({}, {"is_causal": True}, {"window_size_left": 600, "window_size_right": 0}):
            assert config_of(replace(base, head_dim=head_dim, **masked)) in known


@pytest.mark.parametrize(
    "call",
    [
        PACKED,
        PACKED_FP8,
        PAGED,
        DECODE,
        replace(DENSE_FP8, seqlen_q=1),
        replace(DENSE, out_dtype=FP32),
        replace(DENSE, seqused_k=A),
    ],
    ids=["packed", "packed fp8", "paged", "decode", "decode fp8", "fp32", "seqused"],
)
def test_where_rows_are_stored_without_tma(call):
    """One kernel for all dims that it is padded to; the tables' own where there is nothing to pad."""
    dims = (80, 96) if call.dtype is not BF16 else (72, 80, 88, 96)
    *padded, own = (config_of(replace(call, head_dim=dim)) for dim in dims)
    assert len(set(padded)) == 1 and padded[0].is_padded and not own.is_padded
    assert padded[0] == replace(own, is_padded=True, box_is_wide=False)
    assert "d96_padded_" in padded[0].name and "padded" not in own.name
    assert config_of(replace(call, head_dim=96, head_dim_v=64)) is padded[0]


def test_wide_boxes_have_all_columns():
    """They have no bound within a stretch of columns."""
    assert config_of(replace(PAGED, head_dim=192, head_dim_v=128)).box_is_wide
    assert not config_of(replace(PAGED, head_dim=128, head_dim_v=64)).box_is_wide
    with pytest.raises(ValueError, match="box_is_wide: not with is_padded"):
        replace(config_of(replace(PAGED, head_dim=128)), is_padded=True)


def test_heads_of_small_windows_are_packed():
    call = replace(DENSE, num_heads=16, num_heads_k=2, window_size_left=100, window_size_right=0)
    assert packed_heads_of_window(shape_of(replace(call, head_dim=112))) == 8
    assert config_of(replace(call, head_dim=112)) is config_of(replace(call, head_dim=128))


@pytest.mark.parametrize("mask", ["full", "causal", "local"])
def test_192_and_128_have_kernels_of_their_own(mask):
    masked = {"causal": {"is_causal": True}, "local": {"window_size_left": 600, "window_size_right": 0}}.get(mask, {})
    cfg = config_of(replace(DENSE, head_dim=192, head_dim_v=128, **masked))
    assert (cfg.dim_qk, cfg.dim_v, cfg.mask, cfg.is_padded) == (192, 128, mask, False)
    assert "d192v128_" in cfg.name and cfg.smem_bytes > 2 * 2 * cfg.tile_n * (192 + 128)
    assert cfg.kv_bytes_per_token == 2 * (192 + 128)
    assert config_of(replace(DENSE, head_dim=176, head_dim_v=120, **masked)) is cfg
    assert config_of(replace(DENSE, head_dim=192, head_dim_v=136, **masked)).dim_v == 192


def test_features_find_room_beside_192_and_128():
    for field in ({"softcap": 30.0}, {"alibi_slopes": A}, {"attn_mask": A}, {"attn_mask": A, "attn_mask_dtype": BF16}):
        cfg = config_of(replace(DENSE, head_dim=192, head_dim_v=128, is_causal=True, **field))
        assert (cfg.dim_v, cfg.is_causal) == (128, True)


def test_partial_results_have_the_columns_of_v():
    """Of the tile, for accesses of 16 bytes."""
    call, bytes_of = replace(DECODE, num_splits=48, seqlen_k=9000), {}
    for dims in ((192, 192), (192, 128), (192, 64), (184, 184)):
        plan = operation_of(shape_of(replace(call, head_dim=dims[0], head_dim_v=dims[1]))).workspace_bytes
        bytes_of[dims] = plan
    assert bytes_of[192, 192] * 129 == bytes_of[192, 128] * 193 > 0
    assert bytes_of[192, 64] == bytes_of[192, 128] and bytes_of[184, 184] == bytes_of[192, 192]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"head_dim_v": 64}, "head_dim_v=64: must be 128 or 0, head_dim"),
        ({"head_dim_v": 128, "num_q_stages": 2, "tile_n": 64}, "num_q_stages: 1 with head_dim_v"),
        ({"head_dim": 72}, "head_dim=72: must be one of"),
    ],
)
def test_configs_without_a_kernel(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(forward_config("bf16", 192, "causal", True, False), **changes)
    with pytest.raises(ValueError, match="head_dim_v=128: must be 0 or 0"):
        replace(decode_config("bf16", 128, False), head_dim_v=128)


def test_names_tell_dims_apart():
    configs = [*all_forward_configs(), *all_decode_configs()]
    names = {replace(cfg, is_padded=True).name for cfg in configs} | {cfg.name for cfg in configs}
    assert len(names) == 2 * len(configs)
