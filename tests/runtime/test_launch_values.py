"""params -> the numbers of the argument buffer, and where they lie in it."""

import numpy as np
import pytest

from fa3_cute.contract.arguments import DECODE_ENTRY, FORWARD_ENTRY
from fa3_cute.contract.params import OPTIONALS, DataType, FlashAttentionParams
from fa3_cute.contract.plain import plain
from fa3_cute.planning.operations import Launch, launch_of
from fa3_cute.planning.problem import ProblemShape
from fa3_cute.planning.tables import decode_config, forward_config
from fa3_cute.runtime.arguments import layout_of

ENTRIES = {"forward": FORWARD_ENTRY, "decode": DECODE_ENTRY}


def values_of(given, cfg) -> tuple[dict, Launch]:
    """{argument: value} of what a shape fills, and the launch that it is for."""
    shape = ProblemShape.of(plain(FlashAttentionParams(**given)))
    launch, layout = launch_of(cfg, shape), layout_of(cfg.entry, cfg.is_fp8)
    values = layout.values(shape, launch.counts(132))
    assert len(layout.pack(shape, launch.counts(132))) == layout.per_shape_struct.size
    return dict(zip(layout.per_shape, values, strict=True)), launch


@pytest.mark.parametrize("has_descales", [False, True])
@pytest.mark.parametrize("has_optionals", [False, True])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_storage_is_aligned_and_apart(entry, has_optionals, has_descales):
    """But for the arguments that are always 0: these share 8 bytes, which nothing is packed into."""
    layout, names = layout_of(entry, has_descales, has_optionals), [name for name, _ in entry.arguments]
    sizes = [4 if kind in ("int32", "float32") else 8 for _, kind in entry.arguments]
    places = dict(zip(names, zip(layout.offsets, sizes, strict=False), strict=True))
    places["error"] = layout.offsets[-1], 4
    assert all(offset % size == 0 for offset, size in places.values())
    absent = {places.pop(name) for name in layout.absent}
    spans = sorted([*places.values(), *absent])
    assert all(at + size <= following for (at, size), (following, _) in zip(spans, spans[1:], strict=False))
    assert sorted(layout.per_call + layout.per_shape + layout.absent) == sorted(names)
    assert len(absent) == (not has_descales or not has_optionals)
    descales = [] if has_descales else [name for name in names if "descale" in name]
    assert sorted(layout.absent) == sorted(descales + ([] if has_optionals else list(OPTIONALS)))
    of_each_layer = {"q_descale", "k_descale", "v_descale"}
    assert not has_descales or of_each_layer < {*layout.per_call}


HEADS = {"num_heads": 8, "num_heads_k": 4, "head_dim": 64}
DENSE = {"batch_size": 2, "seqlen_q": 5, "seqlen_k": 7}
PACKED = {
    "batch_size": 3,
    "seqlen_q": None,
    "seqlen_k": "ignored",
    "cu_seqlens_q": 64,
    "cu_seqlens_k": 128,
    "total_q": 9,
    "total_k": 11,
}
CONTIGUOUS = {
    "q_row_stride": 512,
    "k_row_stride": 256,
    "v_row_stride": 256,
    "out_row_stride": 512,
    **{f"{tensor}_head_stride": 64 for tensor in ("q", "k", "v", "out")},
}
ABSENT = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"), 0)
WIDE = 2**30


@pytest.mark.parametrize(
    "given, values",
    [
        (
            DENSE,
            {
                **CONTIGUOUS,
                **ABSENT,
                "q_batch_stride": 2560,
                "out_batch_stride": 2560,
                "k_batch_stride": 1792,
                "v_batch_stride": 1792,
                "batch_size": 2,
                "seqlen_q": 5,
                "seqlen_k": 7,
                "num_heads": 8,
                "num_heads_k": 4,
                "window_size_left": WIDE,
                "window_size_right": WIDE,
                "num_sms": 132,
                "softmax_scale": 0.125,
            },
        ),
        (DENSE | {"softmax_scale": 0.5}, {"softmax_scale": 0.5}),
        (DENSE | {"seqused_q": 4, "cu_seqlens_k": 0}, ABSENT | {"seqused_q": 4}),
        # a dimension of size 1 has the contiguous stride, whatever is given
        (
            DENSE | {"num_heads_k": 1, "k_head_stride": 3, "k_row_stride": 1000, "v_row_stride": 8},
            {"k_head_stride": 64, "k_row_stride": 1000, "v_row_stride": 8, "k_batch_stride": 448},
        ),
        (DENSE | {"batch_size": 1, "q_batch_stride": 3}, {"q_batch_stride": 2560}),
        # packed: the totals are the rows, one batch, and batch_size still counts the sequences
        (
            PACKED,
            {
                **CONTIGUOUS,
                **ABSENT,
                "cu_seqlens_q": 64,
                "cu_seqlens_k": 128,
                "batch_size": 3,
                "seqlen_q": 9,
                "seqlen_k": 11,
                **{f"{tensor}_batch_stride": 0 for tensor in ("q", "k", "v", "out")},
            },
        ),
        (
            PACKED | {"q_batch_stride": 4096, "k_batch_stride": 3, "q_row_stride": 1024, "out_head_stride": 576},
            CONTIGUOUS | {"q_batch_stride": 0, "k_batch_stride": 0, "q_row_stride": 1024, "out_head_stride": 576},
        ),
        (PACKED | {"total_q": 1, "q_row_stride": 3}, {"seqlen_q": 1, "q_row_stride": 512}),
        (PACKED | {"total_k": 0, "seqused_k": 4}, {"seqlen_k": 0, "seqused_k": 4, "cu_seqlens_q": 64}),
        *(
            (
                DENSE | {"window_size_left": left, "window_size_right": right},
                {"window_size_left": left_reach, "window_size_right": right_reach},
            )
            for left, right, left_reach, right_reach in (
                (0, 0, 0, 0),
                (-1, 7, WIDE, 7),
                (WIDE - 1, -9, WIDE - 1, WIDE),
                (WIDE, 2**31 - 256, WIDE, WIDE),
            )
        ),
    ],
)
def test_shape_values(given, values):
    resolved, _ = values_of(HEADS | given, forward_config("fp16", 64, "full", False, True))
    assert {name: resolved[name] for name in values} == values


