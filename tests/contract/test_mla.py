"""Attention of 512 columns of V, MLA decode, q_v and heads of 512: which calls are served, in which words the others
are refused, and what they mean."""

from dataclasses import replace

import numpy as np
import pytest
from backward_calls import DENSE as BACKWARD_DENSE
from rule_calls import DENSE, FP8, PACKED, A, first_problem

from fa3_cute import DataType, attention, get_error_string
from fa3_cute.contract.backward_rules import contract_problems as backward_problems
from fa3_cute.contract.mla import OFF
from fa3_cute.contract.plain import plain
from fa3_cute.contract.reference import attention_reference
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import ProblemShape

DIMS = {"head_dim": 576, "head_dim_v": 512, "num_heads": 128, "num_heads_k": 1}
MLA = replace(DENSE, **DIMS)
PAGED = replace(MLA, page_table=A, page_size=64, num_pages=99, seqused_k=A)
PACKED_MLA = replace(PACKED, **DIMS, max_seqlen_q=4)
WITH = "with head_dim=576"
LARGE = replace(DENSE, head_dim=512)
WITH_QV = replace(DENSE, head_dim=64, head_dim_v=512, q_v=A)
# The calls of this kernel, and how sentences name them.
NAMED = ((MLA, WITH), (LARGE, "with head_dim=512"), (WITH_QV, "with q_v"))
IN_PAGES = {"page_table": A, "page_size": 64, "num_pages": 99, "seqused_k": A}


@pytest.mark.parametrize(
    "call",
    [
        MLA,
        PAGED,
        PACKED_MLA,
        replace(MLA, is_causal=True, num_splits=16, s_aux=A),
        replace(MLA, window_size_right=0, softmax_lse=A, seqused_k=A),
        replace(MLA, num_heads=24, num_heads_k=2, pack_gqa=False),
        *(replace(PAGED, page_size=size) for size in (8, 16, 128)),
        replace(MLA, k_row_stride=640, v_row_stride=640),
        replace(MLA, v_row_stride=576, v_batch_stride=640 * 576),
        replace(MLA, v_head_stride=64),  # of one head it means nothing
    ],
)
def test_served(call):
    assert problems(call) == []
    shape = ProblemShape.of(plain(call))
    assert shape.has_wide_values and not shape.is_padded and shape.tile_dims == (576, 512)


@pytest.mark.parametrize(
    "call",
    [
        *(replace(LARGE, head_dim_v=columns) for columns in (0, 512)),
        *(
            replace(base, **changes)
            for base in (LARGE, WITH_QV)
            for changes in (
                {"is_causal": True, "num_splits": 16, "s_aux": A, "softmax_lse": A},
                {"pack_gqa": False, "seqused_k": A, "window_size_right": 0},
                IN_PAGES | {"page_size": 8, "dtype": DataType.BF16, "out_dtype": DataType.FP32},
                {"v": A + 1024, "v_row_stride": 640 * 16, "q_row_stride": 16 * 1024},
            )
        ),
        replace(PACKED, head_dim=512, max_seqlen_q=4),
        replace(PACKED, head_dim=64, head_dim_v=512, q_v=A),
        replace(WITH_QV, q_v_row_stride=16 * 576, q_v_batch_stride=512 * 16 * 576, q_v_head_stride=576),
    ],
)
def test_served_with_values_of_their_own(call):
    assert problems(call) == []
    shape = ProblemShape.of(plain(call))
    assert shape.has_wide_values and not shape.is_padded and shape.tile_dims == (call.head_dim, 512)


@pytest.mark.parametrize("dims", [(576, 0), (576, 576), (576, 256), (520, 512), (584, 512), (560, 512)])
def test_other_dims_are_refused(dims):
    found = first_problem(replace(MLA, head_dim=dims[0], head_dim_v=dims[1]))
    assert found.status == -2
    assert found.detail == f"head_dim={dims[0]}: must be a multiple of 8 from 8 to 256, 512, or 576 with head_dim_v=512"
    assert "576" in get_error_string(-2)


