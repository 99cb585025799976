"""What is accepted."""

from dataclasses import replace

import numpy as np
import pytest
from cuda.bindings.driver import CUdeviceptr
from rule_calls import (
    A,
    BF16,
    DECODE,
    DENSE,
    DENSE_FP8,
    DESCALES,
    FP8,
    FP16,
    ONE_ROW,
    PACKED,
    PACKED_FP8,
    PER_HEAD,
    Handle,
    every,
    first_problem,
)

from fa3_cute.contract.limits import LARGEST_SCALE, MAX_MASKED_ROWS, MAX_SIZE, SMALLEST_SCALE
from fa3_cute.planning.operations import problems

NO_KV_STRIDES = every("k_row_stride v_row_stride k_batch_stride v_batch_stride", 0)
# (the good call that is changed, the changes): no problem at all.
ACCEPTED = [
    (DENSE, {}),
    (ONE_ROW, {}),
    (DENSE, {"dtype": BF16, "out_dtype": BF16, "softmax_lse": A + 4, "softmax_scale": 0.1, "is_causal": True}),
    (DENSE, every("q k v out softmax_lse", Handle())),
    (DENSE, every("q k v out softmax_lse", CUdeviceptr(A))),
    (DENSE, every("softmax_lse cu_seqlens_q page_table seqused_k workspace", 0)),
    (DENSE, {"num_splits": 1, "pack_gqa": False, "window_size_left": -7}),
    (DENSE, {"seqlen_q": 1, "mode": DECODE}),
    (DENSE, {"seqlen_q": 1, "mode": DECODE, "seqused_k": A + 4}),
    (DENSE, {"seqused_q": Handle(), "seqused_k": CUdeviceptr(A), "is_causal": True}),
    *(
        (DENSE, {"window_size_left": left, "window_size_right": right})
        for left, right in ((0, -1), (-1, 0), (0, 0), (256, -9), (-1, 256), (1024, 0), (2**31 - 1, 2**31 - 1))
    ),
    (PACKED, {}),
    (PACKED, {"dtype": BF16, "softmax_lse": A + 4, "is_causal": True, "cu_seqlens_q": A + 4, "cu_seqlens_k": A + 8}),
    (PACKED, every("q cu_seqlens_q cu_seqlens_k seqused_q", Handle())),
    (PACKED, {"total_q": 0}),
    # of no rows there is no address
    *((PACKED, {"total_q": 0} | every(names, None)) for names in ("q", "out", "q out")),
    *((PACKED, {"total_k": 0} | every(names, 0)) for names in ("k", "v", "k v")),
    (PACKED_FP8, {"total_k": 0} | every("k v", CUdeviceptr(0))),
    # as many rows as a mask takes, and more without one
    (DENSE, {"is_causal": True, "seqlen_q": 1, "seqlen_k": MAX_MASKED_ROWS - 1} | NO_KV_STRIDES),
    (DENSE, {"window_size_left": 7, "seqlen_q": 512, "seqlen_k": MAX_MASKED_ROWS - 512} | NO_KV_STRIDES),
    (PACKED, {"window_size_right": 0, "total_k": MAX_MASKED_ROWS - 896} | NO_KV_STRIDES),
    (PACKED, {"window_size_right": -3, "total_k": MAX_MASKED_ROWS} | NO_KV_STRIDES),
    *((DENSE, {"softmax_scale": scale}) for scale in (SMALLEST_SCALE, LARGEST_SCALE, 1, np.float64(0.1))),
    (PACKED, {"total_k": 0, "window_size_left": 7, "seqused_q": A, "seqused_k": A + 4}),
    (PACKED, every("seqlen_q seqlen_k", -5)),
    (PACKED, every("seqlen_q seqlen_k", None)),
    (PACKED, {"batch_size": 10_000, "total_q": 200_000}),
    # [heads, rows, head_dim] in memory, a packed QKV projection
    (PACKED, {"out_head_stride": 896 * 128, "out_row_stride": 128}),
    (PACKED, every("q_row_stride k_row_stride v_row_stride", 6144)),
    # [batch, heads, rows, head_dim] in memory, a packed QKV projection, padded rows, one K head for the whole batch
    (DENSE, {"out_head_stride": 512 * 128, "out_row_stride": 128}),
    (DENSE, every("q_row_stride k_row_stride v_row_stride", 6144) | every("q_batch_stride k_batch_stride", 6144 * 640)),
    (DENSE, {"out_row_stride": 16 * 128 + 8, "out_batch_stride": 512 * (16 * 128 + 8)}),
    (DENSE, every("k_batch_stride k_row_stride k_head_stride", 0)),
    *(
        (call, {"head_dim": head_dim, "out_dtype": out_dtype} | descales)
        for call in (DENSE_FP8, PACKED_FP8)
        for head_dim in (64, 96, 128, 192, 256)
        for out_dtype, descales in ((None, {}), (FP16, DESCALES), (BF16, DESCALES | PER_HEAD))
    ),
    (DENSE_FP8, {"seqlen_q": 1, "mode": DECODE, "seqused_k": A + 4, "num_splits": 8} | DESCALES),
    (DENSE_FP8, {"is_causal": True, "softmax_lse": A + 4, "q_descale_ptr": A, "k_descale_ptr": 0}),
    (DENSE_FP8, every("q_descale_ptr k_descale_ptr v_descale_ptr", Handle())),
    (
        DENSE_FP8,
        {
            "q_row_stride": 6144,
            "k_head_stride": 144,
            "v_row_stride": 0,
            "out_row_stride": 16 * 128 + 8,
            "out_batch_stride": 512 * (16 * 128 + 8),
        },
    ),
    (DENSE, {"dtype": 1, "mode": 0, "softmax_scale": np.float32(1), "is_causal": np.True_, "batch_size": np.int64(2)}),
    (DENSE, every("softmax_lse page_table workspace seqused_k", CUdeviceptr(0))),
    (PACKED, {"total_q": np.int64(896), "mode": 2, "window_size_left": np.int32(0)}),
    (PACKED, {"q_batch_stride": 3, "k_batch_stride": 2**60, "out_batch_stride": -1}),
    (PACKED, {"total_q": 0, "out_row_stride": 3}),
    (PACKED, {"total_k": MAX_SIZE, "k_row_stride": 0, "v_row_stride": 0}),
    (DENSE, {"workspace": A, "workspace_bytes": 64}),
    (DENSE, {"seqlen_k": MAX_SIZE} | every("k_row_stride v_row_stride k_batch_stride v_batch_stride", 0)),
    # rows of out that interleave without meeting
    (
        DENSE,
        {
            "num_heads": 2,
            "num_heads_k": 1,
            "seqlen_q": 2,
            "out_batch_stride": 384,
            "out_row_stride": 256,
            "out_head_stride": 1024,
        },
    ),
    (DENSE, {"num_heads": 1, "num_heads_k": 1, "seqlen_q": 2, "out_row_stride": 136, "out_batch_stride": 264}),
    (ONE_ROW, {f"{tensor}_{dim}_stride": 3 for tensor in ("q", "k", "v", "out") for dim in ("batch", "row", "head")}),
    (ONE_ROW, {"out_batch_stride": -1, "q_row_stride": 2**60}),
    (DENSE, {"dtype": 2, "out_dtype": 0, "k_descale_ptr": CUdeviceptr(A), "k_descale_head_stride": np.int64(1)}),
    (DENSE_FP8, every("q_batch_stride k_batch_stride", 2**40 - 16)),
    (DENSE_FP8, {"q_descale_batch_stride": None}),
    # strides of size 1
    (DENSE_FP8, DESCALES | {"num_heads_k": 1, "k_descale_head_stride": -3, "v_descale_head_stride": 2**40}),
    (
        replace(ONE_ROW, dtype=FP8),
        DESCALES | {f"{tensor}_descale_{dim}_stride": -3 for tensor in "qkv" for dim in ("batch", "head")},
    ),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    assert problems(replace(base, **changes)) == []
    assert first_problem(replace(base, **changes)) is None


@pytest.mark.parametrize("is_per_head", [False, True], ids=["one for all", "per head"])
@pytest.mark.parametrize("name", DESCALES)
def test_each_descale_alone(name, is_per_head):
    """The others are 1.0 then."""
    own = {stride: size for stride, size in PER_HEAD.items() if stride[0] == name[0]} if is_per_head else {}
    assert problems(replace(DENSE_FP8, **{name: A + 4}, **own)) == []
