"""Softcap, sinks, ALiBi, masks, chunks, functions and dropout in the reference: by hand, by loops over scores in pure
Python, and against each other."""

import math

import ml_dtypes
import numpy as np
import pytest

from fa3_cute.contract.dropout import effective_p
from fa3_cute.contract.philox import keep_mask
from fa3_cute.contract.reference import attention_reference, low_precision_twin

INF = math.inf


def one_head(*rows):
    """Numbers as a tensor [1, rows, 1, 1]."""
    return np.array(rows, np.float64)[None, :, None, None]


def zero_scores(n_q, n_k):
    """q, k, v whose scores are 0 and whose sums of values tell the keys."""
    return np.zeros((1, n_q, 1, 1)), np.ones((1, n_k, 1, 1)), one_head(*2.0 ** np.arange(n_k))


def random_call(seed=0, batch=2, n_q=5, n_k=9, heads=4, heads_k=2, head_dim=8):
    rng = np.random.default_rng(seed)
    shapes = (batch, n_q, heads, head_dim), *[(batch, n_k, heads_k, head_dim)] * 2
    return [rng.standard_normal(shape) for shape in shapes]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# ---- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap, score", [(2.0, 2 * math.tanh(1.5)), (0.5, 0.5 * math.tanh(6)), (1e9, 3.0), (0.0, 3.0)])
def test_softcap_by_hand(cap, score):
    """Scores 3 and 0, capped: far above the scores nothing, far below them the cap."""
    out, lse = attention_reference(one_head(1), one_head(3, 0), one_head(1, 0), softcap=cap)
    assert lse.item() == pytest.approx(math.log(math.exp(score) + 1), rel=1e-12)
    assert out.item() == pytest.approx(1 / (1 + math.exp(-score)), rel=1e-12)


def test_softcap_is_of_scaled_scores():
    """Scale and descales come before."""
    q, k, v = one_head(3), one_head(2, 0), one_head(1, 0)
    scaled = attention_reference(
        q, k, v, softcap=1.5, softmax_scale=0.5, q_descale=2.0, k_descale=0.25
    )  # 3 * 2 * 0.5 * 0.5 = 1.5
    assert scaled[1].item() == pytest.approx(math.log(math.exp(1.5 * math.tanh(1)) + 1), rel=1e-12)


def test_sink_by_hand():
    """Two keys of score 0 and a sink of ln 2: it takes half of the sum."""
    out, lse = attention_reference(*zero_scores(1, 2), s_aux=[math.log(2)])
    assert (out.item(), lse.item()) == pytest.approx((3 / 4, math.log(4)))


@pytest.mark.parametrize("sink", [-INF, -1e4, -5.0, 0.0, 60.0, 1e4, 3e38, INF])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16", "fp8_e4m3"])
def test_sink_of_a_row_without_keys_and_of_any_magnitude(sink, dtype):
    q, k, v = np.ones((1, 2, 1, 1)), np.ones((1, 1, 1, 1)), one_head(4)
    call = {
        "causal": True,
        "s_aux": [sink],
        "softmax_scale": 1.0,
    }  # the first row has no key, the second one of score 1
    twin = {} if dtype is None else {"dtype": dtype}
    out, lse = (low_precision_twin if dtype else attention_reference)(q, k, v, **twin, **call)
    assert lse[0, 0].tolist() == pytest.approx([sink, np.logaddexp(1, sink)], rel=1e-6)
    share = 1.0 if sink == -INF else 1 / (1 + math.exp(min(sink - 1, 700)))
    assert out.ravel().tolist() == pytest.approx([0, 4 * share], rel=2**-3 if dtype else 1e-12, abs=1e-6)


def test_alibi_by_hand():
    """Of two queries over three keys: the diagonal ends bottom-right, on both sides of it the score falls."""
    _, k, v = zero_scores(2, 3)
    out, lse = attention_reference(np.zeros((1, 2, 1, 1)), k, v, alibi_slopes=[math.log(2)])
    weights = np.array([[1 / 2, 1, 1 / 2], [1 / 4, 1 / 2, 1]])
    np.testing.assert_allclose(lse[0, 0], np.log(weights.sum(1)))
    np.testing.assert_allclose(out[0, :, 0, 0], weights @ [1, 2, 4] / weights.sum(1))


def test_alibi_slopes_of_sequences():
    q, k, v = random_call()
    slopes = np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    both = attention_reference(q, k, v, alibi_slopes=slopes)
    for b in range(2):
        alone = attention_reference(q[b : b + 1], k[b : b + 1], v[b : b + 1], alibi_slopes=slopes[b])
        assert_same((both[0][b], both[1][b]), (alone[0][0], alone[1][0]))


