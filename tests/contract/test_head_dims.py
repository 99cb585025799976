"""head_dim and head_dim_v: what is served, what the strides of v and out are then, and what they mean."""

from dataclasses import replace

import numpy as np
import pytest
from backward_calls import DENSE as BACKWARD_DENSE
from rule_calls import DENSE, DENSE_FP8, PACKED, A

from fa3_cute import FlashAttentionError, attention, get_error_string
from fa3_cute.contract.backward_rules import contract_problems as backward_problems
from fa3_cute.contract.block_mask import block_sizes
from fa3_cute.contract.plain import plain
from fa3_cute.contract.reference import attention_reference, update_cache
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import ProblemShape

PAGED = replace(DENSE, page_table=A, page_size=16, num_pages=99, seqused_k=A)
SERVED, FP8_SERVED = range(8, 257, 8), range(16, 129, 16)
OF_V = "0 (head_dim) or a multiple of 8 from 8 to 256; or 512 with head_dim=512 or 576, or with head_dim=64 and q_v"
# What sentences say is accepted of head_dim and head_dim_v, over FP8 keys.
OF_FP8 = "a multiple of 16 from 16 to 256 with dtype=FP8_E4M3"
OF_FP8_CACHE = "with kv_dtype=FP8_E4M3 and 16-bit queries"


@pytest.mark.parametrize("base", [DENSE, PACKED, PAGED], ids=["dense", "packed", "paged"])
def test_multiples_of_8_are_served(base):
    for head_dim in SERVED:
        assert problems(replace(base, head_dim=head_dim)) == []
        assert problems(replace(base, head_dim=128, head_dim_v=head_dim)) == []


def test_multiples_of_16_are_served_in_fp8():
    for head_dim in FP8_SERVED:
        assert problems(replace(DENSE_FP8, head_dim=head_dim)) == []
        assert problems(replace(DENSE_FP8, head_dim=64, head_dim_v=head_dim)) == []


@pytest.mark.parametrize("value", [4, 84, 264, 512, -8, 64.0, "64", True])
def test_other_columns_of_v_are_refused(value):
    (found,) = problems(replace(DENSE, head_dim_v=value))
    assert found == (-2, f"head_dim_v={value!r}: must be {OF_V}")
    assert "multiples of 8 up to 256" in get_error_string(-2)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 72}, {"head_dim": 136}, {"head_dim_v": 24}, {"head_dim_v": 152}], ids=str
)
def test_other_dims_are_refused_in_fp8(changes):
    ((name, value),) = changes.items()
    (found,) = problems(replace(DENSE_FP8, **changes))
    or_0 = "0 (head_dim) or " if name == "head_dim_v" else ""
    assert found == (-3, f"{name}={value}: must be {or_0}{OF_FP8}")


@pytest.mark.parametrize(
    "dims, status, names",
    [
        ((576, 512), -3, ("head_dim", "head_dim_v")),
        ((512, 512), -3, ("head_dim", "head_dim_v")),
        ((512, 0), -3, ("head_dim",)),
        ((64, 512), -3, ("head_dim_v",)),
        ((512, 128), -2, ("head_dim",)),
        ((128, 512), -2, ("head_dim_v",)),
        ((576, 0), -2, ("head_dim",)),
        ((264, 264), -2, ("head_dim", "head_dim_v")),
    ],
    ids=str,
)
def test_sentences_of_fp8_name_what_is_wrong(dims, status, names):
    """Of dims that 16-bit calls have too, and of others: what is accepted is so in FP8."""
    call = dict(zip(("head_dim", "head_dim_v"), dims, strict=True))
    of_v = f"0 (head_dim) or {OF_FP8}"
    for more in ({}, {"q_v": A}) if dims == (64, 512) else ({},):
        found = problems(replace(DENSE_FP8, **call, **more))
        assert found == [
            (status, f"{name}={call[name]}: must be {OF_FP8 if name == 'head_dim' else of_v}") for name in names
        ]


