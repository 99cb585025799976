"""Gradients with softcap, sinks, ALiBi, attn_mask, chunks and dropout: finite differences of the forward reference, by
hand, edges; where the twin rounds; gradients that are added to."""

import math
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from fa3_cute.contract.backward_reference import Saved, backward_reference, backward_twin
from fa3_cute.contract.dropout import effective_p
from fa3_cute.contract.philox import keep_mask
from fa3_cute.contract.reference import attention_reference, round_to, to_bits

INF, NAN = math.inf, math.nan
STEP = 1e-5  # central differences are then right to about 1e-9
N_Q, N_K, HEADS, HEADS_K, BATCH = 3, 5, 4, 2, 2
# The inputs of a call that have gradients, and the names of these.
GRADIENTS = {"q": "dq", "k": "dk", "v": "dv", "s_aux": "d_s_aux", "attn_mask": "d_bias"}
RNG = np.random.default_rng(16)
SINKS = np.array([0.5, -1.0, 2.0, 0.0])
SLOPES = RNG.uniform(0.1, 0.6, (BATCH, HEADS))


def bias(*shape, hidden=0.0):
    values = RNG.standard_normal(shape)
    values[RNG.random(shape) < hidden] = -INF
    return values


FEATURES = {
    "softcap": {"softcap": 0.7},
    "sinks": {"s_aux": SINKS},
    "sinks, some none": {"s_aux": np.array([-INF, 1.0, -INF, 3.0])},
    "alibi": {"alibi_slopes": SLOPES[0]},
    "alibi of sequences": {"alibi_slopes": SLOPES},
    "bias": {"attn_mask": bias(BATCH, HEADS, N_Q, N_K, hidden=0.3)},
    "bias of all sequences": {"attn_mask": bias(1, HEADS, N_Q, N_K)},
    "bias of all heads": {"attn_mask": bias(BATCH, 1, N_Q, N_K, hidden=0.3)},
    "bias of keys": {"attn_mask": bias(BATCH, 1, 1, N_K, hidden=0.2)},
    "bias of queries": {"attn_mask": bias(N_Q, 1)},
    "bias of two dimensions": {"attn_mask": bias(N_Q, N_K)},
    "boolean mask": {"attn_mask": RNG.random((BATCH, HEADS, N_Q, N_K)) < 0.6},
    "bytes": {"attn_mask": RNG.integers(0, 3, (BATCH, 1, N_Q, N_K), np.uint8)},
    "chunks": {"attention_chunk": 3},
    "mask_mod": {"mask_mod": lambda b, h, q, k, info: (b + h + q + 2 * k) % 3 != 0},
    "dropout": {"p_dropout": 0.4, "rng_state": (5, 6)},
}
FEATURES["all"] = {
    **{
        name: value
        for feature in ("softcap", "sinks", "alibi of sequences")
        for name, value in FEATURES[feature].items()
    },
    **FEATURES["bias of all heads"],
    **FEATURES["dropout"],
    "attention_chunk": 4,
}
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (2, 1)}}
PACKED = {
    "packed": {"cu_seqlens_q": [1, 4, 4, 7], "cu_seqlens_k": [0, 5, 7, 7]},
    "packed and used": {"cu_seqlens_q": [0, 4, 7], "cu_seqlens_k": [0, 3, 8], "seqused_q": [3, 3], "seqused_k": [3, 2]},
}


def problem(n_q=N_Q, n_k=N_K, batch=(BATCH,), head_dim=2):
    """q, k, v, dout and dlse, randn."""
    rng = np.random.default_rng(n_q + 10 * n_k)
    q_shape, k_shape = (*batch, n_q, HEADS, head_dim), (*batch, n_k, HEADS_K, head_dim)
    q, k, v, dout = (rng.standard_normal(shape) for shape in (q_shape, k_shape, k_shape, q_shape))
    return q, k, v, dout, rng.standard_normal((*batch, HEADS, n_q))


def objective(dout, dlse, q, k, v, **options) -> float:
    """A number whose gradients are those of dout and dlse."""
    out, lse = attention_reference(q, k, v, **options)
    return np.nansum(out * dout) + np.sum(np.where(np.isfinite(lse), lse, 0) * dlse)


def differences(name: str, function, call: dict) -> np.ndarray:
    """The gradient of a number in one input of the call by central differences; -inf moves to itself."""
    found = np.empty(call[name].shape)
    for place in np.ndindex(found.shape):
        values = []
        for step in (STEP, -STEP):
            moved = call[name].copy()
            moved[place] += step
            values.append(function(**call | {name: moved}))
        found[place] = (values[0] - values[1]) / (2 * STEP)
    return found