def test_512_columns_of_v_alone_are_refused():
    accepted = "must be 0 (head_dim) or a multiple of 8 from 8 to 256"
    assert problems(replace(MLA, head_dim=64)) == [(-2, f"head_dim_v=512: {accepted} without q_v")]
    wide = "or 512 with head_dim=512 or 576, or with head_dim=64 and q_v"
    assert problems(replace(MLA, head_dim=128)) == [(-2, f"head_dim_v=512: {accepted}; {wide}")]
    assert problems(replace(LARGE, head_dim_v=256)) == [(-2, "head_dim_v=256: must be 0 or 512 with head_dim=512")]


def test_q_v_of_other_dims_is_refused():
    for call in (DENSE, MLA, LARGE):
        (found,) = problems(replace(call, q_v=A))
        assert found == (-9, f"q_v={A}: must be None or 0 unless head_dim=64 and head_dim_v=512")
    (found,) = problems(replace(DENSE, q_v_row_stride=512))
    assert found == (-9, "q_v_row_stride=512: must be None without q_v")


@pytest.mark.parametrize(
    "changes, status, words",
    [
        ({"q_v": A + 8}, -9, f"q_v={A + 8:#x}: must be a device address aligned to 16 bytes"),
        ({"q_v": "x"}, -9, "q_v='x': must be an int device address"),
        ({"q_v_head_stride": 516}, -7, "q_v_head_stride=516: must be at least 0, below"),
        ({"q_v_row_stride": 1.5}, -7, "q_v_row_stride=1.5: must be None (contiguous) or an int"),
    ],
)
def test_bad_q_v(changes, status, words):
    (found,) = problems(replace(WITH_QV, **changes))
    assert found.status == status and found.detail.startswith(words)


