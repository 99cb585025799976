"""The reference against cases worked out by hand, and against a second formulation: loops over rows in pure Python."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa3_cute.contract.reference import attention_reference, low_precision_twin

INF = math.inf
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def one_head(rows):
    """[[...], ...] as a tensor [1, rows, 1, head_dim]."""
    return np.array(rows, np.float64)[None, :, None, :]


# ---- by hand -------------------------------------------------------------------------------------------------------

# Scores of 0 everywhere (q = 0): each row's output is the mean of the values it sees, its LSE the log of their number.
# Per case: (queries, keys, options, for each query row the keys that it sees).
SEEN_BY_HAND = {
    "full": (2, 3, {}, [{0, 1, 2}, {0, 1, 2}]),
    "causal, as many keys": (3, 3, {"causal": True}, [{0}, {0, 1}, {0, 1, 2}]),
    "causal, more keys": (2, 4, {"causal": True}, [{0, 1, 2}, {0, 1, 2, 3}]),
    "causal, fewer keys": (4, 2, {"causal": True}, [set(), set(), {0}, {0, 1}]),
    "causal, one query": (1, 3, {"causal": True}, [{0, 1, 2}]),
    "window, both bounds inclusive": (3, 3, {"window_size": (1, 1)}, [{0, 1}, {0, 1, 2}, {1, 2}]),
    "window, diagonal only": (2, 4, {"window_size": (0, 0)}, [{2}, {3}]),
    "window, left bound only": (2, 4, {"window_size": (1, -1)}, [{1, 2, 3}, {2, 3}]),
    "window, right bound only": (2, 4, {"window_size": (-1, 0)}, [{0, 1, 2}, {0, 1, 2, 3}]),
    "window, fewer keys": (4, 1, {"window_size": (1, 1)}, [set(), set(), {0}, {0}]),
    "window, wider than an int32": (1, 2, {"window_size": (2**31, 2**31)}, [{0, 1}]),
    "seqused_k": (1, 4, {"seqused_k": [2]}, [{0, 1}]),
    "seqused_k moves the diagonal": (2, 4, {"seqused_k": [3], "causal": True}, [{0, 1}, {0, 1, 2}]),
    "seqused_q moves the diagonal": (3, 3, {"seqused_q": [2], "causal": True}, [{0, 1}, {0, 1, 2}, None]),
    "no keys used": (2, 3, {"seqused_k": [0]}, [set(), set()]),
}


@pytest.mark.parametrize("n_q, n_k, options, seen", SEEN_BY_HAND.values(), ids=SEEN_BY_HAND.keys())
def test_which_keys_a_row_sees(n_q, n_k, options, seen):
    values = 2.0 ** np.arange(n_k)  # distinct sums: the output tells exactly which keys were seen
    q, k, v = np.zeros((1, n_q, 1, 1)), np.ones((1, n_k, 1, 1)), values[None, :, None, None]
    out, lse = attention_reference(q, k, v, **options)
    for row, keys in enumerate(seen):
        if keys is None:
            expected = math.nan, math.nan
        elif keys:
            expected = sum(2.0**j for j in keys) / len(keys), math.log(len(keys))
        else:
            expected = 0.0, -INF
        np.testing.assert_allclose((out[0, row, 0, 0], lse[0, 0, row]), expected, rtol=1e-14)


def test_softmax_by_hand():
    """Scores ln 1 and ln 3: weights 1/4 and 3/4, LSE ln 4."""
    out, lse = attention_reference(one_head([[1.0]]), one_head([[0.0], [math.log(3)]]), one_head([[8.0], [4.0]]))
    np.testing.assert_allclose((out.item(), lse.item()), (5.0, math.log(4)), rtol=1e-14)


def test_default_scale_is_the_inverse_root_of_head_dim():
    q, k, v = one_head([[2.0, 2, 2, 2]]), one_head([[1.0] * 4, [0] * 4]), one_head([[1.0] * 4, [0] * 4])
    out, lse = attention_reference(q, k, v)  # scores 8 / sqrt(4) = 4 and 0
    np.testing.assert_allclose(out[0, 0, 0], 1 / (1 + math.exp(-4)), rtol=1e-14)
    np.testing.assert_allclose(lse.item(), math.log(math.exp(4) + 1), rtol=1e-14)
    _, lse = attention_reference(q, k, v, softmax_scale=0.25)
    np.testing.assert_allclose(lse.item(), math.log(math.exp(2) + 1), rtol=1e-14)


def test_query_head_i_reads_kv_head_i_over_the_group_size():
    v = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    out, _ = attention_reference(np.zeros((1, 1, 6, 1)), np.zeros((1, 1, 2, 1)), v)
    assert out.ravel().tolist() == [10, 10, 10, 20, 20, 20]


def test_packed_sequences_by_hand():
    """Lengths q 1, 0, 2 and k 2, 1, 0: means of the own keys, an unused sequence, rows without keys; layout of LSE."""
    v = np.array([1.0, 3.0, 50.0]).reshape(3, 1, 1)
    out, lse = attention_reference(
        np.zeros((3, 2, 1)), np.zeros((3, 1, 1)), v, cu_seqlens_q=[0, 1, 1, 3], cu_seqlens_k=[0, 2, 3, 3]
    )
    assert out[:, 0, 0].tolist() == [2, 0, 0]
    assert lse.shape == (2, 3)
    np.testing.assert_allclose(lse[1], [math.log(2), -INF, -INF])


def test_huge_scores_do_not_overflow():
    out, lse = attention_reference(one_head([[1e4]]), one_head([[1.0], [0.9], [-1.0]]), one_head([[7.0], [1.0], [1.0]]))
    assert (out.item(), lse.item()) == (7.0, 1e4)


# ---- NaN and infinity ----------------------------------------------------------------------------------------------


def test_nan_stays_nan_and_stays_in_its_row():
    q = one_head([[1.0], [math.nan], [2.0]])
    out, lse = attention_reference(q, one_head([[1.0], [2.0]]), one_head([[1.0], [2.0]]))
    assert np.isnan(out[0, :, 0, 0]).tolist() == np.isnan(lse[0, 0]).tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_unseen_keys_contribute_nothing(poison, dtype):
    """Rows past seqused_k, in the next packed sequence, behind the mask: NaN and Inf there change no bit."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((6, 2, 4)) for _ in range(3))
    options = {"cu_seqlens_q": [0, 3, 6], "cu_seqlens_k": [0, 4, 6], "seqused_k": [3, 2], "causal": True}
    attend = attention_reference if dtype is None else lambda *qkv, **kw: low_precision_twin(*qkv, dtype, **kw)
    clean = attend(q, k, v, **options)
    k[3] = v[3] = poison  # past seqused_k of sequence 0
    k[5] = v[5] = poison  # sequence 1: seen by its last row only
    for before, after in zip(clean, attend(q, k, v, **options), strict=True):
        rows = np.arange(5) if before.ndim == 3 else (slice(None), np.arange(5))
        np.testing.assert_array_equal(before[rows], after[rows])
    assert not np.isfinite(attend(q, k, v, **options)[0][5]).any()