def assert_finite_differences(tensors, options):
    q, k, v, dout, dlse = tensors
    gradients = backward_reference(q, k, v, dout, Saved(dlse=dlse), **options)
    call = {"q": q, "k": k, "v": v} | options
    for name, of in GRADIENTS.items():
        gradient = getattr(gradients, of)
        if call.get(name) is None or call[name].dtype in (np.bool_, np.uint8):
            assert gradient is None, of
        else:
            assert gradient.shape == call[name].shape
            expected = differences(name, partial(objective, dout, dlse), call)
            np.testing.assert_allclose(np.nan_to_num(gradient), expected, atol=1e-8, rtol=1e-7, err_msg=of)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_finite_differences(feature, mask):
    """Some rows lose every key to a mask."""
    assert_finite_differences(problem(), MASKS[mask] | FEATURES[feature])


@pytest.mark.parametrize("feature", ["softcap", "sinks", "alibi", "chunks", "dropout"])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED.keys())
def test_finite_differences_of_packed_sequences(lengths, feature):
    assert_finite_differences(problem(8, 9, (), 2), MASKS["causal"] | FEATURES[feature] | lengths)


@pytest.mark.parametrize("feature", ["bias", "bias of all heads", "bias of keys", "sinks", "all"])
@pytest.mark.parametrize("mask", ["full", "window"])
def test_finite_differences_of_used_lengths(mask, feature):
    """Of scores that no sequence uses d_bias is 0."""
    used = {"seqused_q": [2, 3], "seqused_k": [5, 2]}
    assert_finite_differences(problem(), MASKS[mask] | FEATURES[feature] | used)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def one_head(*rows):
    """Numbers as a tensor [1, rows, 1, 1]."""
    return np.array(rows, np.float64)[None, :, None, None]


def test_softcap_by_hand():
    """One score of 3 capped at 2 beside one of 0. The slope of the cap is 1 / cosh^2 of their quotient."""
    capped = 2 * math.tanh(1.5)
    p = 1 / (1 + math.exp(-capped))
    ds = p * (1 - p)  # dP = 1 and 0, D = p
    dq, dk, dv = backward_reference(one_head(1), one_head(3, 0), one_head(1, 0), one_head(1), softcap=2.0)
    np.testing.assert_allclose(dk.ravel(), [ds / math.cosh(1.5) ** 2, -ds], rtol=1e-13)
    np.testing.assert_allclose(dq.item(), 3 * ds / math.cosh(1.5) ** 2, rtol=1e-13)
    np.testing.assert_allclose(dv.ravel(), [p, 1 - p], rtol=1e-13)


def test_sink_by_hand():
    """Two keys of score 0 and a sink of ln 2: P = 1/4 and 1/4, 1/2 of the sink; O = 3/4, D = 3/4."""
    call = np.zeros((1, 1, 1, 1)), np.ones((1, 2, 1, 1)), one_head(1, 2), one_head(1)
    found = backward_reference(*call, s_aux=[math.log(2)])
    np.testing.assert_allclose(found.d_s_aux, [-1 / 2 * 3 / 4], rtol=1e-14)
    np.testing.assert_allclose(found.dv.ravel(), [1 / 4, 1 / 4], rtol=1e-14)
    np.testing.assert_allclose(found.dq.item(), 1 / 4 * (1 - 3 / 4) + 1 / 4 * (2 - 3 / 4), rtol=1e-14)
    of_lse = backward_reference(*call[:3], one_head(0), Saved(dlse=np.full((1, 1, 1), 8.0)), s_aux=[math.log(2)])
    np.testing.assert_allclose(of_lse.d_s_aux, [4.0], rtol=1e-14)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("sink", [-INF, -1e4, -5.0, 0.0, 60.0, 1e4, 3e38, INF])
def test_sinks_of_any_magnitude_and_rows_without_keys(sink, dtype):
    """The first row has no key: without a sink its dlse may be anything, with one it is all that it gives."""
    backward = partial(backward_twin, dtype=dtype) if dtype else backward_reference
    first = NAN if sink == -INF else 4.0
    q, k, v, dout = one_head(1, 1), one_head(1), one_head(2), one_head(1, 1)
    found = backward(q, k, v, dout, saved=Saved(dlse=np.array([[[first, 0.5]]])), causal=True, s_aux=np.float32([sink]))
    share = 0.0 if sink == -INF else 1 / (1 + math.exp(min(1 - sink, 700)))
    last = share * (0.5 - 2 * (1 - share))
    slack = 2.0**-7 if dtype else 1e-14
    np.testing.assert_allclose(found.d_s_aux, [last + (0 if sink == -INF else first)], atol=slack, rtol=1e-12)
    np.testing.assert_allclose(found.dv.item(), 1 - share, atol=slack)
    assert found.dq[0, 0, 0, 0] == 0 and np.isfinite(found.dq).all() and np.isfinite(found.dk).all()


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_dropout_by_hand(dtype):
    """Of 64 keys of score 0: what is kept counts 1 / (1 - p) times, the LSE is of all."""
    n, (p, state) = 64, (0.3, (11, 12))
    kept = keep_mask(p, *state, 0, 0, [0], range(n))[0] / (1 - effective_p(p))
    v = np.arange(n) % 7 - 3.0
    backward = partial(backward_twin, dtype=dtype) if dtype else backward_reference
    call = np.zeros((1, 1, 1, 1)), np.ones((1, n, 1, 1)), one_head(*v), one_head(1)
    found = backward(*call, p_dropout=p, rng_state=state, attn_mask=np.zeros(n))
    tolerance = 2.0**-11 if dtype else 1e-14
    np.testing.assert_allclose(found.dv.ravel(), kept / n, rtol=tolerance)
    np.testing.assert_allclose(found.d_bias, (kept * v - (kept * v).sum() / n) / n, atol=tolerance / n * 3)
    assert 0 < np.count_nonzero(kept) < n