@pytest.mark.parametrize(
    "given, values",
    [
        (
            DENSE,
            {
                **CONTIGUOUS,
                "seqused_q": 0,
                "seqused_k": 0,
                "q_batch_stride": 2560,
                "k_batch_stride": 1792,
                "batch_size": 2,
                "seqlen_q": 5,
                "seqlen_k": 7,
                "num_heads": 8,
                "num_heads_k": 4,
                "window_size_left": WIDE,
                "window_size_right": WIDE,
                "packed_heads": 2,
                "num_splits": 1,
                "cluster_size": 1,
                "softmax_scale": 0.125,
            },
        ),
        (DENSE | {"seqused_k": 4, "pack_gqa": False}, {"seqused_k": 4, "packed_heads": 1}),
        (DENSE | {"is_causal": True}, {"window_size_left": WIDE, "window_size_right": 0}),
        (DENSE | {"window_size_left": 3}, {"window_size_left": 3, "window_size_right": WIDE}),
        (DENSE | {"num_splits": 24}, {"num_splits": 24, "cluster_size": 8}),
        (DENSE | {"num_splits": 11}, {"num_splits": 11, "cluster_size": 1}),
    ],
)
def test_decode_shape_values(given, values):
    cfg = decode_config("fp16", 64, is_local="window_size_left" in given or "is_causal" in given)
    named, launch = values_of(HEADS | given, cfg)
    assert {name: named[name] for name in values} == values
    assert launch.plan[:4] == tuple(named[name] for name in ("packed_heads", *PLANNED))


# The plan knows how many bytes an element has.
PLANNED = ("num_splits", "cluster_size", "smem_bytes")
PER_HEAD = {
    "q_descale_batch_stride": 8,
    "q_descale_head_stride": 1,
    "k_descale_batch_stride": 2**31 - 256,
    "k_descale_head_stride": 3,
    "v_descale_batch_stride": 5,
    "v_descale_head_stride": 0,
}


@pytest.mark.parametrize(
    "given, values",
    [
        ({}, dict.fromkeys(PER_HEAD, 0)),
        (PER_HEAD, PER_HEAD),
        (dict.fromkeys(PER_HEAD, None), dict.fromkeys(PER_HEAD, 0)),
        (dict.fromkeys(PER_HEAD, np.int32(7)), dict.fromkeys(PER_HEAD, 7)),
        # along a dimension of size 1 a stride means nothing
        (PER_HEAD | {"batch_size": 1}, PER_HEAD | {name: 0 for name in PER_HEAD if "batch" in name}),
        (PER_HEAD | {"num_heads_k": 1}, PER_HEAD | {"k_descale_head_stride": 0, "v_descale_head_stride": 0}),
        (PER_HEAD | {"num_heads": 1, "num_heads_k": 1}, PER_HEAD | {name: 0 for name in PER_HEAD if "head" in name}),
    ],
)
@pytest.mark.parametrize("base", [DENSE, PACKED, DENSE | {"seqlen_q": 1}], ids=["dense", "packed", "decode"])
def test_descale_strides(base, given, values):
    """They come behind the tensors' strides and change none of the other values."""

    def named(dtype, out_dtype):
        if base in (DENSE, PACKED):
            cfg = forward_config(dtype, 64, "full", False, base is PACKED, out_dtype)
        else:
            cfg = decode_config(dtype, 64, False, out_dtype)
        values, _ = values_of(HEADS | base | given | {"dtype": DataType.FP8_E4M3 if out_dtype else DataType.BF16}, cfg)
        return values

    with_descales, without = named("fp8_e4m3", "bf16"), named("bf16", None)
    assert {name: with_descales.pop(name) for name in PER_HEAD} == values
    assert with_descales.keys() == without.keys() and all(
        with_descales[name] == without[name] for name in without if name not in PLANNED
    )
