"""MLA decode: which calls are served, in which words the others are refused, and what they mean."""

from dataclasses import replace

import numpy as np
import pytest
from backward_calls import DENSE as BACKWARD_DENSE
from rule_calls import DENSE, FP8, PACKED, A, first_problem

from fa3_cute import attention, get_error_string
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
    assert shape.is_mla and not shape.is_padded and shape.tile_dims == (576, 512)


@pytest.mark.parametrize("dims", [(576, 0), (576, 576), (576, 256), (512, 512), (584, 512), (560, 512)])
def test_other_dims_are_refused(dims):
    found = first_problem(replace(MLA, head_dim=dims[0], head_dim_v=dims[1]))
    assert found.status == -2
    assert found.detail == f"head_dim={dims[0]}: must be a multiple of 8 from 8 to 256, or 576 with head_dim_v=512"
    assert "576" in get_error_string(-2)


def test_512_columns_of_v_alone_are_refused():
    (found,) = problems(replace(MLA, head_dim=64))
    assert found == (-2, "head_dim_v=512: must be 0 (head_dim) or a multiple of 8 from 8 to 256")


def test_fp8_is_refused():
    assert first_problem(replace(MLA, dtype=FP8)).status == -3


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


def test_pages_of_other_sizes_are_refused():
    (found,) = problems(replace(PAGED, page_size=20))
    assert found == (-16, f"page_size=20: must be a multiple of 8 {WITH}")


def test_new_keys_and_rotary_are_refused():
    rotary = {"rotary_cos": A, "rotary_sin": A, "rotary_dim": 64}
    for changes, name in (({"k_new": A, "v_new": A, "seqlen_knew": 1}, "k_new"), (rotary, "rotary_cos")):
        found = problems(replace(PAGED, **changes))
        assert (-16, f"{name}={A}: must be None or 0 {WITH}") in found


def test_what_is_off_is_a_field():
    assert set(OFF) <= {*MLA.__dataclass_fields__}


def test_backward_is_refused():
    found = backward_problems(replace(BACKWARD_DENSE, head_dim=576, head_dim_v=512, v=BACKWARD_DENSE.k, num_heads_k=1))
    assert (-16, "head_dim=576: must be at most 256: backward has no kernel for it yet") in found


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


def test_attention_on_the_host():
    out, lse = attention(Q, K, K[..., :512], causal=True, return_lse=True)
    exact, lse_of_it = attention_reference(Q, K, K[..., :512], causal=True)
    assert np.allclose(out, exact, atol=1e-6) and np.allclose(lse, lse_of_it, atol=1e-6)