# (queries, keys, options, for each query row the keys that it sees)
SEEN_BY_HAND = {
    "chunks": (4, 4, {"attention_chunk": 2}, [{0, 1}, {0, 1}, {2, 3}, {2, 3}]),
    "chunks, causal": (4, 4, {"attention_chunk": 2, "causal": True}, [{0}, {0, 1}, {2}, {2, 3}]),
    "chunks, more keys": (2, 5, {"attention_chunk": 2}, [{2, 3}, {4}]),
    "chunks, fewer keys": (5, 2, {"attention_chunk": 2}, [set(), set(), set(), {0, 1}, {0, 1}]),
    "chunks, window": (4, 4, {"attention_chunk": 3, "window_size": (1, 0)}, [{0}, {0, 1}, {1, 2}, {3}]),
    "chunks, used lengths": (2, 4, {"attention_chunk": 2, "seqused_k": [3]}, [{0, 1}, {2}]),
    "one chunk": (2, 3, {"attention_chunk": 3}, [{0, 1, 2}, {0, 1, 2}]),
    "boolean mask": (2, 3, {"attn_mask": np.array([[True, False, True], [False, True, False]])}, [{0, 2}, {1}]),
    "bytes": (2, 2, {"attn_mask": np.array([[7, 0], [0, 0]], np.uint8)}, [{0}, set()]),
    "added -inf": (2, 2, {"attn_mask": np.array([[0.0, -INF], [-INF, -INF]])}, [{0}, set()]),
    "mask and causal": (2, 2, {"attn_mask": np.array([[True, True]]), "causal": True}, [{0}, {0, 1}]),
    "mask of a cache": (1, 4, {"attn_mask": np.array([True, False, True, True]), "seqused_k": [3]}, [{0, 2}]),
    "function": (3, 3, {"mask_mod": lambda b, h, q, k, info: (q + k) % 2 == 0}, [{0, 2}, {1}, {0, 2}]),
    "function of lengths": (1, 3, {"mask_mod": lambda b, h, q, k, info: k == info.n_k - info.n_q}, [{2}]),
}


@pytest.mark.parametrize("n_q, n_k, options, seen", SEEN_BY_HAND.values(), ids=SEEN_BY_HAND.keys())
@pytest.mark.parametrize("poison", [False, True])
def test_which_keys_a_row_sees(n_q, n_k, options, seen, poison):
    """A hidden key contributes nothing, whatever it holds."""
    q, k, v = zero_scores(n_q, n_k)
    if poison:
        hidden = sorted(set(range(n_k)) - set().union(*seen))
        k[:, hidden], v[:, hidden] = math.nan, math.nan
    out, lse = attention_reference(q, k, v, **options)
    for row, keys in enumerate(seen):
        expected = (sum(2.0**j for j in keys) / len(keys), math.log(len(keys))) if keys else (0.0, -INF)
        np.testing.assert_allclose((out[0, row, 0, 0], lse[0, 0, row]), expected, rtol=1e-14)


def test_a_nan_that_some_rows_see_reaches_these_alone():
    q, k, v = zero_scores(3, 3)
    v[0, 1] = math.nan
    mask = np.array([[True, False, True], [True, True, True], [False, False, True]])
    out, _ = attention_reference(q, k, v, attn_mask=mask)
    assert np.isnan(out[0, :, 0, 0]).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_masks_of_every_type_are_added(dtype):
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[dtype]
    mask = np.array([[0.5, -2.0, 1.0]]).astype(kind)
    as_bits = mask.view(np.uint16) if dtype == "bf16" else mask
    for given in (mask, as_bits):
        _, lse = attention_reference(*zero_scores(1, 3), attn_mask=given)
        assert lse.item() == pytest.approx(math.log(math.exp(0.5) + math.exp(-2) + math.exp(1)), rel=1e-12)


# ---- by loops ------------------------------------------------------------------------------------------------------