@pytest.mark.parametrize(
    "dims, status, words",
    [
        ((576, 512), -3, {"head_dim": "64 or 128", "head_dim_v": "0 or head_dim"}),
        ((512, 512), -3, {"head_dim": "64 or 128"}),
        ((512, 0), -3, {"head_dim": "64 or 128"}),
        ((64, 512), -3, {"head_dim_v": "0 or head_dim=64"}),
        ((72, 0), -3, {"head_dim": "64 or 128"}),
        ((128, 512), -2, {"head_dim_v": "0 or head_dim=128"}),
        ((512, 128), -2, {"head_dim": "64 or 128"}),
    ],
    ids=str,
)
def test_sentences_of_an_fp8_cache_name_what_is_wrong(dims, status, words):
    call = dict(zip(("head_dim", "head_dim_v"), dims, strict=True))
    found = problems(replace(DENSE, kv_dtype=DENSE_FP8.dtype, **call))
    assert found == [
        (status, f"{name}={call[name]}: must be {accepted} {OF_FP8_CACHE}") for name, accepted in words.items()
    ]


@pytest.mark.parametrize("value", [None, 0, np.int64(0), 128, np.int32(128)], ids=repr)
def test_off_is_head_dim(value):
    shape = ProblemShape.of(plain(replace(DENSE, head_dim_v=value)))
    assert (shape.head_dim, shape.head_dim_v) == (128, 128) and not shape.is_padded


def test_default_strides_and_scale():
    """Of q and k by head_dim, of v and out by head_dim_v; the scale by head_dim, not by what kernels make of it."""
    call = replace(DENSE, head_dim=72, head_dim_v=40, batch_size=2, seqlen_q=5, seqlen_k=7, num_heads=4, num_heads_k=2)
    shape = ProblemShape.of(plain(call))
    assert shape.strides[:12] == (
        *(5 * 4 * 72, 4 * 72, 72),
        *(7 * 2 * 72, 2 * 72, 72),
        *(7 * 2 * 40, 2 * 40, 40),
        *(5 * 4 * 40, 4 * 40, 40),
    )
    assert shape.softmax_scale == pytest.approx(72**-0.5, rel=1e-12)


@pytest.mark.parametrize("head_dim, head_dim_v, field", [(192, 128, "head_dim_v"), (72, 0, "head_dim")])
def test_rows_of_out_lie_apart(head_dim, head_dim_v, field):
    """By its own columns: what is too little for q may do for out."""
    call, columns = replace(DENSE, head_dim=head_dim, head_dim_v=head_dim_v), head_dim_v or head_dim
    assert problems(replace(call, out_head_stride=columns, out_row_stride=columns * DENSE.num_heads)) == []
    (found,) = problems(replace(call, out_head_stride=columns - 8))
    assert found.status == -7 and f"must be at least {columns} ({field}: rows must not overlap)" in found.detail


def test_new_values_may_have_columns_of_their_own():
    call = replace(PAGED, k_new=A, v_new=A, seqlen_knew=1)
    for dims in ({"head_dim": 72}, {"head_dim_v": call.head_dim}, {"head_dim": 192, "head_dim_v": 128}):
        assert problems(replace(call, **dims)) == []


def test_backward_takes_what_forward_takes():
    for head_dim in SERVED:
        assert backward_problems(replace(BACKWARD_DENSE, head_dim=head_dim)) == []
        assert backward_problems(replace(BACKWARD_DENSE, head_dim_v=head_dim)) == []
    (found,) = backward_problems(replace(BACKWARD_DENSE, head_dim_v=84))
    assert found == (-2, f"head_dim_v=84: must be {OF_V}")


@pytest.mark.parametrize("tensor", ["dq", "dk", "dv"])
def test_rows_of_gradients_lie_apart(tensor):
    """By their own columns: rows of dv may be nearer to one another than those of dq and dk."""
    call = replace(BACKWARD_DENSE, head_dim=192, head_dim_v=128)
    heads = 16 if tensor == "dq" else 4
    of_128 = {f"{tensor}_head_stride": 128, f"{tensor}_row_stride": 128 * heads}
    found = backward_problems(replace(call, **of_128))
    assert [problem.status for problem in found] == [-7, -7][: 1 if tensor != "dv" else 0]
    (found,) = backward_problems(replace(call, **{f"{tensor}_head_stride": 120}))
    least = "128 (head_dim_v" if tensor == "dv" else "192 (head_dim"
    assert found.status == -7 and f"must be at least {least}: rows must not overlap)" in found.detail


