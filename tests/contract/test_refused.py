"""What is refused, under which status and in which words."""

from dataclasses import replace

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
    ONE_ROW,
    PACKED,
    PACKED_FP8,
    POINTERS,
    PREFILL,
    Array,
    every,
    first_problem,
)

from fa3_cute.contract.limits import MAX_MASKED_ROWS, MAX_SIZE
from fa3_cute.contract.status import Status
from fa3_cute.planning.operations import problems

# status, the good call, what is changed, the words that its one sentence must have.
NO_KV_STRIDES = every("k_row_stride v_row_stride k_batch_stride v_batch_stride", 0)
# Strides of tensors that are not there, and the pointers that they go with.
LONE_STRIDES = {
    f"{tensor}_descale_{dim}_stride": f"{tensor}_descale_ptr" for tensor in "qkv" for dim in ("batch", "head")
}
LONE_STRIDES |= {"alibi_batch_stride": "alibi_slopes"}
LONE_STRIDES |= {f"attn_mask_{dim}_stride": "attn_mask" for dim in ("batch", "head", "row")}
WANTED = (("total_q", "k"), ("total_q", "v"), ("total_k", "q"), ("total_k", "out"))
REFUSED = [
    *(
        (-1, DENSE, {name: value}, (f"{name}=", "device address"))
        for name in POINTERS
        for value in (None, 0, CUdeviceptr(0))
    ),
    # an empty side excuses its own tensors alone, and only in packed sequences
    *((-1, PACKED, {total: 0, name: None}, (f"{name}=None", "device address")) for total, name in WANTED),
    *(
        (-2, DENSE, {"head_dim": value}, (f"head_dim={value!r}", "a multiple of 8 from 8 to 256"))
        for value in (0, 84, -64, 520, 128.0, "128", True, None)
    ),
    *(
        (-4, DENSE, changes, (*(f"{name}={value!r}" for name, value in changes.items()), words))
        for changes, words in (
            ({"num_heads": 0}, "positive"),
            ({"num_heads_k": -1}, "positive"),
            ({"num_heads": 2.0}, "positive"),
            ({"num_heads_k": 32}, "at most num_heads=16"),
            ({"num_heads": 18}, "multiple of num_heads_k=4"),
        )
    ),
    *(
        (-5, DENSE, {"is_causal": True, name: value}, (f"{name}={value}", "negative"))
        for name in ("window_size_left", "window_size_right")
        for value in (0, 256)
    ),
    (-6, PACKED, {"cu_seqlens_q": None}, ("cu_seqlens_q=None", "cu_seqlens_k")),
    (-6, PACKED, {"cu_seqlens_k": 0}, ("cu_seqlens_k=0", "cu_seqlens_q")),
    (-6, PACKED, {"total_q": 0, "total_k": 0}, ("total_q=0, total_k=0",)),
    (-6, PACKED, {"mode": PREFILL}, ("mode=AttentionMode.PREFILL", "VARLEN_PREFILL")),
    (-6, PACKED, {"mode": DECODE, "seqlen_q": 1}, ("mode=AttentionMode.DECODE", "VARLEN_PREFILL")),
    (-6, DENSE, {"total_q": 896}, ("total_q=896", "without cu_seqlens_q")),
    *(
        (-7, DENSE, {name: value}, (f"{name}={value!r}", f"from 1 to {MAX_SIZE}"))
        for name in ("batch_size", "seqlen_q", "seqlen_k")
        for value in (0, -1, None, 2.0, True, "2")
    ),
    (-7, DENSE, {"seqlen_k": MAX_SIZE + 1}, (f"seqlen_k={MAX_SIZE + 1}", f"from 1 to {MAX_SIZE}")),
    (-7, DENSE, {"batch_size": 2**20, "seqlen_q": 2**15}, ("batch_size=1048576", "seqlen_q=32768", "2147483647 tiles")),
    *(
        (-7, PACKED, changes, words)
        for changes, words in (
            ({"total_q": -1}, ("total_q=-1", "from 0")),
            ({"total_k": None}, ("total_k=None", "from 0")),
            ({"batch_size": 0}, ("batch_size=0", "from 1")),
            ({"batch_size": 2**28}, ("batch_size=268435456", "tiles")),
        )
    ),
    *(
        (-7, DENSE, {name: value}, (f"{name}={value!r}", words))
        for name, value, words in (
            ("q_row_stride", 2052, "multiple of 8 elements"),
            ("k_head_stride", -128, "at least 0"),
            ("v_batch_stride", 2**39, f"below {2**39}"),
            ("k_row_stride", 512.0, "None (contiguous) or an int"),
            ("q_head_stride", True, "None (contiguous) or an int"),
            ("out_batch_stride", 0, "at least 128 (head_dim"),
            ("out_row_stride", 64, "at least 128 (head_dim"),
        )
    ),
    *(
        (
            -7,
            call,
            {f"{tensor}_descale_{dim}_stride": value},
            (f"{tensor}_descale_{dim}_stride={value!r}", f"an int from 0 to {MAX_SIZE}, in elements"),
        )
        for call, value in (
            (DENSE, -1),
            (DENSE_FP8, -1),
            (DENSE_FP8, MAX_SIZE + 1),
            (DENSE_FP8, 1.5),
            (DENSE_FP8, "1"),
            (PACKED_FP8, -16),
            (DENSE_FP8, True),
        )
        for tensor in "qkv"
        for dim in ("batch", "head")
    ),
    *(
        (-9, call, {name: 1}, (f"{name}=1", f"None or 0 without {pointer}"))
        for call in (DENSE, DENSE_FP8, PACKED)
        for name, pointer in LONE_STRIDES.items()
    ),
    (-9, DENSE_FP8, DESCALES | {"k_descale_ptr": 0, "k_descale_batch_stride": 4}, ("k_descale_batch_stride=4",)),
    (-7, replace(DENSE_FP8, num_heads_k=1), {"q_descale_head_stride": -3}, ("q_descale_head_stride=-3", "from 0")),
    (-7, replace(ONE_ROW, dtype=FP8), {"k_descale_batch_stride": 0.5}, ("k_descale_batch_stride=0.5", "an int from 0")),
    *(
        (-7, call, {f"{tensor}_{dim}_stride": value}, (f"{tensor}_{dim}_stride={value}", "multiple of 16 elements"))
        for call in (DENSE_FP8, PACKED_FP8)
        for tensor in "qkv"
        for dim, value in (("row", 2056), ("head", 136))
    ),
    (-7, DENSE_FP8, {"q_batch_stride": 2**40}, (f"q_batch_stride={2**40}", f"below {2**40}")),
    (-7, replace(DENSE_FP8, batch_size=1), {"out_row_stride": 2052}, ("out_row_stride=2052", "multiple of 8 elements")),
    (-7, DENSE_FP8, {"out_batch_stride": 2**39}, (f"out_batch_stride={2**39}", f"below {2**39}")),
    (
        -7,
        DENSE,
        {"num_heads_k": 2, "seqlen_k": MAX_SIZE, "head_dim": 256, "v_batch_stride": 0},
        ("k_batch_stride=None (contiguous: 1099511496704)", f"below {2**39}"),
    ),
    *(
        (-7, DENSE, {name: value}, (f"{name}={value}", "rows of out apart"))
        for name, value in (
            ("out_head_stride", 4096),
            ("out_row_stride", 128),
            ("out_row_stride", 4096),
            ("out_batch_stride", 2048 * 100 + 64),
            ("out_batch_stride", 2048 * 511),
        )
    ),
    *(
        (-7, base, changes | NO_KV_STRIDES, (f"{rows}=", f"must add up to at most {MAX_MASKED_ROWS}", "window"))
        for base, rows, changes in (
            (DENSE, "seqlen_k", {"is_causal": True, "seqlen_k": MAX_MASKED_ROWS}),
            (DENSE, "seqlen_k", {"window_size_left": 7, "seqlen_k": 1_200_000_000}),
            (DENSE, "seqlen_k", {"window_size_left": 2**31 - 1, "seqlen_k": 1_200_000_000}),
            (DENSE, "seqlen_q", {"window_size_right": 0, "seqlen_k": MAX_MASKED_ROWS - 511}),
            (PACKED, "total_k", {"window_size_right": 7, "total_k": MAX_MASKED_ROWS}),
            (PACKED_FP8, "total_k", {"is_causal": True, "total_k": 2**30}),
        )
    ),
    (-8, DENSE, {"mode": DECODE}, ("seqlen_q=512", "1 with mode=DECODE")),
    *((-9, DENSE, {name: A + 8}, (f"{name}={A + 8:#x}", "16 bytes")) for name in POINTERS),
    (-9, DENSE, {"softmax_lse": A + 2}, (f"softmax_lse={A + 2:#x}", "4 bytes")),
    (-9, PACKED, {"cu_seqlens_k": A + 1}, (f"cu_seqlens_k={A + 1:#x}", "4 bytes")),
    *((-9, DENSE, {"q": value}, (f"q={value:#x}", "device address")) for value in (-16, 2**64)),
    *(
        (-9, DENSE, {name: value}, (f"{name}=", "__int__"))
        for name in ("q", "softmax_lse", "seqused_k")
        for value in ("0x7f", 1.5, True, [A], Array())
    ),
    *(
        (-9, DENSE, {name: value}, (f"{name}={value!r}", words))
        for name, value, words in (
            ("dtype", 3, "DataType.FP16"),
            ("dtype", "fp16", "DataType.FP16"),
            ("dtype", False, "DataType.FP16"),
            ("out_dtype", 7, "None or FP16"),
            ("mode", 3, "AttentionMode.PREFILL"),
            ("mode", None, "AttentionMode.PREFILL"),
            ("is_causal", "yes", "True or False"),
            ("is_causal", None, "True or False"),
            ("pack_gqa", 2, "None (automatic)"),
            ("window_size_left", None, "negative is unbounded"),
            ("window_size_right", 2**31, f"up to {2**31 - 1}"),
            ("window_size_left", -1.0, "negative is unbounded"),
            ("num_splits", 1.0, "0 (automatic)"),
            ("num_splits", None, "0 (automatic)"),
            ("workspace_bytes", -1, "at least 0"),
        )
    ),
    (-9, DENSE, {"out_dtype": BF16}, ("out_dtype=DataType.BF16", "None or FP16 or FP32 with dtype=FP16")),
    *(
        (-9, call, {"out_dtype": value}, (f"out_dtype={text}", "None or FP16 or BF16 or FP32 with dtype=FP8_E4M3"))
        for call in (DENSE_FP8, PACKED_FP8)
        for value, text in ((FP8, "DataType.FP8_E4M3"), (4, "4"), ("bf16", "'bf16'"))
    ),
    *(
        (-9, call, {name: value}, (f"{name}={value:#x}", "4 bytes"))
        for call in (DENSE_FP8, PACKED_FP8)
        for name in DESCALES
        for value in (A + 2, A + 5)
    ),
    *((-9, DENSE_FP8, {name: value}, (f"{name}=", "__int__")) for name in DESCALES for value in (1.5, Array(), "x")),
    (-9, DENSE_FP8, {"k_descale_ptr": -4}, ("k_descale_ptr=-0x4", "device address")),
    *(
        (-9, DENSE, {"softmax_scale": value}, (f"softmax_scale={value!r}", "None (1/sqrt(head_dim))"))
        for value in (0, -1.0, float("nan"), float("inf"), 1e39, 2.4e38, 1.8e38, 1e-39, 10**60, "1", True)
    ),
    *(
        (-9, call, {name: A}, (f"{name}={A}", f"None with dtype={call.dtype.name}", "belong to FP8_E4M3"))
        for call in (DENSE, PACKED, replace(DENSE, dtype=BF16))
        for name in DESCALES
    ),
    (-9, DENSE, {"workspace": A}, (f"workspace={A}", "workspace_bytes=0", "together")),
    (-9, DENSE, {"workspace_bytes": 8}, ("workspace=None", "workspace_bytes=8", "together")),
    *(
        (-11, DENSE, {"softcap": value}, (f"softcap={value!r}", "0 (off) or a number from"))
        for value in (-1, float("nan"), float("inf"), 1e39, 1e-39, "30", True)
    ),
    *((-13, DENSE, {"num_splits": value}, (f"num_splits={value}", "256")) for value in (-1, 257)),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    assert first_problem(base) is None
    found = problems(params)
    assert found, "accepted"
    assert found[0] == first_problem(params)
    assert found[0].status == status
    same = [problem for problem in found if problem.status == status]
    assert len(same) == 1, same
    assert all(word in same[0].detail for word in words), same[0].detail


@pytest.mark.parametrize("head_dim", [136, 248])
@pytest.mark.parametrize("base", [DENSE_FP8, PACKED_FP8, replace(DENSE_FP8, seqlen_q=1, mode=DECODE)])
def test_fp8_head_dim(base, head_dim):
    found = problems(replace(base, head_dim=head_dim))
    assert found == [
        (Status.FP8_HEAD_DIM, f"head_dim={head_dim}: must be a multiple of 16 from 16 to 256 with dtype=FP8_E4M3")
    ]
    assert first_problem(replace(base, head_dim=head_dim)) == found[0]