def test_values_of_fewer_columns_than_keys(monkeypatch):
    """As those of a forward pass that takes them: dq and dk are those of values with columns of zeros."""
    q, k, v, dout, _ = problem(head_dim=4)
    v[..., 3:], dout[..., 3:] = 0, 0
    expected = backward_reference(q, k, v, dout, **FEATURES["all"])

    def narrow(q, k, v, **options):
        out, lse = attention_reference(q, k, np.pad(v, ((0, 0),) * 3 + ((0, 1),)), **options)
        return out[..., :3], lse

    monkeypatch.setattr("fa3_cute.contract.backward_reference.attention_reference", narrow)
    found = backward_reference(q, k, v[..., :3], dout[..., :3], **FEATURES["all"])
    for name in GRADIENTS.values():
        same = getattr(expected, name)
        np.testing.assert_allclose(getattr(found, name), same[..., :3] if name == "dv" else same, atol=1e-14)


def test_parts_of_the_heads_have_their_own_bits():
    q, k, v, dout, _ = problem()
    options = FEATURES["dropout"]
    whole = backward_reference(q, k, v, dout, **options)
    part = backward_reference(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], dout[:, :, 2:], first_head=2, **options)
    for got, expected in zip(part, (whole.dq[:, :, 2:], whole.dk[:, :, 1:], whole.dv[:, :, 1:]), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-15)


# ---- what means the same ---------------------------------------------------------------------------------------------

HIDDEN = RNG.random((BATCH, HEADS, N_Q, N_K)) < 0.4
DISTANCE = np.abs(np.arange(N_Q)[:, None] + N_K - N_Q - np.arange(N_K))
SAME = {
    "a cap beyond all scores": ({"softcap": 1e12}, {}),
    "sinks of -inf": ({"s_aux": [-INF] * HEADS}, {}),
    "boolean and added": ({"attn_mask": ~HIDDEN}, {"attn_mask": np.where(HIDDEN, -INF, 0.0)}),
    "a causal mask": ({"attn_mask": np.arange(N_K) <= np.arange(N_Q)[:, None] + N_K - N_Q}, {"causal": True}),
    "ALiBi as a bias": ({"alibi_slopes": [0.3] * HEADS}, {"attn_mask": -0.3 * DISTANCE}),
    "a function": ({"mask_mod": lambda b, h, q, k, info: ~HIDDEN[b, h, q, k]}, {"attn_mask": ~HIDDEN}),
    "a chunk of all": ({"attention_chunk": N_K}, {}),
    "no dropout": ({"p_dropout": 0.0}, {}),
}


@pytest.mark.parametrize("one, other", SAME.values(), ids=SAME.keys())
def test_options_that_mean_the_same(one, other):
    tensors = problem()[:4]
    found, same = backward_reference(*tensors, **one), backward_reference(*tensors, **other)
    for got, expected in zip(found, same, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_bias_of_every_type(kind):
    """BF16 as its bits, too."""
    mask = FEATURES["bias of all heads"]["attn_mask"].astype(kind)
    tensors = problem()[:4]
    expected = backward_reference(*tensors, attn_mask=mask.astype(np.float64))
    for given in (mask, mask.view(np.uint16)) if kind is ml_dtypes.bfloat16 else (mask,):
        found = backward_reference(*tensors, attn_mask=given)
        assert found.d_bias is not None and found.d_bias.dtype == np.float64
        np.testing.assert_array_equal(found.d_bias, expected.d_bias)


def test_chunks_of_rows_add_up(monkeypatch):
    """Rows are computed some at a time: how many changes nothing but rounding."""
    tensors = problem()[:4]
    whole = backward_reference(*tensors, **FEATURES["all"])
    monkeypatch.setattr("fa3_cute.contract.backward_reference.SCORES_PER_CHUNK", N_K)
    found = backward_reference(*tensors, **FEATURES["all"])
    for name in GRADIENTS.values():
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-14)