def test_tensors_of_fewer_columns_end_sooner():
    """dv, of 64 columns, ends where dlse begins; with as many as dk it would lie over it."""
    call = replace(BACKWARD_DENSE, head_dim_v=64)
    elements = 2 * BACKWARD_DENSE.seqlen_k * 4 * 64
    behind = replace(call, dlse=call.dv + 2 * elements)
    assert backward_problems(behind) == []
    (found,) = backward_problems(replace(behind, head_dim_v=72))
    assert found.status == -9 and "must not overlap dlse" in found.detail


def test_block_sizes_are_those_of_the_tiles():
    assert block_sizes("bf16", 72) == block_sizes("bf16", 96) and block_sizes("fp16", 136) == block_sizes("fp16", 192)
    assert block_sizes("bf16", 64, 256) == block_sizes("bf16", 256)
    assert block_sizes("fp8_e4m3", 80) == block_sizes("fp8_e4m3", 96)
    for bad in (("bf16", 84), ("bf16", 264), ("fp8_e4m3", 72), ("bf16", 64, 4)):
        with pytest.raises(KeyError):
            block_sizes(*bad)


# ---- what they mean --------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(17)
Q, K, V = (RNG.standard_normal((2, rows, heads, 96)).astype(np.float32) for rows, heads in ((5, 4), (9, 2), (9, 2)))


def test_columns_of_v_are_columns_of_out():
    whole, lse = attention_reference(Q, K, V, causal=True)
    part, same = attention_reference(Q, K, V[..., :40], causal=True)
    assert part.shape == (2, 5, 4, 40) and np.array_equal(lse, same)
    assert np.allclose(part, whole[..., :40], rtol=1e-12)


def test_v_may_have_more_columns():
    whole, _ = attention_reference(Q, K, V)
    more, _ = attention_reference(Q[..., :64], K[..., :64], V, softmax_scale=96**-0.5)
    q, k = (np.where(np.arange(96) < 64, x, 0) for x in (Q, K))
    assert more.shape == whole.shape and np.allclose(more, attention_reference(q, k, V)[0], rtol=1e-12)


def test_new_values_have_their_columns():
    k, v = K.copy(), V[..., :40].copy()
    lengths = np.array([3, 4])
    _, used = update_cache(Q, k, v, seqused_k=lengths, k_new=K[:, :2] + 1, v_new=v[:, :2] + 1)
    assert used.tolist() == [5, 6] and np.array_equal(v[1, 4:6], V[1, :2, :, :40] + 1)
    with pytest.raises(ValueError, match="k_new, v_new: must be alike, with the columns of v"):
        update_cache(Q, k, v, seqused_k=lengths, k_new=K[:, :2], v_new=K[:, :2])


def test_attention_on_the_host():
    v = V[..., :40]
    out, lse = attention(Q, K, v, causal=True, return_lse=True)
    exact, lse_of_it = attention_reference(Q, K, v, causal=True)
    assert out.shape == (2, 5, 4, 40) and np.allclose(out, exact, atol=1e-6) and np.allclose(lse, lse_of_it, atol=1e-6)
    given = np.zeros((2, 5, 4, 40), np.float32)
    assert attention(Q, K, v, causal=True, out=given) is given and np.array_equal(given, out)


@pytest.mark.parametrize(
    "v, out, words",
    [
        (V[..., :40], np.zeros_like(Q), r"out is float32\[2, 5, 4, 96\]: must be float32\[2, 5, 4, 40\]"),
        (V[..., :0], None, "k and v alike but for their columns"),
        (V[:, :8, :, :40], None, "k and v alike but for their columns"),
        (V[..., :44], None, "head_dim_v=44: must be 0"),
    ],
    ids=["out", "no columns", "rows", "44"],
)
def test_attention_refuses(v, out, words):
    with pytest.raises(FlashAttentionError, match=words):
        attention(Q, K, v, out=out)
