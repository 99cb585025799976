"""Decode steps that append a row to each sequence: one launch where the decode kernel does it all, two elsewhere."""

from dataclasses import replace
from typing import Any

import pytest
from rule_calls import BF16, FP8, FP16, PACKED, A

from fa3_cute import DataType, FlashAttentionParams
from fa3_cute.contract.append import DECODE_APPEND_ENTRY, DECODE_POINTERS, DECODE_SIZES, DECODE_STRIDES
from fa3_cute.contract.plain import plain
from fa3_cute.contract.status import Problem
from fa3_cute.planning.append import AppendConfig
from fa3_cute.planning.config import DecodeConfig
from fa3_cute.planning.decode_append import AppendingConfig, appending, launched
from fa3_cute.planning.operations import checked, operation_of
from fa3_cute.planning.tables import KeySource, decode_config
from fa3_cute.runtime.arguments import layout_of

TENSORS = dict.fromkeys(("q", "k", "v", "out", "k_new", "v_new"), A)
SIZES: dict[str, Any] = {
    "batch_size": 4,
    "seqlen_q": 1,
    "seqlen_k": 4096,
    "num_heads": 16,
    "num_heads_k": 2,
    "head_dim": 128,
}
STEP = FlashAttentionParams(**TENSORS, **SIZES, dtype=BF16, seqused_k=A, seqlen_knew=1)
ROTARY = {"rotary_cos": A, "rotary_sin": A, "rotary_dim": 64, "rotary_dtype": DataType.FP32}
PAGES = {"page_table": A, "page_size": 64, "num_pages": 999}


def shape_of(params):
    shape = checked(plain(params))
    assert not isinstance(shape, Problem), shape
    return shape


def launches(params):
    return operation_of(shape_of(params)).launches


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seqlen_q": 3, "is_causal": True},
        PAGES,
        PAGES | {"page_size": 1},
        {"kv_batch_idx": A, "batch_size_k": 9},
        {"head_dim": 192, "head_dim_v": 128, "softcap": 30.0},
        {"num_splits": 48},
    ],
    ids=str,
)
@pytest.mark.parametrize("rotary", [{}, ROTARY, ROTARY | {"rotary_interleaved": True}], ids=["", "halves", "pairs"])
def test_one_launch(fields, rotary, dtype):
    """Its plan is that of the step without a new row."""
    params = replace(STEP, dtype=dtype, **fields | rotary)
    (launch,) = launches(params)
    without = dict.fromkeys(("k_new", "v_new", "rotary_cos", "rotary_sin"))
    without |= {"seqlen_knew": 0, "rotary_dim": 0, "rotary_dtype": None, "rotary_interleaved": False}
    (plain_launch,) = launches(replace(params, **without))
    pairs = ("neighbours" if "rotary_interleaved" in rotary else "halves") if rotary else ""
    assert launch == plain_launch._replace(config=appending(plain_launch.config, pairs, "fp32" if rotary else ""))
    assert launch.config.name.startswith(plain_launch.config.name + "_append")


@pytest.mark.parametrize(
    "fields",
    [
        {"seqlen_knew": 2},
        {"seqlen_knew": 4, "cu_seqlens_k_new": A},
        {"k_new": None, "v_new": None, "seqlen_knew": 0, **ROTARY},
        {"dtype": FP8, "out_dtype": BF16},
        {"kv_dtype": FP8},
        {"kv_dtype": FP8, "kv_new_dtype": BF16},
        {"head_dim": 72},
        {"leftpad_k": A},
        {"seqlen_q": 1000},
    ],
    ids=str,
)
def test_a_launch_ahead(fields):
    ahead, *attention = launches(replace(STEP, **fields))
    assert isinstance(ahead.config, AppendConfig) and attention
    assert not any(isinstance(launch.config, AppendingConfig) for launch in attention)


def test_a_launch_ahead_of_two():
    """Packed queries of any number are decode's and prefill's; of one each decode's alone."""
    new = {"k_new": A, "v_new": A, "seqlen_knew": 1, "seqused_k": A, "cu_seqlens_k": None, "total_k": 0}
    params = replace(PACKED, dtype=BF16, seqlen_k=4096, **new | PAGES)
    assert isinstance(launches(params)[0].config, AppendConfig)
    (launch,) = launches(replace(params, max_seqlen_q=1))
    assert isinstance(launch.config, AppendingConfig)


def test_what_the_kernel_takes():
    """Every value has its place."""
    strides = {name: 8 * (n + 1) << 20 for n, name in enumerate(DECODE_STRIDES)}
    pointers = {name: 16 * (n + 1) << 40 for n, name in enumerate(DECODE_POINTERS)}
    sizes = {"rotary_dim": 96, "rotary_positions": 1234}
    params = replace(STEP, is_causal=True, seqlen_q=3, **ROTARY | strides | pointers | sizes)
    shape = shape_of(params)
    (launch,) = operation_of(shape).launches
    layout = layout_of(launch.entry, False)
    values = layout.values(launched(shape), launch.counts(132))
    found = dict(zip(layout.per_shape, values, strict=True))
    for tensor in ("k_new", "v_new"):  # of a single row: the contiguous one
        strides[f"{tensor}_row_stride"] = 2 * 128
    expected = pointers | strides | sizes | {"query_step": 1}
    assert {name: found[name] for name in expected} == expected
    assert launch.entry is DECODE_APPEND_ENTRY and set(DECODE_SIZES) < set(found)
    assert launched(launched(shape)) == launched(shape)


@pytest.mark.parametrize("source", [KeySource(False), KeySource(True, has_leftpad=True)])
def test_no_such_kernels(source):
    cfg = decode_config("bf16", 128, False, source=source)
    with pytest.raises(ValueError, match="not in a kernel that appends"):
        appending(cfg, "", "")
    assert isinstance(appending(decode_config("bf16", 128, False, source=KeySource(True)), "", ""), DecodeConfig)
