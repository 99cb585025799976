"""What is refused, under which status and in which words."""

from dataclasses import fields, replace

import numpy as np
import pytest
from cuda.bindings.driver import CUdeviceptr
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3_cute.contract import rules
from fa3_cute.contract.limits import MAX_SIZE
from fa3_cute.contract.params import AttentionMode, DataType, FlashAttentionParams
from fa3_cute.contract.status import Problem, Status
from fa3_cute.contract.plain import plain
from fa3_cute.contract.rules import contract_problems
from fa3_cute.planning.operations import checked, problems

A = 0x7F00_0000_0000
FP16, BF16, FP8 = DataType
PREFILL, DECODE, VARLEN = AttentionMode
POINTERS = {"q": A, "k": A, "v": A, "out": A}
HEADS = {"num_heads": 16, "num_heads_k": 4, "head_dim": 128}
DENSE = FlashAttentionParams(**POINTERS, **HEADS, batch_size=2, seqlen_q=512, seqlen_k=640)
PACKED = FlashAttentionParams(
    **POINTERS, **HEADS, batch_size=3, mode=VARLEN, cu_seqlens_q=A, cu_seqlens_k=A, total_q=896, total_k=700
)
DENSE_FP8, PACKED_FP8 = (replace(call, dtype=FP8) for call in (DENSE, PACKED))
ONE_ROW = replace(DENSE, batch_size=1, seqlen_q=1, seqlen_k=1, num_heads=1, num_heads_k=1)


class Handle:
    """A pointer as cuda.core hands it out."""

    def __int__(self):
        return A


class Array:
    """An array where a pointer belongs: its int is its one element, not its address."""

    def __dlpack__(self):
        return A

    __int__ = __index__ = __dlpack__


def every(names: str, value) -> dict:
    return dict.fromkeys(names.split(), value)


DESCALES = every("q_descale_ptr k_descale_ptr v_descale_ptr", A + 4)
PER_HEAD = {
    "q_descale_batch_stride": 16,
    "q_descale_head_stride": 1,
    "k_descale_batch_stride": 4,
    "k_descale_head_stride": 1,
    "v_descale_batch_stride": MAX_SIZE,
}


def first_problem(params):
    """What `forward` would say."""
    found = checked(plain(params))
    return found if isinstance(found, Problem) else None


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
        for head_dim in (64, 96, 128)
        for out_dtype, descales in ((None, {}), (FP16, DESCALES), (BF16, DESCALES | PER_HEAD))
    ),
    (DENSE_FP8, {"seqlen_q": 1, "mode": DECODE, "seqused_k": A + 4, "num_splits": 8} | DESCALES),
    (DENSE_FP8, {"is_causal": True, "softmax_lse": A + 4, "q_descale_ptr": A, "k_descale_ptr": 0}),
    (DENSE_FP8, every("q_descale_ptr k_descale_ptr v_descale_ptr", Handle())),
    (DENSE_FP8, PER_HEAD),
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
    (DENSE, {"workspace": A, "workspace_bytes": 64, "q_descale_batch_stride": 16}),
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
    (DENSE, {"dtype": 2, "out_dtype": 0, "q_descale_ptr": CUdeviceptr(A), "k_descale_head_stride": np.int64(1)}),
    (DENSE_FP8, every("q_batch_stride k_batch_stride", 2**40 - 16)),
    (DENSE_FP8, {"q_descale_batch_stride": None}),
    # strides of size 1
    (DENSE_FP8, {"num_heads_k": 1, "k_descale_head_stride": -3, "v_descale_head_stride": 2**40}),
    (
        replace(ONE_ROW, dtype=FP8),
        DESCALES | {f"{tensor}_descale_{dim}_stride": -3 for tensor in "qkv" for dim in ("batch", "head")},
    ),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    assert problems(replace(base, **changes)) == []
    assert first_problem(replace(base, **changes)) is None


@pytest.mark.parametrize("strides", [{}, PER_HEAD], ids=["one for all", "per head"])
@pytest.mark.parametrize("name", DESCALES)
def test_each_descale_alone(name, strides):
    """The others are 1.0 then."""
    assert problems(replace(DENSE_FP8, **{name: A + 4}, **strides)) == []


