"""New keys and values, rotary positions and left padding in the reference, against what they mean, worked out here."""

import ml_dtypes
import numpy as np
import pytest

from fa3_cute.contract.quantize import quantize_fp8
from fa3_cute.contract.reference import as_float, attention_reference, bf16_bits, e4m3_bits, update_cache

HEADS, HEADS_K, DIM, CAPACITY = 4, 2, 16, 24
OLD, NEW = np.array([0, 5, 21]), 4
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (3, 0)}, "chunk": {"attention_chunk": 3}}
rng = np.random.default_rng(7)


def rows(*shape, heads=HEADS_K):
    return rng.standard_normal((*shape, heads, DIM))


def cache():
    """A dense cache of three sequences, NaN behind their rows, and new rows of each."""
    k, v = rows(3, CAPACITY), rows(3, CAPACITY)
    for b, n in enumerate(OLD):
        k[b, n:] = v[b, n:] = np.nan
    return k, v, rows(3, NEW), rows(3, NEW)


def tables(positions=64, columns=DIM // 2, seed=3):
    angles = np.random.default_rng(seed).uniform(-3, 3, (positions, columns))
    return np.cos(angles), np.sin(angles), angles


def turned(x, positions, angles, interleaved):
    """Rows [rows, heads, DIM] by complex numbers."""
    half, x = angles.shape[1], x.copy()
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    for i, (a, b) in enumerate(pairs):
        z = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angles[positions, i])[:, None]
        x[..., a], x[..., b] = z.real, z.imag
    return x


def appended(k, v, k_new, v_new):
    """(keys, values) of each sequence, as lists: old rows, then new ones, as many as there is room for."""
    joined = [
        [np.concatenate([x[b, :n], new[b]])[:CAPACITY] for b, n in enumerate(OLD)]
        for x, new in ((k, k_new), (v, v_new))
    ]
    return list(zip(*joined, strict=True))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_new_rows_follow_the_old_ones(mask):
    k, v, k_new, v_new = cache()
    q, before = rows(3, 2, heads=HEADS), (k.copy(), v.copy())
    out, lse = attention_reference(q, k, v, seqused_k=OLD, k_new=k_new, v_new=v_new, **mask)
    for b, (keys, values) in enumerate(appended(k, v, k_new, v_new)):
        expected = attention_reference(q[b : b + 1], keys[None], values[None], **mask)
        np.testing.assert_array_equal(out[b], expected[0][0])
        np.testing.assert_array_equal(lse[b], expected[1][0])
    assert all(np.array_equal(*pair, equal_nan=True) for pair in zip((k, v), before, strict=True)), "k or v was written"


def test_nothing_else_of_the_cache_is_written():
    k, v, k_new, v_new = cache()
    before = k.copy(), v.copy()
    q = rows(3, 1, heads=HEADS)
    same, used = update_cache(q, k, v, seqused_k=OLD, k_new=k_new, v_new=v_new)
    assert same is q and used.tolist() == [4, 9, CAPACITY]
    for found, old, new in zip((k, v), before, (k_new, v_new), strict=True):
        for b, n in enumerate(OLD):
            old[b, n : n + NEW] = new[b][: CAPACITY - n]
        np.testing.assert_array_equal(found, old)