# ---- the twin --------------------------------------------------------------------------------------------------------


def test_the_twin_is_near():
    """With every option: no further from exact than what the format rounds."""
    for dtype, most in (("bf16", 2.0**-7), ("fp16", 2.0**-10)):
        tensors = [round_to(tensor, dtype) for tensor in problem(head_dim=16)[:4]]
        options = {
            name: np.float32(value) if name in ("s_aux", "attn_mask") else value
            for name, value in FEATURES["all"].items()
        }
        exact, found = backward_reference(*tensors, **options), backward_twin(*tensors, dtype, **options)
        for name in GRADIENTS.values():
            got, expected = getattr(found, name), getattr(exact, name)
            error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
            assert 0 < error < most, (dtype, name, error)


def test_where_the_twin_rounds_with_a_softcap_and_a_bias():
    """dR is an operand, dS is not: d_bias has 24 bits where dk has 8, of a query of 1."""
    k = one_head(*round_to(np.array([3.0, 0.3, -1.7]), "bf16"))
    call = one_head(1), k, one_head(1, 0, 0), one_head(1)
    found = backward_twin(*call, "bf16", grad_dtype="fp32", softcap=2.0, attn_mask=np.zeros(3), softmax_scale=1.0)
    capped = 2 * np.tanh(k.ravel() / 2)
    p = np.exp(capped) / np.exp(capped).sum()
    ds = p * (np.array([1, 0, 0]) - float(round_to(p[:1], "bf16")[0]))
    np.testing.assert_allclose(found.d_bias, ds, rtol=1e-5)
    assert (round_to(found.d_bias, "bf16") != found.d_bias).all()
    np.testing.assert_array_equal(found.dk.ravel(), round_to(ds / np.cosh(k.ravel() / 2) ** 2, "bf16"))


def test_the_twin_rounds_p_before_dropout():
    """What is kept is P, rounded, times a factor in FP32; not the rounded product."""
    n, (p, state) = 64, (0.3, (11, 12))
    call = np.zeros((1, 1, 1, 1)), np.ones((1, n, 1, 1)), one_head(*range(n)), one_head(1)
    found = backward_twin(*call, "bf16", grad_dtype="fp32", p_dropout=p, rng_state=state, softmax_scale=1.0)
    kept = keep_mask(p, *state, 0, 0, [0], range(n))[0]
    np.testing.assert_allclose(found.dv.ravel(), kept / n / (1 - effective_p(p)), rtol=1e-6)
    assert (round_to(found.dv, "bf16") != found.dv)[0, kept != 0].all()


# ---- gradients that are added to -------------------------------------------------------------------------------------


def test_dk_and_dv_are_added_to():
    q, k, v, dout, dlse = problem()
    alone = backward_reference(q, k, v, dout, Saved(dlse=dlse))
    found = backward_reference(q, k, v, dout, Saved(dlse=dlse, dk=2 * k, dv=3 * v))
    np.testing.assert_array_equal(found.dq, alone.dq)
    np.testing.assert_allclose(found.dk, alone.dk + 2 * k, atol=1e-14)
    np.testing.assert_allclose(found.dv, alone.dv + 3 * v, atol=1e-14)


@pytest.mark.parametrize("grad_dtype", ["bf16", "fp32"])
def test_the_twin_rounds_the_sum_once(grad_dtype):
    """What is there before is of the gradient's type, added in FP32; not two roundings."""
    q, k, v, dout = (round_to(tensor, "bf16") for tensor in problem()[:4])
    before = [to_bits(9 * tensor, grad_dtype) for tensor in (k, v)]
    backward = partial(backward_twin, q, k, v, dout, "bf16")
    sums, found = backward(grad_dtype="fp32"), backward(Saved(dk=before[0], dv=before[1]), grad_dtype=grad_dtype)
    for name, tensor in (("dk", k), ("dv", v)):
        there = round_to(9 * tensor, grad_dtype)
        together = np.float32(getattr(sums, name)) + np.float32(there)
        np.testing.assert_allclose(getattr(found, name), round_to(together, grad_dtype), rtol=1e-6)
        if grad_dtype == "bf16":
            twice = round_to(round_to(getattr(sums, name), "bf16") + there, "bf16")
            assert (getattr(found, name) != twice).any()


def test_what_no_sequence_uses_is_not_added_to():
    q, k, v, dout, _ = problem(8, 9, ())
    lengths = PACKED["packed and used"]
    found = backward_reference(q, k, v, dout, Saved(dk=np.full(k.shape, NAN), dv=np.zeros(v.shape)), **lengths)
    assert np.isnan(found.dv[[5, 6, 7, 8]]).all() and np.isfinite(found.dv[:5]).all()
