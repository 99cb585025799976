"""The rules of softcap, sinks, ALiBi, masks, chunks and dropout: what is accepted, what is refused and in which words,
and what reaches the shape of a call."""

from dataclasses import replace

import numpy as np
import pytest
from cache_calls import PAGED
from calls import GOOD, GOOD_FP8
from cuda.bindings.driver import CUdeviceptr
from rule_calls import A, BF16, DENSE, DENSE_FP8, FP8, FP16, FP32, ONE_ROW, PACKED, Handle, first_problem

from fa3_cute import Status, forward
from fa3_cute.contract.limits import LARGEST_SCALE, MAX_MASKED_ROWS, MAX_SIZE, SMALLEST_SCALE, TMA_STRIDE_BYTES
from fa3_cute.contract.plain import plain
from fa3_cute.contract.rules import contract_problems
from fa3_cute.planning.operations import ALIBI_SCALES, checked, problems
from fa3_cute.planning.problem import ProblemShape

DROPS = {"p_dropout": 0.5, "rng_state": A}
MASK_STRIDES = ("attn_mask_batch_stride", "attn_mask_head_stride", "attn_mask_row_stride")
LONG = {"seqlen_q": 2**18, "seqlen_k": 2**18}
# (the good call that is changed, the changes): no problem but for want of a kernel.
ACCEPTED = [
    *((DENSE, {"softcap": cap}) for cap in (0, 0.0, None, 30, SMALLEST_SCALE, LARGEST_SCALE, np.float32(50))),
    *((call, {"s_aux": A + 4}) for call in (DENSE, DENSE_FP8, PACKED, PAGED, ONE_ROW)),
    *((DENSE, {"s_aux": A + 2, "s_aux_dtype": dtype}) for dtype in (FP16, BF16, 0, np.int64(1))),
    (DENSE, {"s_aux": A + 4, "s_aux_dtype": FP32}),
    (DENSE, {"s_aux": Handle(), "alibi_slopes": CUdeviceptr(A), "attn_mask": Handle()}),
    (DENSE, {"s_aux": CUdeviceptr(0), "alibi_slopes": 0, "attn_mask": None, "rng_state": 0}),
    *((DENSE, {"alibi_slopes": A + 4, "alibi_batch_stride": stride}) for stride in (0, 16, 7, MAX_SIZE, None)),
    (ONE_ROW, {"alibi_slopes": A, "alibi_batch_stride": -1}),
    (DENSE, {"attn_mask": A + 1}),
    *((DENSE, {"attn_mask": A + 2, "attn_mask_dtype": dtype}) for dtype in (FP16, BF16)),
    (DENSE, {"attn_mask": A + 4, "attn_mask_dtype": FP32}),
    (DENSE, {"attn_mask": A, "seqused_k": A, "seqused_q": A}),
    (DENSE, {"attn_mask": A, "is_causal": True} | dict.fromkeys(MASK_STRIDES, 0)),
    (DENSE, {"attn_mask": A} | dict.fromkeys(MASK_STRIDES, TMA_STRIDE_BYTES - 1)),
    (ONE_ROW, {"attn_mask": A} | dict.fromkeys(MASK_STRIDES, -3)),
    (PAGED, {"attn_mask": A}),
    (DENSE, LONG),  # 2^40 scores of a sequence
    (DENSE, LONG | {"attn_mask": A, "attn_mask_batch_stride": 0}),
    (DENSE, LONG | {"attn_mask": A, "batch_size": 1}),
    *((DENSE, {"alibi_slopes": A, "softmax_scale": scale}) for scale in (None, *ALIBI_SCALES)),
    *((call, {"attention_chunk": n}) for call in (DENSE, PACKED, PAGED) for n in (0, 1, 8192, 2**31 - 1)),
    (DENSE, {"attention_chunk": np.int32(64), "is_causal": True}),
    (DENSE, {"attention_chunk": 64, "window_size_left": 7}),
    *((call, DROPS) for call in (DENSE, DENSE_FP8, PACKED, PAGED)),
    *((DENSE, DROPS | {"p_dropout": p}) for p in (1e-6, 0.999999, np.float32(0.1))),
    *((DENSE, {"p_dropout": p}) for p in (0, 0.0, None)),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    params = replace(base, **changes)
    assert contract_problems(params) == []
    assert problems(params) == [] and first_problem(params) is None


# status, the good call, what is changed, the words that its one sentence must have.
REFUSED = [
    *(
        (-9, DENSE, {"s_aux": A, "s_aux_dtype": value}, (f"s_aux_dtype={text}", "None (FP32), FP16, BF16 or FP32"))
        for value, text in ((FP8, "DataType.FP8_E4M3"), (7, "7"), ("fp32", "'fp32'"), (True, "True"))
    ),
    (-9, DENSE, {"s_aux": A + 2}, ("s_aux=0x", "aligned to 4 bytes")),
    (-9, DENSE, {"s_aux": A + 1, "s_aux_dtype": BF16}, ("s_aux=0x", "aligned to 2 bytes")),
    *((-9, DENSE, {"s_aux": value}, ("s_aux=", "__int__")) for value in ([0.0], np.zeros(4), "x", 1.5)),
    (-9, DENSE, {"alibi_slopes": A + 2}, ("alibi_slopes=0x", "aligned to 4 bytes")),
    *(
        (-7, DENSE, {"alibi_slopes": A, "alibi_batch_stride": value}, (f"alibi_batch_stride={value!r}", "from 0 to"))
        for value in (-1, MAX_SIZE + 1, 1.5, True)
    ),
    (-9, DENSE, {"attn_mask": A + 1, "attn_mask_dtype": FP16}, ("attn_mask=0x", "aligned to 2 bytes")),
    (-9, DENSE, {"attn_mask": A + 2, "attn_mask_dtype": FP32}, ("attn_mask=0x", "aligned to 4 bytes")),
    *((-9, DENSE, {"attn_mask": value}, ("attn_mask=", "device address")) for value in (-1, 2**64, "x", True)),
    *(
        (-9, DENSE, {"attn_mask": A, "attn_mask_dtype": value}, (f"attn_mask_dtype={text}", "a byte, of which 0 hides"))
        for value, text in ((FP8, "DataType.FP8_E4M3"), (9, "9"), ("bool", "'bool'"))
    ),
    *(
        (-7, DENSE, {"attn_mask": A, name: value}, (f"{name}={value!r}", "None (contiguous) or an int from 0"))
        for name in MASK_STRIDES
        for value in (-1, TMA_STRIDE_BYTES, 0.5, "0", False)
    ),
    (
        -7,
        DENSE,
        LONG | {"attn_mask": A},
        (f"attn_mask_batch_stride=None (contiguous: {2**40}): must be an int from 0", f"to below {2**40}"),
    ),
    (-7, DENSE, LONG | {"attn_mask": A, "seqlen_k": 2**22, "attn_mask_batch_stride": 0}, ("attn_mask_head_stride=",)),
    (-16, PACKED, {"attn_mask": A}, (f"attn_mask={A}", "None or 0 with cu_seqlens_q")),
    *(
        (-9, call, {"attention_chunk": value}, (f"attention_chunk={value!r}", "an int from 0 (off)"))
        for call in (DENSE, PACKED)
        for value in (-1, 2**31, 1.5, None, True, "8")
    ),
    (
        -7,
        DENSE,
        {"attention_chunk": 64, "seqlen_k": MAX_MASKED_ROWS}
        | dict.fromkeys(("k_row_stride", "v_row_stride", "k_batch_stride", "v_batch_stride"), 0),
        (f"seqlen_k={MAX_MASKED_ROWS}", "attention_chunk"),
    ),
    *(
        (-9, DENSE, {"p_dropout": value, "rng_state": A}, (f"p_dropout={value!r}", "from 0 (off) to below 1"))
        for value in (1.0, -0.1, 2, float("nan"), float("inf"), "0.1", True)
    ),
    (-9, DENSE, {"p_dropout": 0.1}, ("rng_state=None", "a device address with p_dropout=0.1")),
    (-9, DENSE, {"rng_state": A}, (f"rng_state={A}", "None or 0 with p_dropout=0")),
    (-9, DENSE, DROPS | {"rng_state": A + 4}, ("rng_state=0x", "aligned to 8 bytes")),
    (-9, DENSE, DROPS | {"rng_state": np.zeros(2, np.uint64)}, ("rng_state=", "__int__")),
]


@pytest.mark.parametrize("status, base, changes, words", REFUSED)
def test_refused(status, base, changes, words):
    params = replace(base, **changes)
    assert first_problem(base) is None
    found = contract_problems(params)
    assert [problem.status for problem in found] == [status], found
    assert all(word in found[0].detail for word in words), found[0].detail
    assert first_problem(params) == found[0] == problems(params)[0]


@pytest.mark.parametrize("base", [DENSE, DENSE_FP8, PACKED, ONE_ROW])
@pytest.mark.parametrize("scale", [SMALLEST_SCALE, ALIBI_SCALES[0] / 2, ALIBI_SCALES[1] * 2, LARGEST_SCALE])
def test_slopes_ask_for_a_scale_that_they_can_be_divided_by(base, scale):
    params = replace(base, softmax_scale=scale)
    assert problems(params) == []
    params = replace(params, alibi_slopes=A)
    (found,) = problems(params)
    assert found == checked(plain(params)) and found.status == -9
    assert f"softmax_scale={scale!r}: must be a number from {2**-64:.8g} to" in found.detail
    assert found.detail.endswith("with alibi_slopes")


# ---- the shape -------------------------------------------------------------------------------------------------------


def shape_of(base=DENSE, **changes) -> ProblemShape:
    params = replace(base, **changes)
    assert contract_problems(params) == []
    return ProblemShape.of(plain(params))


def test_what_is_off_is_in_no_shape():
    """However it is written, and whatever belongs to it."""
    shape = shape_of()
    assert (shape.number("softcap"), shape.number("p_dropout"), shape.attention_chunk) == (0, 0, 0)
    assert (shape.optionals, shape.has_alibi, shape.attn_mask) == ((), False, "")
    assert shape == shape_of(softcap=None, p_dropout=0, s_aux=0, alibi_slopes=CUdeviceptr(0), attn_mask=0)
    assert shape == shape_of(alibi_batch_stride=None, attn_mask_row_stride=0)
    assert shape.sizes == shape_of(s_aux_dtype=BF16).sizes


def test_values_reach_the_shape():
    shape = shape_of(softcap=30, attention_chunk=64, **DROPS)
    assert shape.scales[1:] == (30, 0.5) and shape.sizes[-1] == shape.attention_chunk == 64
    shape = shape_of(s_aux=A, alibi_slopes=A, attn_mask=A)
    assert shape.optionals == ("s_aux", "alibi_slopes", "attn_mask") and shape.has_alibi
    assert shape_of(rng_state=A, p_dropout=0.5).optionals == ("rng_state",)


@pytest.mark.parametrize(
    "dtype, kind", [(None, "bool"), (FP16, "fp16"), (BF16, "bf16"), (FP32, "fp32"), (np.int8(3), "fp32")]
)
def test_the_kind_of_a_mask(dtype, kind):
    assert shape_of(attn_mask=A, attn_mask_dtype=dtype).attn_mask == kind


@pytest.mark.parametrize("dtype, number", [(None, 3), (FP32, 3), (BF16, 1), (FP16, 0)])
def test_the_type_of_sinks_is_a_number(dtype, number):
    assert shape_of(s_aux=A, s_aux_dtype=dtype).sizes[-4] == number


@pytest.mark.parametrize("base", [DENSE, DENSE_FP8])
@pytest.mark.parametrize(
    "changes, strides",
    [
        ({"alibi_slopes": A, "alibi_batch_stride": 16}, (16, 0, 0, 0)),
        ({"attn_mask": A}, (0, 16 * 512 * 640, 512 * 640, 640)),
        ({"attn_mask": A, "attn_mask_head_stride": 0, "attn_mask_row_stride": 648}, (0, 16 * 512 * 640, 0, 648)),
        ({"alibi_slopes": A, "alibi_batch_stride": 16, "batch_size": 1}, (0, 0, 0, 0)),
        ({"attn_mask": A, "batch_size": 1, "seqlen_q": 1, "attn_mask_row_stride": 3}, (0, 0, 640, 0)),
    ],
)
def test_strides_are_the_last(base, changes, strides):
    """Contiguous where they are None; 0 along dimensions of size 1."""
    assert shape_of(base, **changes).strides[-4:] == strides


# ---- repeated calls --------------------------------------------------------------------------------------------------

ADDRESSES = {"s_aux": A + 4, "alibi_slopes": A + 8, "attn_mask": A + 16, "rng_state": A + 32}
ALL = {"p_dropout": 0.5, "attn_mask_dtype": FP32, "softcap": 2.0, **ADDRESSES}


@pytest.fixture
def repeated(launches):
    """A launcher that repeats calls."""
    launches.stub.call.can_repeat = True
    return launches


@pytest.mark.parametrize("base", [GOOD, GOOD_FP8], ids=["16 bit", "FP8"])
def test_pointers_that_few_calls_have_are_as_free_as_the_tensors(repeated, base):
    """They follow the descales; where one is given, all of them have a place."""
    base = replace(base, **ALL)
    assert forward(base, 7) is Status.OK
    scales = (A, 0, A + 4) if base.dtype is FP8 else ()
    first = A, A, A, A, 0, *scales
    assert repeated.calls[-1][:2] == ("launch", (*first, *ADDRESSES.values()))
    moved = {name: at + 64 for name, at in ADDRESSES.items()}
    assert forward(replace(base, **moved), 7) is Status.OK
    assert repeated.calls[-1] == ("repeat", (*first, *moved.values()), 7)


def test_one_of_them_alone(repeated):
    params = replace(GOOD, s_aux=A + 4)
    for name in ("launch", "repeat"):
        assert forward(params, 7) is Status.OK
        assert repeated.calls[-1][:2] == (name, (A, A, A, A, 0, A + 4, 0, 0, 0))


@pytest.mark.parametrize("name", ADDRESSES)
def test_what_comes_or_goes_is_another_call(repeated, name):
    """Presence belongs to the shape, though no choice says it."""
    changes = {name: ADDRESSES[name]} if name != "rng_state" else DROPS
    without, having = GOOD, replace(GOOD, **changes)
    for params in (without, having, without, having):
        assert forward(params, 7) is Status.OK
        assert repeated.calls[-1][0] == "launch"
        assert len(repeated.calls[-1][1]) == (9 if params is having else 5)


@pytest.mark.parametrize("name, wrong", [("s_aux", 2), ("alibi_slopes", 2), ("attn_mask", 2), ("rng_state", 4)])
def test_addresses_of_a_repeated_launch_are_checked(repeated, name, wrong):
    forward(replace(GOOD, **ALL), 7)
    for value in (ADDRESSES[name] + wrong, -8, 2**64, "x", np.zeros(2), True):
        assert forward(replace(replace(GOOD, **ALL), **{name: value}), 7) == -9
    assert len(repeated.calls) == 1


def test_pointer_objects_are_launched_anew(repeated):
    params = replace(GOOD, **ALL)
    forward(params, 7)
    assert forward(replace(params, s_aux=CUdeviceptr(A + 64)), 7) is Status.OK
    assert [call[0] for call in repeated.calls] == ["launch"] * 2 and A + 64 in repeated.calls[-1][1]
