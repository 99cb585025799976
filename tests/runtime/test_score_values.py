"""Softcap, sinks, ALiBi, masks, chunks and dropout: numbers of the argument buffer, and where addresses go in it."""

import ctypes

import pytest
from test_launch_values import DENSE, HEADS, values_of

from fa3_cute.contract.arguments import DECODE_ENTRY, FORWARD_ENTRY
from fa3_cute.contract.params import OPTIONALS, DataType, FlashAttentionParams
from fa3_cute.contract.plain import plain
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime.arguments import addresses_of, layout_of

OFF = {
    "softcap": 0,
    "p_dropout": 0,
    "attention_chunk": 0,
    "s_aux_dtype": 0,
    "alibi_batch_stride": 0,
    "attn_mask_batch_stride": 0,
    "attn_mask_head_stride": 0,
    "attn_mask_row_stride": 0,
}


def config_of(dtype: str, is_decode: bool):
    out_dtype = "bf16" if dtype == "fp8_e4m3" else None
    if is_decode:
        return decode_config(dtype, 64, False, out_dtype)
    return forward_config(dtype, 64, "full", False, False, out_dtype)


@pytest.mark.parametrize("is_decode", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3"])
@pytest.mark.parametrize(
    "given, values",
    [
        ({}, OFF),
        ({"softcap": 30.0, "attention_chunk": 64}, OFF | {"softcap": 30.0, "attention_chunk": 64}),
        ({"p_dropout": 0.25, "rng_state": 64}, OFF | {"p_dropout": 0.25}),
        ({"s_aux": 64}, OFF | {"s_aux_dtype": 3}),
        ({"s_aux": 64, "s_aux_dtype": DataType.BF16}, OFF | {"s_aux_dtype": 1}),
        ({"alibi_slopes": 64, "alibi_batch_stride": 8}, OFF | {"alibi_batch_stride": 8}),
        (
            {"attn_mask": 64},
            OFF | {"attn_mask_batch_stride": 168, "attn_mask_head_stride": 21, "attn_mask_row_stride": 7},
        ),
    ],
)
def test_values_of_the_shape(dtype, is_decode, given, values):
    """As many and in the same order as names, whatever the type: the buffer's struct takes no others."""
    types = {"bf16": DataType.BF16, "fp8_e4m3": DataType.FP8_E4M3}
    base = HEADS | DENSE | {"seqlen_q": 3, "dtype": types[dtype]}
    found, _ = values_of(base | given, config_of(dtype, is_decode))
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize("entry", [FORWARD_ENTRY, DECODE_ENTRY], ids=["forward", "decode"])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("given", [(), OPTIONALS, OPTIONALS[:1], OPTIONALS[2:]])
def test_addresses_lie_where_the_entry_has_them(entry, is_fp8, given):
    """Packed as the launch does; the pointers that are absent are 0."""
    values = {name: 64 * (2 + i) for i, name in enumerate(OPTIONALS) if name in given}
    descales = {f"{name}_descale_ptr": 0x1000 + 4 * i for i, name in enumerate("qkv")} if is_fp8 else {}
    dtype = DataType.FP8_E4M3 if is_fp8 else DataType.FP16
    p = plain(FlashAttentionParams(q=16, k=32, v=48, out=80, softmax_lse=96, dtype=dtype, **values, **descales))
    layout = layout_of(entry, is_fp8, bool(given))
    scratch = range(1, 1 + len(layout.per_call) - len(addresses_of(p)))
    memory = (ctypes.c_uint64 * (layout.offsets[-1] // 8 + 1))()
    layout.per_call_struct.pack_into(memory, 0, *addresses_of(p), *scratch)
    places = dict(zip((name for name, _ in entry.arguments), layout.offsets, strict=False))
    expected = {"q": 16, "k": 32, "v": 48, "out": 80, "softmax_lse": 96, **dict.fromkeys(OPTIONALS, 0), **values}
    expected |= {name.removesuffix("_ptr"): at for name, at in descales.items()}
    assert {name: memory[places[name] // 8] for name in expected} == expected
    assert len(scratch) == (2 if entry is FORWARD_ENTRY else 3), "scratch and the stream follow"
