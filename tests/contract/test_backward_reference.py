"""The gradients that define `backward`: finite differences of the forward reference, cases by hand, edges; the twin."""

import math

import numpy as np
import pytest

from fa3_cute.contract.backward_reference import Saved, backward_reference, backward_twin
from fa3_cute.contract.reference import attention_reference, round_to, to_bits

INF, NAN = math.inf, math.nan
STEP = 1e-5  # central differences are then right to about 1e-9
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left": {"window_size": (1, -1)},
    "right": {"window_size": (-1, 2)},
    "diagonal": {"window_size": (0, 0)},
}
# (seqlen_q, seqlen_k): as many, more keys, more queries: rows without keys where a mask is causal; one of each.
LENGTHS = ((4, 4), (3, 7), (7, 3), (1, 5), (5, 1))
# Lengths on the device: sequences of no queries, of no keys, of neither, in each position; rows that none has.
PACKED = {
    "packed": {"cu_seqlens_q": [0, 3, 3, 5, 5], "cu_seqlens_k": [0, 2, 4, 4, 4]},
    "first empty": {"cu_seqlens_q": [1, 1, 4], "cu_seqlens_k": [2, 2, 5]},
    "used": {"cu_seqlens_q": [0, 4, 7], "cu_seqlens_k": [0, 3, 8], "seqused_q": [2, 3], "seqused_k": [3, 0]},
}
DENSE_USED = {"seqused_q": [3, 0, 4], "seqused_k": [4, 2, 0]}


def problem(n_q, n_k, heads, batch=(2,), head_dim=3):
    """q, k, v, dout and dlse, randn."""
    rng = np.random.default_rng(n_q + 10 * n_k + 100 * heads[0])
    q_shape, k_shape = (*batch, n_q, heads[0], head_dim), (*batch, n_k, heads[1], head_dim)
    q, k, v, dout = (rng.standard_normal(shape) for shape in (q_shape, k_shape, k_shape, q_shape))
    return q, k, v, dout, rng.standard_normal((*batch, heads[0], n_q))


def objective(q, k, v, dout, dlse, options) -> float:
    """A number whose gradients are those of dout and dlse."""
    out, lse = attention_reference(q, k, v, **options)
    return np.nansum(out * dout) + np.sum(np.where(np.isfinite(lse), lse, 0) * dlse)


def differences(index, tensors, dlse, options) -> np.ndarray:
    """The gradient of q, k or v by central differences."""
    found = np.empty(tensors[index].shape)
    for place in np.ndindex(found.shape):
        values = []
        for step in (STEP, -STEP):
            moved = [tensor.copy() for tensor in tensors]
            moved[index][place] += step
            values.append(objective(*moved, dlse, options))
        found[place] = (values[0] - values[1]) / (2 * STEP)
    return found


def assert_finite_differences(tensors, dlse, options):
    """Where a row has no gradient, moving it moves nothing."""
    gradients = backward_reference(*tensors, Saved(dlse=dlse), **options)
    for index, gradient in enumerate(gradients):
        expected = differences(index, tensors, dlse, options)
        np.testing.assert_allclose(np.nan_to_num(gradient), expected, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids="{0[0]}x{0[1]}".format)
def test_finite_differences(lengths, mask):
    heads = HEADS[sorted(HEADS)[sum(lengths) % 3]]
    *tensors, dlse = problem(*lengths, heads, batch=(1,))
    assert_finite_differences(tensors, dlse, MASKS[mask])


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_finite_differences_of_heads(heads):
    *tensors, dlse = problem(3, 4, heads)
    assert_finite_differences(tensors, dlse, {"causal": True, "softmax_scale": 0.3})


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED.keys())
def test_finite_differences_of_packed_sequences(lengths, mask):
    *tensors, dlse = problem(8, 9, (2, 1), batch=(), head_dim=2)
    assert_finite_differences(tensors, dlse, MASKS[mask] | lengths)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_finite_differences_of_used_lengths(mask):
    *tensors, dlse = problem(4, 5, (2, 1), batch=(3,), head_dim=2)
    assert_finite_differences(tensors, dlse, MASKS[mask] | DENSE_USED)


def test_by_hand():
    """Scores 0 and ln 3: P = 1/4, 3/4. v = 8 and 4, so O = 5; dO = 1: dP = v, D = 5, dS = 1/4 (8 - 5), 3/4 (4 - 5)."""
    q, k, v = (np.array(values).reshape(1, -1, 1, 1) for values in ([2.0], [0.0, math.log(3) / 2], [8.0, 4.0]))
    dq, dk, dv = backward_reference(q, k, v, np.ones_like(q))
    np.testing.assert_allclose(dv.ravel(), [0.25, 0.75], rtol=1e-14)
    np.testing.assert_allclose(dk.ravel(), [0.75 * 2, -0.75 * 2], rtol=1e-14)
    np.testing.assert_allclose(dq.item(), -0.75 * math.log(3) / 2, rtol=1e-14)
    # and of the LSE, ln 4: dS = P
    _, dk, dv = backward_reference(q, k, v, np.zeros_like(q), Saved(dlse=np.ones((1, 1, 1))))
    np.testing.assert_allclose((*dk.ravel(), *dv.ravel()), [0.25 * 2, 0.75 * 2, 0, 0], rtol=1e-14)


