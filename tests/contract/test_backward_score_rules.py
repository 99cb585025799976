"""What `backward` says of the gradients of sinks and of an attn_mask that is added, and of sums that go on."""

from dataclasses import replace

import pytest
from backward_calls import BIAS, DENSE, LENGTHS, PACKED, POINTERS, SCORES, SINKS, A, serve_all
from rule_calls import BF16, FP16, FP32, Array, every

from fa3_cute.contract.backward_rules import contract_problems

D = POINTERS["dq"]


@pytest.fixture
def served(monkeypatch):
    serve_all(monkeypatch)


def test_gradients_of_scores_are_served_with_what_they_are_of():
    for changes in (SINKS, BIAS, SCORES):
        assert contract_problems(replace(DENSE, **changes)) == []


@pytest.mark.parametrize("dim", ["batch", "head", "row"])
def test_a_d_bias_that_is_a_sum_has_no_order(dim):
    """Along a stride of 0, where there is more than one to add up."""
    of_one = {"batch": {"batch_size": 1}, "head": {"num_heads": 1, "num_heads_k": 1}, "row": {"seqlen_q": 1}}[dim]
    call = replace(DENSE, **BIAS, **{f"attn_mask_{dim}_stride": 0}, deterministic=True)
    (found,) = contract_problems(call)
    assert found.status == -16 and "deterministic=True: must be False with" in found.detail
    assert f"attn_mask_{dim}_stride=0" in found.detail
    for changes in ({"deterministic": False}, {"d_bias": None}, of_one):
        assert contract_problems(replace(call, **changes)) == []


@pytest.mark.parametrize(
    "changes",
    [
        SINKS,
        SINKS | {"s_aux_dtype": FP16, "s_aux": SINKS["s_aux"] + 2},
        {"s_aux": LENGTHS},
        BIAS,
        {"attn_mask": LENGTHS + 1},  # bytes
        *(BIAS | {"attn_mask_dtype": dtype, "d_bias": BIAS["d_bias"] + 4} for dtype in (FP16, BF16, FP32)),
        BIAS | every("attn_mask_batch_stride attn_mask_head_stride attn_mask_row_stride", 0),
        BIAS | every("attn_mask_batch_stride attn_mask_head_stride", 0) | {"attn_mask_row_stride": 648},
        BIAS | {"attn_mask_batch_stride": 0, "attn_mask_head_stride": 640, "attn_mask_row_stride": 16 * 640},
        BIAS | every("batch_size seqlen_q", 1) | every("attn_mask_batch_stride attn_mask_row_stride", 7),
        SCORES
        | {"softcap": 30.0, "alibi_slopes": LENGTHS, "attention_chunk": 128, "p_dropout": 0.1, "rng_state": LENGTHS},
        {"accumulate_dkv": True},
        {"accumulate_dkv": 1, "grad_dtype": FP32, "dk": None},
        # side by side
        SINKS | {"d_s_aux": SINKS["s_aux"] + 16 * 4},
        SINKS | {"d_s_aux": POINTERS["softmax_lse"] - 16 * 4},
        BIAS | {"d_bias": BIAS["attn_mask"] + 2 * 16 * 512 * 640 * 2},
        BIAS | every("attn_mask_batch_stride attn_mask_head_stride", 0) | {"d_bias": BIAS["attn_mask"] + 512 * 640 * 2},
    ],
)
def test_gradients_of_scores(served, changes):
    assert contract_problems(replace(DENSE, **changes)) == []


PER_BATCH, PER_HEAD = 16 * 512 * 640, 512 * 640


@pytest.mark.parametrize(
    "status, changes, words",
    [
        (-7, BIAS | {"attn_mask_row_stride": 639}, ("attn_mask_row_stride=639", "0 or at least 640 (seqlen_k)")),
        (-7, BIAS | {"attn_mask_row_stride": 1}, ("attn_mask_row_stride=1", "0 or at least 640 (seqlen_k)")),
        (
            -7,
            BIAS | {"attn_mask_head_stride": PER_HEAD - 1},
            ("attn_mask_head_stride=", "keep the rows of d_bias apart"),
        ),
        (-7, BIAS | {"attn_mask_batch_stride": 640 * 600}, ("attn_mask_batch_stride=384000", "apart")),
        (-7, BIAS | {"attn_mask_row_stride": -640}, ("attn_mask_row_stride=-640", "from 0")),
        (-9, {"d_s_aux": LENGTHS}, ("d_s_aux=", "None or 0 without s_aux")),
        (-9, {"d_bias": LENGTHS}, ("d_bias=", "attn_mask_dtype is FP16, BF16 or FP32")),
        (-9, {"d_bias": LENGTHS, "attn_mask_dtype": BF16}, ("d_bias=", "attn_mask_dtype is FP16, BF16 or FP32")),
        (-9, BIAS | {"attn_mask_dtype": None}, ("d_bias=", "attn_mask that is added")),
        *((-9, SCORES | {name: LENGTHS + 2}, (f"{name}=0x", "4 bytes")) for name in SCORES if name.startswith("d_")),
        *((-9, SCORES | {name: Array()}, (f"{name}=", "__int__")) for name in SCORES if name.startswith("d_")),
        (-9, {"accumulate_dkv": 2}, ("accumulate_dkv=2", "True or False")),
        (-9, SINKS | {"d_s_aux": SINKS["s_aux"] + 15 * 4}, ("d_s_aux=", "must not overlap s_aux=")),
        (-9, SINKS | {"d_s_aux": D}, ("dq=", "must not overlap d_s_aux=")),
        (-9, SINKS | {"dk": SINKS["s_aux"]}, ("dk=", "must not overlap s_aux=")),
        (-9, SCORES | {"d_s_aux": BIAS["d_bias"] + 4 * (2 * PER_BATCH - 1)}, ("d_s_aux=", "must not overlap d_bias=")),
        (-9, BIAS | {"d_bias": BIAS["attn_mask"]}, ("d_bias=", "must not overlap attn_mask=")),
        (-9, BIAS | {"d_bias": BIAS["attn_mask"] + 4 * PER_BATCH - 4}, ("d_bias=", "must not overlap attn_mask=")),
        (-9, BIAS | {"d_bias": A + 2 * 512 * 16 * 128 * 2 - 4}, ("d_bias=", f"must not overlap q={A:#x}")),
        (-9, {"alibi_slopes": D + 256}, ("dq=", "must not overlap alibi_slopes=")),
        (
            -9,
            {"alibi_slopes": D - 4 * 100, "alibi_batch_stride": 90},
            ("dq=", f"must not overlap alibi_slopes={D - 400:#x}"),
        ),
        (-9, {"p_dropout": 0.1, "rng_state": D - 8}, ("dq=", "must not overlap rng_state=")),
    ],
)
def test_wrong_gradients_of_scores(served, status, changes, words):
    found = contract_problems(replace(DENSE, **changes))
    assert [problem.status for problem in found] == [status], found
    assert all(word in found[0].detail for word in words), found


def test_a_packed_bias_is_refused_as_by_forward(served):
    found = contract_problems(replace(PACKED, **BIAS))
    assert [problem.status for problem in found] == [-16] and found[0].detail.startswith("attn_mask=")