def test_all_scores_minus_infinity_read_as_an_empty_row():
    out, lse = attention_reference(one_head([[INF]]), one_head([[-1.0], [-2.0]]), one_head([[1.0], [2.0]]))
    assert (out.item(), lse.item()) == (0, -INF)
    out, lse = attention_reference(one_head([[INF]]), one_head([[1.0], [-2.0]]), one_head([[1.0], [2.0]]))
    assert np.isnan([out.item(), lse.item()]).all()


# ---- the independent formulation -----------------------------------------------------------------------------------


def attention_by_loops(q_row, keys, values, scale):
    """Output and LSE of one row over the keys it sees: exact sums (fsum) of Python floats, nothing shared."""
    if not keys:
        return [0.0] * len(q_row), -INF
    scores = [scale * math.fsum(a * b for a, b in zip(q_row, key, strict=True)) for key in keys]
    lse = max(scores) + math.log(math.fsum(math.exp(s - max(scores)) for s in scores))
    weights = [math.exp(s - lse) for s in scores]
    return [math.fsum(w * value[d] for w, value in zip(weights, values, strict=True)) for d in range(len(q_row))], lse


def is_seen(i, j, n_q, n_k, options):
    """The sentence of the contract, for one query and one key."""
    diagonal = i + n_k - n_q
    if options.get("causal"):
        return j <= diagonal
    left, right = options.get("window_size", (-1, -1))
    return (left < 0 or j >= diagonal - left) and (right < 0 or j <= diagonal + right)


@st.composite
def problems(draw):
    """(lengths of q, of k, used of q, used of k, heads, heads_k, head_dim, options, seed)."""
    batch = draw(st.integers(1, 3))
    length = st.lists(st.integers(0, 7), min_size=batch, max_size=batch)
    lengths_q, lengths_k = draw(length), draw(length)
    used_q = [draw(st.integers(0, n)) for n in lengths_q] if draw(st.booleans()) else lengths_q
    used_k = [draw(st.integers(0, n)) for n in lengths_k] if draw(st.booleans()) else lengths_k
    heads_k = draw(st.integers(1, 2))
    masks = [{}, {"causal": True}, {"window_size": (draw(st.integers(-1, 8)), draw(st.integers(-1, 8)))}]
    options = {"softmax_scale": draw(st.sampled_from([None, 0.3, 2.0])), **draw(st.sampled_from(masks))}
    return (
        lengths_q,
        lengths_k,
        used_q,
        used_k,
        heads_k * draw(st.integers(1, 3)),
        heads_k,
        draw(st.integers(1, 5)),
        options,
        draw(st.integers(0, 2**32 - 1)),
    )