@pytest.mark.parametrize("call, words", NAMED)
def test_fp8_is_refused(call, words):
    assert first_problem(replace(call, dtype=FP8)).status == -3
    found = first_problem(replace(call, kv_dtype=FP8))
    assert found.status == -3 and found.detail.endswith("with kv_dtype=FP8_E4M3 and 16-bit queries")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"v": A + 1024}, f"v={A + 1024}: must be k, the same address, {WITH}"),
        ({"v_row_stride": 512}, f"v_row_stride=512: must be that of k, 576, or None, the same, {WITH}"),
        ({"k_row_stride": 640, "v_row_stride": 576}, "v_row_stride=576: must be that of k, 640, or None, the same"),
        ({"v_batch_stride": 640 * 512}, f"v_batch_stride={640 * 512}: must be that of k, {640 * 576}, or None"),
        ({"softcap": 30.0}, f"softcap=30.0: must be 0 {WITH}"),
        ({"alibi_slopes": A}, f"alibi_slopes={A}: must be None or 0 {WITH}"),
        ({"attn_mask": A}, f"attn_mask={A}: must be None or 0 {WITH}"),
        ({"p_dropout": 0.5, "rng_state": A}, f"p_dropout=0.5: must be 0 {WITH}"),
        ({"attention_chunk": 64}, f"attention_chunk=64: must be 0 {WITH}"),
        ({"window_size_left": 128}, f"window_size_left=128: must be negative (unbounded) {WITH}"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(changes, words):
    (found,) = problems(replace(MLA, **changes))
    assert found.status == -16 and found.detail.startswith(words)


@pytest.mark.parametrize("call, words", NAMED)
def test_pages_of_other_sizes_are_refused(call, words):
    (found,) = problems(replace(call, **IN_PAGES | {"page_size": 20}))
    assert found == (-16, f"page_size=20: must be a multiple of 8 {words}")


@pytest.mark.parametrize("call, words", NAMED)
def test_new_keys_rotary_and_padding_are_refused(call, words):
    rotary = {"rotary_cos": A, "rotary_sin": A, "rotary_dim": 64}
    new = {"k_new": A, "v_new": A, "seqlen_knew": 1}
    for changes, name in ((new, "k_new"), (rotary, "rotary_cos"), ({"leftpad_k": A}, "leftpad_k")):
        found = problems(replace(call, **IN_PAGES, **changes))
        assert (-16, f"{name}={A}: must be None or 0 {words}") in found


@pytest.mark.parametrize("call, words", NAMED)
def test_features_and_windows_are_refused(call, words):
    for changes in ({"softcap": 30.0}, {"attention_chunk": 64}, {"window_size_left": 128}):
        (found,) = problems(replace(call, **changes))
        assert found.status == -16 and found.detail.endswith(words)


def test_what_is_off_is_a_field():
    assert set(OFF) <= {*MLA.__dataclass_fields__}


@pytest.mark.parametrize("call, words", NAMED)
@pytest.mark.parametrize("left", [2**30 - 1, 2**30, 2**31 - 1])
@pytest.mark.parametrize("right", [0, 2**30, 2**31 - 1])
def test_windows_of_2_to_the_30_are_unbounded(call, words, left, right):
    """As in every other call."""
    found = problems(replace(call, window_size_left=left, window_size_right=right))
    if left < 2**30:
        assert found == [(-16, f"window_size_left={left}: must be negative (unbounded) {words}")]
        return
    assert found == []
    shapes = [
        ProblemShape.of(plain(replace(call, window_size_left=wide, window_size_right=of_right)))
        for wide, of_right in ((left, right), (-1, right if right == 0 else -1))
    ]
    assert shapes[0] == shapes[1] and shapes[0].mask == ("causal" if right == 0 else "full")


def test_backward_is_refused():
    mla = replace(BACKWARD_DENSE, head_dim=576, head_dim_v=512, v=BACKWARD_DENSE.k, num_heads_k=1)
    for stated, call in (
        ("head_dim=576, head_dim_v=512", mla),
        ("head_dim=512", replace(BACKWARD_DENSE, head_dim=512)),
        ("head_dim_v=512", replace(BACKWARD_DENSE, head_dim=64, head_dim_v=512, q_v=A)),
    ):
        found = [problem for problem in backward_problems(call) if problem.detail.startswith("head_dim")]
        assert found == [(-16, f"{stated}: must be at most 256: backward has no kernel for it yet")]


def test_backward_names_q_v():
    found = backward_problems(replace(BACKWARD_DENSE, head_dim=64, head_dim_v=512, q_v=A))
    assert found[0] == (-16, f"q_v={A}: must be off: backward has no kernel for it yet")
    assert backward_problems(replace(BACKWARD_DENSE, q_v=A))[-1].detail.startswith(f"q_v={A}: must be off")


# ---- what they mean --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
Q, K = (RNG.standard_normal((2, rows, heads, 576)).astype(np.float32) for rows, heads in ((3, 4), (9, 1)))


def test_reference():
    """Of V as a view of K as of V by itself, and by hand."""
    out, lse = attention_reference(Q, K, K[..., :512])
    same, _ = attention_reference(Q, K, K[..., :512].copy())
    scores = np.einsum("bqhd,bkd->bhqk", Q.astype(np.float64), K[:, :, 0].astype(np.float64)) / 24
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert out.shape == (2, 3, 4, 512) and np.array_equal(out, same)
    assert np.allclose(out, np.einsum("bhqk,bkd->bqhd", weights, K[:, :, 0, :512]), atol=1e-6)
    assert np.allclose(lse, np.log(np.exp(scores).sum(-1)), atol=1e-5)


def test_reference_of_two_parts():
    """Of Q and K in two parts, as of the whole ones."""
    exact, lse = attention_reference(Q, K, K[..., :512], causal=True)
    parts = Q[..., 512:], K[..., 512:], K[..., :512]
    out, same = attention_reference(*parts, q_v=Q[..., :512], causal=True)
    assert np.allclose(out, exact, atol=1e-6) and np.allclose(same, lse, atol=1e-6)
    with pytest.raises(ValueError, match="q_v must be as q, with v's columns"):
        attention_reference(*parts, q_v=Q[..., :511])


def test_attention_on_the_host():
    out, lse = attention(Q, K, K[..., :512], causal=True, return_lse=True)
    exact, lse_of_it = attention_reference(Q, K, K[..., :512], causal=True)
    assert np.allclose(out, exact, atol=1e-6) and np.allclose(lse, lse_of_it, atol=1e-6)