def test_pages_packed_new_rows_and_an_index():
    """The same rows, wherever they lie and however they come."""
    k, v, k_new, v_new = cache()
    q = rows(3, 2, heads=HEADS)
    lengths = [1, 0, NEW]
    offsets = np.cumsum([0, *lengths])
    packed = [np.concatenate([x[b, :n] for b, n in enumerate(lengths)]) for x in (k_new, v_new)]
    expected = [
        attention_reference(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], seqused_k=OLD[b : b + 1],
            **({"k_new": k_new[b : b + 1, :n], "v_new": v_new[b : b + 1, :n]} if n else {}),
        )[0][0]
        for b, n in enumerate(lengths)
    ]  # fmt: skip
    new = {"k_new": packed[0], "v_new": packed[1], "cu_seqlens_k_new": offsets, "seqused_k": OLD}
    entries = np.array([2, 0, 1])
    shuffled = [np.empty_like(x) for x in (k, v)]
    for x, y in zip((k, v), shuffled, strict=True):
        y[entries] = x
    out, _ = attention_reference(q, *shuffled, kv_batch_idx=entries, **new)
    np.testing.assert_allclose(out, expected)
    table = rng.permutation(3 * CAPACITY // 4).reshape(3, -1)
    pools = [np.empty((3 * CAPACITY // 4, 4, HEADS_K, DIM)) for _ in "kv"]
    for pool, x in zip(pools, (k, v), strict=True):
        pool[table] = x.reshape(3, CAPACITY // 4, 4, HEADS_K, DIM)
    table[0, 1:] = -1  # behind the used pages
    out, _ = attention_reference(q, *pools, page_table=table, **new)
    np.testing.assert_allclose(out, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("columns", [DIM // 2, DIM // 4])
@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("starts", [None, np.array([7, 1, 30])], ids=["old", "given"])
def test_rotary_positions(interleaved, columns, mask, starts):
    k, v, k_new, v_new = cache()
    cos, sin, angles = tables(columns=columns)
    q = rows(3, 3, heads=HEADS)
    options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved, "seqlens_rotary": starts} | mask
    first = OLD if starts is None else starts
    keys = np.array([turned(k_new[b], n + np.arange(NEW), angles, interleaved) for b, n in enumerate(first)])
    step = np.arange(3) * bool(mask)
    queries = np.array([turned(q[b], n + step, angles, interleaved) for b, n in enumerate(first)])
    expected, _ = attention_reference(queries, k, v, seqused_k=OLD, k_new=keys, v_new=v_new, **mask)
    out, _ = attention_reference(q, k, v, seqused_k=OLD, k_new=k_new, v_new=v_new, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=["full", "causal"])
def test_queries_alone(mask):
    """Without new keys they are the last of their sequence, whatever the mask; positions before the first are it."""
    k, v, *_ = cache()
    cos, sin, angles = tables()
    q, used = rows(3, 2, heads=HEADS), np.array([1, 5, 21])
    positions = [[0, 0], [3, 4], [19, 20]]
    queries = np.array([turned(q[b], at, angles, False) for b, at in enumerate(positions)])
    k, v = np.nan_to_num(k), np.nan_to_num(v)
    expected, _ = attention_reference(queries, k, v, seqused_k=used, **mask)
    out, _ = attention_reference(q, k, v, seqused_k=used, rotary_cos=cos, rotary_sin=sin, **mask)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    packed, offsets = q.reshape(-1, HEADS, DIM), np.array([0, 2, 4, 6])
    out, _ = attention_reference(
        packed, k, v, cu_seqlens_q=offsets, seqused_k=used, rotary_cos=cos, rotary_sin=sin, **mask
    )
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-12)


def test_rotated_rows_have_the_type_of_the_cache():
    """As bits and as an element type of NumPy; what is not rotated keeps its bits, NaN's too."""
    cos, sin, angles = tables(columns=2)
    wide = rows(1, 1)
    wide[..., -1] = np.nan
    position = np.array([0])
    expected = turned(wide[0], position, angles, False)
    for k_new, exact in (
        (wide.astype(np.float16), turned(wide.astype(np.float16)[0].astype(float), position, angles, False)),
        (bf16_bits(wide), None),
    ):
        k, v = np.zeros((2, 1, 4, HEADS_K, DIM), k_new.dtype)
        used = np.array([0])
        update_cache(
            np.zeros((1, 1, HEADS, DIM), k_new.dtype), k, v, seqused_k=used, k_new=k_new, v_new=k_new, rotary_cos=cos,
            rotary_sin=sin,
        )  # fmt: skip
        assert np.array_equal(k[0, 0, :, 4:].view(np.uint16), k_new[0, 0, :, 4:].view(np.uint16))
        assert np.array_equal(v[0, :1].view(np.uint16), k_new[0].view(np.uint16))
        if exact is not None:
            np.testing.assert_array_equal(k[0, :1], exact.astype(np.float16))
        else:
            found = (k[0, :1].astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-6)


def fp8_cache(dtype=np.uint8):
    """(k, v) of zeros, and a descale of each sequence and head of either."""
    k, v = (np.zeros((3, CAPACITY, HEADS_K, DIM), dtype) for _ in "kv")
    return k, v, {f"{name}_descale": rng.uniform(0.005, 0.05, (3, HEADS_K)) for name in "kv"}


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e4m3fn])
def test_rows_of_more_bits_are_quantised(dtype):
    """As quantize_fp8 does it, saturated; new rows of FP8 are copied, whatever the descales."""
    k, v, descales = fp8_cache(dtype)
    k_new, v_new = (20 * rows(3, NEW).astype(ml_dtypes.bfloat16) for _ in "kv")
    q = rows(3, 1, heads=HEADS).astype(ml_dtypes.bfloat16)
    update_cache(q, k, v, seqused_k=OLD, k_new=k_new, v_new=v_new, **descales)
    for found, new, name in ((k, k_new, "k_descale"), (v, v_new, "v_descale")):
        expected, _ = quantize_fp8(new, descale=descales[name])
        for b, n in enumerate(OLD):
            count = min(NEW, CAPACITY - n)
            assert np.array_equal(found[b, n : n + count].view(np.uint8), expected[b, :count].view(np.uint8))
            assert not found[b, :n].view(np.uint8).any() and not found[b, n + count :].view(np.uint8).any()
        assert (np.abs(as_float(expected)) == 448).any(), "some are saturated"
        copied, stored = fp8_cache(dtype)[0], expected.view(dtype)
        update_cache(q, copied, copied.copy(), seqused_k=OLD, k_new=stored, v_new=stored, **descales)
        assert np.array_equal(copied.view(np.uint8), found.view(np.uint8))


def test_rotated_rows_are_quantised_from_what_they_were_before_rounding():
    k, v, descales = fp8_cache()
    k_new = rows(3, NEW).astype(np.float16)
    cos, sin, angles = tables()
    q = rows(3, 1, heads=HEADS).astype(np.float16)
    options = {"rotary_cos": cos, "rotary_sin": sin, "seqused_k": OLD, "k_new": k_new, "v_new": k_new}
    update_cache(q, k, v, **options, **descales)
    for b, n in enumerate(OLD):
        exact = turned(k_new[b].astype(float), n + np.arange(NEW), angles, False)
        quotient = exact.astype(np.float32) / descales["k_descale"][b, :, None].astype(np.float32)
        count = min(NEW, CAPACITY - n)
        assert np.array_equal(k[b, n : n + count], e4m3_bits(quotient)[:count])


def test_attention_sees_what_was_quantised():
    k, v, descales = fp8_cache()
    k_new, v_new, q = rows(3, NEW), rows(3, NEW), rows(3, 1, heads=HEADS)
    options = {"seqused_k": OLD, "k_new": k_new, "v_new": v_new, **descales}
    out, lse = attention_reference(q, k, v, **options)
    assert not k.any(), "copies are written"
    _, used = update_cache(q, k, v, **options)
    expected = attention_reference(q, k, v, seqused_k=used, **descales)
    assert np.array_equal(out, expected[0]) and np.array_equal(lse, expected[1])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_left_padding_does_not_exist(mask):
    """As a cache that begins behind it; NaN in it reaches nothing; a sequence of nothing else has no key."""
    k, v = rows(3, CAPACITY), rows(3, CAPACITY)
    q, used, pads = rows(3, 2, heads=HEADS), np.array([9, 5, 21]), np.array([0, 5, 8])
    for b, pad in enumerate(pads):
        k[b, :pad] = v[b, :pad] = np.nan
    out, lse = attention_reference(q, k, v, seqused_k=used, leftpad_k=pads, **mask)
    for b, (n, pad) in enumerate(zip(used, pads, strict=True)):
        expected = attention_reference(q[b : b + 1], k[b : b + 1, pad:n], v[b : b + 1, pad:n], **mask)
        np.testing.assert_allclose(out[b], expected[0][0], rtol=1e-12)
        np.testing.assert_allclose(lse[b], expected[1][0], rtol=1e-12)
    assert (lse[1] == -np.inf).all()


def test_left_padding_counts_in_the_numbers_of_keys():
    """Of a mask's columns."""
    k, v, q = rows(1, 6), rows(1, 6), rows(1, 1, heads=HEADS)
    mask = np.array([True, True, True, True, False, True])
    out, _ = attention_reference(q, k, v, leftpad_k=np.array([2]), attn_mask=mask)
    kept = [2, 3, 5]
    np.testing.assert_allclose(out, attention_reference(q, k[:, kept], v[:, kept])[0], rtol=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"v_new": None}, "come together"),
        ({"seqused_k": None}, "needs seqused_k"),
        ({"k_new": rows(3, NEW)[0]}, "k_new: must be"),
        ({"k_new": rows(2, NEW), "v_new": rows(2, NEW)}, "rows for each of 3 sequences"),
        ({"rotary_cos": np.ones((4, 4))}, "come together"),
        ({"rotary_cos": np.ones((4, 9)), "rotary_sin": np.ones((4, 9))}, "at most head_dim / 2"),
        ({"rotary_cos": np.ones((4, 4)), "rotary_sin": np.ones((4, 3))}, "rotary_dim / 2"),
        ({"leftpad_k": np.array([1, 2])}, "one entry for each"),
    ],
)
def test_what_does_not_fit(changes, words):
    k, v, k_new, v_new = cache()
    options = {"seqused_k": OLD, "k_new": k_new, "v_new": v_new} | changes
    with pytest.raises(ValueError, match=words):
        attention_reference(rows(3, 2, heads=HEADS), k, v, **options)