def by_loops(q, k, v, options):
    """One score after the other, in the order of the definition; dense, without seqused."""
    (batch, n_q, heads, head_dim), (n_k, heads_k) = q.shape, k.shape[1:3]
    out, lse = np.zeros(q.shape), np.zeros((batch, heads, n_q))
    mask = np.broadcast_to(options["attn_mask"], (batch, heads, n_q, n_k))
    for b, h, i in np.ndindex(batch, heads, n_q):
        sums, total = np.zeros(head_dim), math.exp(options["s_aux"][h])
        kept = keep_mask(options["p_dropout"], *options["rng_state"], b, h, [i], range(n_k))[0]
        for j in range(n_k):
            diagonal = i + n_k - n_q
            is_seen = j <= diagonal and j // options["attention_chunk"] == diagonal // options["attention_chunk"]
            if not (is_seen and options["mask_mod"](b, h, i, j, None) and mask[b, h, i, j] > -INF):
                continue
            score = q[b, i, h] @ k[b, j, h // (heads // heads_k)] / math.sqrt(head_dim)
            score = options["softcap"] * math.tanh(score / options["softcap"]) + mask[b, h, i, j]
            score -= options["alibi_slopes"][b][h] * abs(diagonal - j)
            weight = math.exp(options["score_mod"](score, b, h, i, j, None))
            total += weight
            sums += kept[j] * weight / (1 - effective_p(options["p_dropout"])) * v[b, j, h // (heads // heads_k)]
        out[b, i, h], lse[b, h, i] = sums / total, math.log(total)
    return out, lse


def test_all_at_once_by_loops():
    rng = np.random.default_rng(3)
    mask = rng.standard_normal((2, 1, 6, 11))
    mask[rng.random(mask.shape) < 0.2] = -INF
    options = {
        "softcap": 1.3,
        "s_aux": [0.0, 1.0, -2.0, 0.5],
        "alibi_slopes": rng.random((2, 4)),
        "attn_mask": mask,
        "attention_chunk": 5,
        "score_mod": lambda score, b, h, q, k, info: score * (1 + 0.1 * h + 0.2 * b) + 0.05 * (q - k),
        "mask_mod": lambda b, h, q, k, info: (q + 2 * k + h) % 5 != 0,
        "p_dropout": 0.3,
        "rng_state": (1234, 5),
    }
    q, k, v = random_call(7, n_q=6, n_k=11)
    assert_same(attention_reference(q, k, v, causal=True, **options), by_loops(q, k, v, options))


# ---- what means the same -------------------------------------------------------------------------------------------

RNG = np.random.default_rng(11)
HIDDEN = RNG.random((2, 4, 5, 9)) < 0.4
SAME = {
    "a cap beyond all scores": ({"softcap": 1e12}, {}),
    "no cap": ({"softcap": 0.0}, {}),
    "sinks of -inf": ({"s_aux": [-INF] * 4}, {}),
    "slopes of 0": ({"alibi_slopes": np.zeros(4)}, {}),
    "a chunk of all": ({"attention_chunk": 9}, {}),
    "a chunk of all, causal": ({"attention_chunk": 100, "causal": True}, {"causal": True}),
    "boolean and added": ({"attn_mask": ~HIDDEN}, {"attn_mask": np.where(HIDDEN, -INF, 0.0)}),
    "boolean and bytes": ({"attn_mask": ~HIDDEN}, {"attn_mask": 3 * (~HIDDEN).astype(np.uint8)}),
    "broadcast": ({"attn_mask": ~HIDDEN[:1, :1]}, {"attn_mask": np.broadcast_to(~HIDDEN[:1, :1], (2, 4, 5, 9))}),
    "a causal mask": (
        {"attn_mask": np.arange(9) <= np.arange(5)[:, None] + 4},
        {"causal": True},
    ),
    "a function": ({"mask_mod": lambda b, h, q, k, i: ~HIDDEN[b, h, q, k]}, {"attn_mask": ~HIDDEN}),
    "a causal function": ({"mask_mod": lambda b, h, q, k, info: k <= q + info.n_k - info.n_q}, {"causal": True}),
    "a softcap as a function": (
        {"score_mod": lambda s, *place: 2 * np.tanh(s / 2)},
        {"softcap": 2.0},
    ),
    "ALiBi as a function": (
        {"score_mod": lambda s, b, h, q, k, info: s - 0.5 * abs(q + info.n_k - info.n_q - k)},
        {"alibi_slopes": [0.5] * 4},
    ),
    "no dropout": ({"p_dropout": 0.0}, {}),
}


@pytest.mark.parametrize("one, other", SAME.values(), ids=SAME.keys())
def test_options_that_mean_the_same(one, other):
    call = random_call()
    assert_same(attention_reference(*call, **one), attention_reference(*call, **other))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "alibi_slopes", "attn_mask", "attention_chunk", "p_dropout"])
def test_no_option_is_without_effect(name):
    values = {
        "softcap": 0.5,
        "s_aux": [0.0] * 4,
        "alibi_slopes": [0.5] * 4,
        "attn_mask": ~HIDDEN,
        "attention_chunk": 4,
        "p_dropout": 0.5,
    }
    call, more = random_call(), {"rng_state": (1, 2)} if name == "p_dropout" else {}
    plain, changed = attention_reference(*call), attention_reference(*call, **{name: values[name]}, **more)
    assert not np.allclose(plain[0], changed[0])
    assert np.allclose(plain[1], changed[1]) == (name == "p_dropout"), "dropout alone leaves the LSE"