def assert_matches_loops(problem, packed: bool):
    """Compare every row of every head of the reference with `attention_by_loops`; unused rows must be NaN."""
    lengths_q, lengths_k, used_q, used_k, heads, heads_k, head_dim, options, seed = problem
    rng = np.random.default_rng(seed)
    if not packed:  # dense tensors have one length; the used lengths play the role of the drawn ones
        used_q, used_k, lengths_q, lengths_k = lengths_q, lengths_k, [7] * len(lengths_q), [7] * len(lengths_k)
    starts_q, starts_k = np.cumsum([0, *lengths_q]), np.cumsum([0, *lengths_k])
    q = rng.standard_normal((starts_q[-1], heads, head_dim))
    k, v = rng.standard_normal((2, starts_k[-1], heads_k, head_dim))
    shaped = (q, k, v) if packed else tuple(x.reshape(-1, 7, *x.shape[1:]) for x in (q, k, v))
    offsets = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k} if packed else {}
    out, lse = attention_reference(*shaped, **options, **offsets, seqused_q=used_q, seqused_k=used_k)
    out, lse = out.reshape(q.shape), lse if packed else lse.transpose(1, 0, 2).reshape(heads, -1)
    expected_out, expected_lse = np.full(out.shape, np.nan), np.full(lse.shape, np.nan)
    scale = options["softmax_scale"] or 1 / math.sqrt(head_dim)
    for b, h in np.ndindex(len(lengths_q), heads):
        k_rows = slice(starts_k[b], starts_k[b] + used_k[b])
        keys, values = k[k_rows, h * heads_k // heads].tolist(), v[k_rows, h * heads_k // heads].tolist()
        for i in range(used_q[b]):
            seen = [j for j in range(used_k[b]) if is_seen(i, j, used_q[b], used_k[b], options)]
            row = starts_q[b] + i
            expected_out[row, h], expected_lse[h, row] = attention_by_loops(
                q[row, h].tolist(), [keys[j] for j in seen], [values[j] for j in seen], scale
            )
    np.testing.assert_allclose(out, expected_out, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_packed_matches_loops(problem):
    assert_matches_loops(problem, packed=True)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_dense_matches_loops(problem):
    assert_matches_loops(problem, packed=False)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 3)}, {"window_size": (-1, 600)}])
def test_chunks_of_rows_meet_seamlessly(options, monkeypatch):
    """Long sequences are computed in chunks of rows: any chunk size gives the same result."""
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((1, 300, 1, 8)), *rng.standard_normal((2, 1, 500, 1, 8))
    whole = attention_reference(q, k, v, **options)
    monkeypatch.setattr("fa3_cute.contract.reference.SCORES_PER_CHUNK", 500 * 7)
    for a, b in zip(whole, attention_reference(q, k, v, **options), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


# ---- descales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["scalar", "head", "batch", "batch and head"])
def test_descales_equal_scaled_inputs(per):
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((2, 5, 6, 8)), *rng.standard_normal((2, 2, 7, 3, 8))
    bits = [x.astype(E4M3).view(np.uint8) for x in (q, k, v)]
    shape = {"scalar": (), "head": (-1,), "batch": (2, 1), "batch and head": (2, -1)}[per]
    scales = [rng.uniform(0.5, 2, [heads if n == -1 else n for n in shape]) for heads in (6, 3, 3)]
    got = attention_reference(*bits, causal=True, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2])
    scaled = [
        x.astype(E4M3).astype(np.float64) * np.broadcast_to(s, (2, x.shape[2]))[:, None, :, None]
        for x, s in zip((q, k, v), scales, strict=True)
    ]
    for a, b in zip(got, attention_reference(*scaled, causal=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = {
    "heads": ((1, 2, 3, 4), (1, 2, 2, 4), {}, "num_heads"),
    "head_dim": ((1, 2, 2, 4), (1, 2, 2, 8), {}, "head_dim"),
    "batch": ((1, 2, 2, 4), (2, 2, 2, 4), {}, "batch"),
    "rank": ((2, 2, 4), (2, 2, 4), {}, "4 dimensions"),
    "one cu_seqlens": ((2, 2, 4), (2, 2, 4), {"cu_seqlens_q": [0, 2]}, "needs cu_seqlens_k, or seqused_k"),
    "packed keys alone": ((2, 2, 4), (2, 2, 4), {"cu_seqlens_k": [0, 2]}, "need packed queries"),
    "falling cu_seqlens": ((2, 2, 4), (2, 2, 4), {"cu_seqlens_q": [0, 2, 1], "cu_seqlens_k": [0, 1, 2]}, "never fall"),
    "seqused": ((1, 2, 2, 4), (1, 2, 2, 4), {"seqused_k": [3]}, "seqused"),
    "causal window": ((1, 2, 2, 4), (1, 2, 2, 4), {"causal": True, "window_size": (1, 0)}, "causal"),
    "descale": ((1, 2, 2, 4), (1, 2, 2, 4), {"q_descale": [1.0, 1.0, 1.0]}, "descale"),
}


@pytest.mark.parametrize("q_shape, k_shape, options, words", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_problem(q_shape, k_shape, options, words):
    with pytest.raises(ValueError, match=words):
        attention_reference(np.zeros(q_shape), np.zeros(k_shape), np.zeros(k_shape), **options)