def twin(dtype):
    return lambda *tensors, **options: backward_twin(*tensors[:4], dtype, *tensors[4:], **options)


BACKWARDS = {"exact": backward_reference, "fp16": twin("fp16"), "bf16": twin("bf16")}


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_rows_without_keys_and_keys_without_rows(backward):
    """Exact zeros: causal rows above the corner, keys that lie left of all windows, sequences of one side alone."""
    q, k, v, dout, dlse = problem(5, 2, (2, 2))
    dlse[:, :, :3] = NAN  # of an LSE of -inf
    dq, dk, _ = backward(q, k, v, dout, Saved(dlse=dlse), causal=True)
    assert (dq[:, :3] == 0).all() and (dq[:, 4] != 0).all() and np.isfinite(dk).all()
    q, k, v, dout, _ = problem(2, 6, (2, 2))
    _, dk, dv = backward(q, k, v, dout, window_size=(1, 0))
    assert (dk[:, :3] == 0).all() and (dv[:, :3] == 0).all() and (dv[:, 3:] != 0).all()
    q, k, v, dout, _ = problem(3, 3, (1, 1), batch=())
    dq, dk, dv = backward(q, k, v, dout, cu_seqlens_q=[0, 3, 3], cu_seqlens_k=[0, 0, 3])
    assert not dq.any() and not dk.any() and not dv.any()


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_an_lse_of_plus_infinity_is_that_of_no_key_too(backward):
    q, k, v, dout, _ = problem(4, 2, (1, 1))
    _, lse = attention_reference(q, k, v, causal=True)
    expected = backward(q, k, v, dout, Saved(softmax_lse=lse), causal=True)
    lse = np.where(lse == -INF, INF, lse)
    for got, same in zip(backward(q, k, v, dout, Saved(softmax_lse=lse), causal=True), expected, strict=True):
        np.testing.assert_array_equal(got, same)


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
@pytest.mark.parametrize("poison", [NAN, INF])
def test_rows_that_no_sequence_uses_are_not_looked_at(backward, poison):
    options = {"cu_seqlens_q": [1, 4, 6], "cu_seqlens_k": [0, 4, 6], "seqused_q": [2, 2], "seqused_k": [3, 2]}
    used_q, used_k = [1, 2, 4, 5], [0, 1, 2, 4, 5]
    q, k, v, dout, dlse = problem(8, 7, (2, 1), batch=())
    expected = backward(q, k, v, dout, Saved(dlse=dlse), causal=True, **options)
    for array, used in ((q, used_q), (dout, used_q), (k, used_k), (v, used_k)):
        array[np.setdiff1d(np.arange(len(array)), used)] = poison
    dlse[:, np.setdiff1d(np.arange(8), used_q)] = poison
    got = backward(q, k, v, dout, Saved(dlse=dlse), causal=True, **options)
    for gradient, same, used in zip(got, expected, (used_q, used_k, used_k), strict=True):
        np.testing.assert_array_equal(gradient, same)
        assert np.isfinite(gradient[used]).all()
        assert np.isnan(np.delete(gradient, used, axis=0)).all()


def test_parts_of_the_keys_add_up():
    """With out and LSE of all keys, halves of the keys give their own dk and dv and parts of dq: ring attention."""
    q, k, v, dout, dlse = problem(5, 8, (4, 2))
    expected = backward_reference(q, k, v, dout, Saved(dlse=dlse))
    saved = Saved(*attention_reference(q, k, v), dlse)
    halves = [backward_reference(q, k[:, part], v[:, part], dout, saved) for part in (slice(4), slice(4, None))]
    np.testing.assert_allclose(halves[0].dq + halves[1].dq, expected.dq, atol=1e-14)
    for name in ("dk", "dv"):
        together = np.concatenate([getattr(half, name) for half in halves], axis=1)
        np.testing.assert_allclose(together, getattr(expected, name), atol=1e-14)


def test_chunks_of_rows_add_up(monkeypatch):
    """Rows are computed some at a time: how many changes nothing but rounding."""
    tensors = problem(9, 6, (2, 1))[:4]
    options = {"window_size": (3, 1)}
    whole = backward_reference(*tensors, **options)
    monkeypatch.setattr("fa3_cute.contract.backward_reference.SCORES_PER_CHUNK", 12)
    for got, expected in zip(backward_reference(*tensors, **options), whole, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-14)