def test_packed_sequences_have_the_options_of_dense_ones():
    q, k, v = random_call()
    options = {
        "softcap": 2.0,
        "s_aux": [0.3, 0.1, -1.0, 2.0],
        "alibi_slopes": RNG.random((2, 4)),
        "attention_chunk": 3,
        "p_dropout": 0.25,
        "rng_state": np.array([5, 6], np.uint64),
        "mask_mod": lambda b, h, q, k, info: (b + h + q + k) % 3 != 0,
    }
    out, lse = attention_reference(q, k, v, **options)
    offsets = {"cu_seqlens_q": [0, 5, 10], "cu_seqlens_k": [0, 9, 18]}
    packed = attention_reference(*(tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v)), **offsets, **options)
    assert_same(packed, (out.reshape(10, 4, 8), np.concatenate(list(lse), axis=-1)))


def test_pages_have_the_options_of_a_dense_cache():
    """The mask is that of the sequence's keys, as many as it may have."""
    q, k, v = random_call(n_k=12)
    used, pages = [7, 12], np.array([[0, 1, 2], [3, 4, 5]])
    options = {
        "seqused_k": used,
        "attn_mask": RNG.random((2, 4, 5, 12)) < 0.7,
        "alibi_slopes": RNG.random(4),
        "attention_chunk": 5,
        "p_dropout": 0.25,
        "rng_state": (3, 4),
    }
    pool_k, pool_v = (tensor.reshape(6, 4, 2, 8) for tensor in (k, v))
    assert_same(
        attention_reference(q, pool_k, pool_v, page_table=pages, **options), attention_reference(q, k, v, **options)
    )
    swapped = attention_reference(q, pool_k, pool_v, page_table=pages[::-1], kv_batch_idx=[1, 0], **options)
    assert_same(swapped, attention_reference(q, k, v, **options))


def test_a_part_of_the_heads_has_the_bits_of_all():
    """first_head: numbers of heads are those of the whole call."""
    q, k, v = random_call()
    options = {"p_dropout": 0.5, "rng_state": (9, 9), "mask_mod": lambda b, h, q, k, info: (h + q + k) % 2 == 0}
    whole = attention_reference(q, k, v, **options)
    part = attention_reference(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], first_head=2, **options)
    assert_same(part, (whole[0][:, :, 2:], whole[1][:, 2:]))


def test_the_mean_over_seeds_is_the_result_without_dropout():
    q, k, v = random_call(batch=1, heads=2, heads_k=2)
    exact, _ = attention_reference(q, k, v)
    means = np.mean([attention_reference(q, k, v, p_dropout=0.25, rng_state=(s, 0))[0] for s in range(400)], axis=0)
    np.testing.assert_allclose(means, exact, atol=0.12)


# ---- the twin ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8_e4m3"])
def test_the_twin_is_near(dtype):
    q, k, v = random_call(5, n_q=16, n_k=40)
    options = {
        "softcap": 3.0,
        "s_aux": [0.3, 0.1, -1.0, 2.0],
        "alibi_slopes": [0.1, 0.2, 0.0, 0.05],
        "attn_mask": RNG.standard_normal((16, 40)),
        "attention_chunk": 16,
        "p_dropout": 0.2,
        "rng_state": (1, 1),
    }
    exact, twin = attention_reference(q, k, v, **options), low_precision_twin(q, k, v, dtype, **options)
    step = {"fp16": 2**-9, "bf16": 2**-6, "fp8_e4m3": 2**-2}[dtype]
    np.testing.assert_allclose(twin[0], exact[0], atol=2 * step)
    np.testing.assert_allclose(twin[1], exact[1], atol=4 * step)
    assert not np.array_equal(twin[0], exact[0])


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"s_aux": [0.0] * 3}, ("s_aux.shape=(3,)", "[4]")),
        ({"alibi_slopes": np.zeros((3, 4))}, ("alibi_slopes.shape=(3, 4)", "[2, 4]")),
        ({"attn_mask": np.zeros((5, 8))}, ("attn_mask.shape=(5, 8)", "[2, 4, 5, 9]")),
        ({"p_dropout": 0.5}, ("rng_state",)),
        ({"rng_state": (1, 2)}, ("p_dropout",)),
    ],
)
def test_arrays_that_do_not_fit(options, words):
    with pytest.raises(ValueError) as raised:
        attention_reference(*random_call(), **options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_mask_belongs_to_dense_queries():
    q, k, v = (tensor[0] for tensor in random_call())
    with pytest.raises(ValueError, match="attn_mask"):
        attention_reference(q, k, v, cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 9], attn_mask=np.zeros((5, 9)))