# status, the good call, what is changed, the words that its one sentence must have.
REFUSED = [
    *(
        (-1, DENSE, {name: value}, (f"{name}=", "device address"))
        for name in POINTERS
        for value in (None, 0, CUdeviceptr(0))
    ),
    *(
        (-2, DENSE, {"head_dim": value}, (f"head_dim={value!r}", "64, 96, 128, 192 or 256"))
        for value in (0, 80, -64, 512, 128.0, "128", True, None)
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
    (-6, DENSE, {"total_q": 896}, ("total_q=896", "cu_seqlens_q")),
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
    (-9, DENSE, {"out_dtype": BF16}, ("out_dtype=DataType.BF16", "None or FP16 with dtype=FP16")),
    *(
        (-9, call, {"out_dtype": value}, (f"out_dtype={text}", "None or FP16 or BF16 with dtype=FP8_E4M3"))
        for call in (DENSE_FP8, PACKED_FP8)
        for value, text in ((FP8, "DataType.FP8_E4M3"), (3, "3"), ("bf16", "'bf16'"))
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
        for value in (0, -1.0, float("nan"), float("inf"), 1e39, 1e-39, 10**60, "1", True)
    ),
    *(
        (-9, call, {name: A}, (f"{name}={A}", f"None with dtype={call.dtype.name}", "belong to FP8_E4M3"))
        for call in (DENSE, PACKED, replace(DENSE, dtype=BF16))
        for name in DESCALES
    ),
    (-9, DENSE, {"workspace": A}, (f"workspace={A}", "workspace_bytes=0", "together")),
    (-9, DENSE, {"workspace_bytes": 8}, ("workspace=None", "workspace_bytes=8", "together")),
    *((-11, DENSE, {"softcap": value}, (f"softcap={value!r}", "None or 0")) for value in (30.0, -1, float("nan"))),
    *((-13, DENSE, {"num_splits": value}, (f"num_splits={value}", "256")) for value in (-1, 257)),
    *(
        (status, DENSE, {name: value}, (f"{name}={value!r}", "None or 0", "not supported"))
        for status, name, value in (
            (-14, "page_table", A),
            (-14, "page_size", 64),
            (-15, "rotary_cos", A),
            (-15, "rotary_sin", A),
            (-15, "rotary_dim", 64),
            (-16, "p_dropout", 0.1),
            (-16, "rng_state", A),
            (-16, "attn_mask", A),
            (-16, "leftpad_k", A),
            (-16, "k_new", A),
            (-16, "v_new", A),
            (-16, "seqlen_knew", 128),
        )
    ),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    assert first_problem(base) is None
    found = [problem for problem in problems(params) if "not implemented yet" not in problem.detail]
    assert found, "accepted"
    assert found[0] == first_problem(params)
    assert found[0].status == status
    same = [problem for problem in found if problem.status == status]
    assert len(same) == 1, same
    assert all(word in same[0].detail for word in words), same[0].detail


@pytest.mark.parametrize("head_dim", [192, 256])
@pytest.mark.parametrize("base", [DENSE_FP8, PACKED_FP8, replace(DENSE_FP8, seqlen_q=1, mode=DECODE)])
def test_fp8_head_dim(base, head_dim):
    found = problems(replace(base, head_dim=head_dim))
    assert found == [(Status.FP8_HEAD_DIM, f"head_dim={head_dim}: must be 64, 96 or 128 with dtype=FP8_E4M3")]
    assert first_problem(replace(base, head_dim=head_dim)) == found[0]


# Right by the contract, so the kernel that is missing is the only problem; a landed kernel moves its row to ACCEPTED.
@pytest.mark.parametrize(
    "base, changes, feature",
    [
        (PACKED, {"num_splits": 256}, "split-KV of packed sequences"),
        (PACKED, {"pack_gqa": True}, "packed heads of packed sequences"),
        (PACKED_FP8, {"num_splits": 2}, "split-KV of packed sequences"),
        (PACKED_FP8, {"pack_gqa": True}, "packed heads of packed sequences"),
    ],
)
def test_pending_features_are_named(base, changes, feature):
    params = replace(base, **changes)
    found = problems(params)
    assert {problem.status for problem in found} == {Status.FEATURE_UNSUPPORTED}
    assert all(f"{feature} not implemented yet" in problem.detail for problem in found)
    assert contract_problems(params) == []


def test_first_problem_follows_the_table():
    """A call that breaks every rule is refused for each in turn, as one after the other is mended."""
    params = FlashAttentionParams(
        k=A,
        v=A,
        out=A + 1,
        head_dim=80,
        num_heads=6,
        num_heads_k=4,
        is_causal=True,
        window_size_left=1,
        mode=DECODE,
        cu_seqlens_q=A,
        softcap=1,
        num_splits=300,
        page_table=A,
        rotary_dim=8,
        p_dropout=0.5,
        dtype=FP8,
    )
    mending = [
        (-1, {"q": A}),
        (-2, {"head_dim": 192}),
        (-3, {"head_dim": 128}),
        (-4, {"num_heads": 8}),
        (-5, {"is_causal": False}),
        (-6, {"cu_seqlens_q": None}),
        (-7, {"batch_size": 1, "seqlen_q": 2, "seqlen_k": 1}),
        (-8, {"seqlen_q": 1}),
        (-9, {"out": A}),
        (-11, {"softcap": 0}),
        (-13, {"num_splits": 0}),
        (-14, {"page_table": None}),
        (-15, {"rotary_dim": 0}),
        (-16, {"p_dropout": 0}),
    ]
    for status, change in mending:
        assert first_problem(params).status == status, (first_problem(params), change)
        params = replace(params, **change)
    assert first_problem(params) is None


def test_rules_are_in_the_order_of_the_table():
    statuses = [status for status, _ in rules.RULES]
    assert statuses == sorted(statuses, reverse=True)


def test_problem_prints_as_a_sentence():
    assert str(first_problem(replace(DENSE, head_dim=80))) == (
        "UNSUPPORTED_HEAD_DIM (-2): head_dim=80: must be 64, 96, 128, 192 or 256"
    )


class Hostile:
    """Every conversion fails."""

    def __repr__(self):
        raise OSError

    __eq__ = __hash__ = __index__ = __int__ = __float__ = __bool__ = __repr__


VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    4,
    8,
    16,
    64,
    100,
    128,
    192,
    512,
    2048,
    2**21,
    MAX_SIZE,
    2**31,
    2**39,
    2**64,
    A,
    A + 4,
    A + 8,
    0.0,
    0.5,
    1.0,
    -1.0,
    1e39,
    float("nan"),
    "",
    "q",
    [],
    (),
    {},
    np.int32(128),
    np.float32(0.5),
    np.zeros(2),
    np.zeros(1, np.int64),
    np.False_,
    CUdeviceptr(0),
    CUdeviceptr(A),
    Handle(),
    Array(),
    Hostile(),
    object(),
    *DataType,
    *AttentionMode,
]
# By number: hypothesis wants to print what it draws.
CHANGES = st.dictionaries(
    st.sampled_from([field.name for field in fields(FlashAttentionParams)]), st.integers(0, len(VALUES) - 1), max_size=6
)


@settings(max_examples=800, deadline=None)
@given(
    st.sampled_from(
        [
            DENSE,
            PACKED,
            ONE_ROW,
            replace(DENSE, seqused_k=A, window_size_left=8),
            replace(DENSE_FP8, **DESCALES, **PER_HEAD),
            PACKED_FP8,
            replace(ONE_ROW, dtype=FP8),
        ]
    ),
    CHANGES,
)
def test_any_value_is_a_problem_and_no_exception(base, changes):
    params = replace(base, **{name: VALUES[number] for name, number in changes.items()})
    found = problems(params)
    assert first_problem(params) == (found or [None])[0]
    assert [problem.status for problem in found] == sorted((problem.status for problem in found), reverse=True)
    assert all(problem.detail.isprintable() for problem in found)


STRIDE = st.sampled_from([None, 0, 8, 64, 128, 136, 256, 264, 384, 512, 1024, 4096, 3, -8])
SIZE = st.integers(1, 5)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([DENSE, PACKED]), st.tuples(SIZE, SIZE, SIZE), st.tuples(STRIDE, STRIDE, STRIDE))
def test_strides_of_out_against_brute_force(base, sizes, strides):
    """No layout whose rows are apart is refused."""
    batch, rows, heads = sizes
    params = replace(
        base,
        batch_size=batch,
        num_heads=heads,
        num_heads_k=1,
        out_batch_stride=strides[0],
        out_row_stride=strides[1],
        out_head_stride=strides[2],
        **{"seqlen_q" if base is DENSE else "total_q": rows},
    )
    sizes = (batch if base is DENSE else 1, rows, heads)
    contiguous = (rows * heads * 128, heads * 128, 128)
    real = [default if stride is None else stride for stride, default in zip(strides, contiguous, strict=True)]
    fit = all(size == 1 or stride >= 128 and stride % 8 == 0 for stride, size in zip(real, sizes, strict=True))
    starts = sorted(sum(i * stride for i, stride in zip(index, real, strict=True)) for index in np.ndindex(*sizes))
    apart = fit and all(b - a >= 128 for a, b in zip(starts, starts[1:], strict=False))
    assert first_problem(params) == (problems(params) or [None])[0]
    if apart:
        assert problems(params) == []
    if not fit:
        assert problems(params)