def test_the_gradients_of_constant_values_are_those_of_v_alone():
    """v the same for all keys: O does not depend on the scores, dP = D, and dQ = dK = 0."""
    q, k, v, dout, _ = problem(4, 5, (2, 1))
    dq, dk, dv = backward_reference(q, k, np.ones_like(v), dout)
    np.testing.assert_allclose(dq, 0, atol=1e-15)
    np.testing.assert_allclose(dk, 0, atol=1e-15)
    np.testing.assert_allclose(dv.sum(axis=1), dout.reshape(2, 4, 2, 3).sum(axis=(1, 2))[:, None], atol=1e-13)


# ---- the twin --------------------------------------------------------------------------------------------------------


def relative_rmse(got, expected) -> list[float]:
    return [math.sqrt(np.nanmean((a - b) ** 2) / np.nanmean(b**2)) for a, b in zip(got, expected, strict=True)]


# What rounding P, dS, O and the results alone makes of randn inputs that the format holds exactly.
@pytest.mark.parametrize("dtype, least, most", [("bf16", 0.0015, 0.003), ("fp16", 0.0002, 0.0004)])
@pytest.mark.parametrize("causal", [False, True])
def test_how_far_the_twin_is_from_exact(dtype, least, most, causal):
    tensors = [round_to(x, dtype) for x in problem(256, 320, (2, 1), batch=(1,), head_dim=64)[:4]]
    exact = backward_reference(*tensors, causal=causal)
    for error in relative_rmse(backward_twin(*tensors, dtype, causal=causal), exact):
        assert least < error < most


def test_the_twin_rounds_where_a_kernel_does():
    """One row, keys of scores 0 and ln 3, so that P is 1/4 and 3/4 but for FP32, and every product is known."""
    q, k = np.array([[1.0]]), np.array([[0.0], [math.log(3)]])
    v, dout = np.array([[3.0], [1.0]]), np.array([[1.0]])
    q, k, v, dout = (array.reshape(1, -1, 1, 1) for array in (q, k, v, dout))
    key = float(round_to(k, "bf16")[0, 1, 0, 0])  # 1.1015625, not ln 3
    p = np.exp([0.0, key]) / np.exp([0.0, key]).sum()
    out = float(round_to(p @ v.ravel(), "bf16"))
    ds = p * (v.ravel() - out)
    dq, dk, dv = backward_twin(q, k, v, dout, "bf16")
    np.testing.assert_array_equal(dv.ravel(), round_to(p, "bf16"))
    np.testing.assert_array_equal(dk.ravel(), round_to(ds, "bf16"))
    np.testing.assert_array_equal(dq.item(), round_to(round_to(ds, "bf16")[1] * key, "bf16"))
    assert abs(out - p @ v.ravel()) > 1e-4  # D is from the rounded O, which shows in dS
    in_fp32 = backward_twin(q, k, v, dout, "bf16", grad_dtype="fp32")
    np.testing.assert_allclose(in_fp32.dq.item(), round_to(ds, "bf16")[1] * key, rtol=1e-7)
    np.testing.assert_array_equal(in_fp32.dv.ravel(), round_to(p, "bf16"))  # the operand, not P
    assert in_fp32.dq.item() != dq.item()


def test_the_twin_takes_what_buffers_hold():
    tensors = [round_to(x, "bf16") for x in problem(3, 4, (2, 1))[:4]]
    expected = backward_twin(*tensors, "bf16")
    for got, same in zip(backward_twin(*(to_bits(x, "bf16") for x in tensors), "bf16"), expected, strict=True):
        np.testing.assert_array_equal(got, same)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dout": np.ones((2, 3, 2, 2))}, "dout.shape=(2, 3, 2, 2): must be that of out, (2, 3, 2, 3)"),
        ({"saved": Saved(dlse=np.ones((2, 3, 2)))}, "dlse.shape=(2, 3, 2): must be (2, 2, 3)"),
        ({"saved": Saved(out=np.ones(2))}, "out.shape=(2,): must be (2, 3, 2, 3)"),
        ({"saved": Saved(dv=np.ones((2, 4, 2, 3)))}, "dv.shape=(2, 4, 2, 3): must be (2, 4, 1, 3)"),
        ({"score_mod": lambda score, *place: score}, "score_mod: has no gradient here; those that have: alibi_slopes"),
        ({"s_aux": np.ones(3)}, "s_aux.shape=(3,): must broadcast to [2]"),
        ({"p_dropout": 0.5}, "p_dropout, rng_state: come together"),
        ({"causal": True, "window_size": (1, 1)}, "together with causal"),
        ({"seqused_k": [5, 1]}, "seqused_k [5, 1]: must be"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    q, k, v, dout, _ = problem(3, 4, (2, 1))
    arguments = {"dout": dout} | changes
    for backward, dtype in ((backward_reference, {}), (backward_twin, {"dtype": "fp16"})):
        with pytest.raises(ValueError) as error:
            backward(q, k, v, **arguments, **dtype)
        assert words in str(error.value)


def test_the_twin_is_of_16_bit_types():
    with pytest.raises(ValueError, match="dtype 'fp8_e4m3': must be 'fp16' or 'bf16'"):
        backward_twin(*problem(1, 1, (1, 1))[:4], "fp8_e4m3")
