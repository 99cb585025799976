"""attention over NumPy arrays: the reference, rounded; and what it refuses. No GPU."""

from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from fa3_cute import FlashAttentionError, attention
from fa3_cute.contract.reference import attention_reference


def arrays(*shapes, dtype=np.float16):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


Q, K, V = arrays((2, 5, 4, 64), (2, 9, 2, 64), (2, 9, 2, 64))
PACKED_Q, PACKED_K, PACKED_V = arrays((7, 4, 64), (9, 2, 64), (9, 2, 64))
OFFSETS = {"cu_seqlens_q": np.array([0, 3, 5], np.int32), "cu_seqlens_k": np.array([0, 0, 9], np.int32)}
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    "qkv, options, result",
    [
        ((Q, K, V), {}, np.float16),
        ((Q, K, V), {"causal": True, "softmax_scale": 0.3, "num_splits": 1}, np.float16),
        ((Q, K, V), {"window_size": (2, 1), "seqused_k": np.array([4, 0], np.int32)}, np.float16),
        ((Q[:, :0], K, V), {}, np.float16),
        ((Q.astype(np.float32), K.astype(np.float32), V.astype(np.float32)), {}, np.float32),
        ([x.astype(ml_dtypes.bfloat16) for x in (Q, K, V)], {}, ml_dtypes.bfloat16),
        (
            [x.astype(E4M3) for x in (Q, K, V)],
            {"q_descale": np.float32([[2], [3]]), "v_descale": 0.5},
            ml_dtypes.bfloat16,
        ),
        ([x.astype(E4M3).view(np.uint8) for x in (Q, K, V)], {"dtype": "float8_e4m3fn"}, ml_dtypes.bfloat16),
        (
            [x.astype(E4M3) for x in (Q, K, V)],
            {
                "dtype": "float8_e4m3fn",
                "k_descale": np.float32([3, 5]),
                "q_descale": np.full((2, 4), 0.25, np.float32)[::-1],
                "v_descale": np.float32(2),
            },
            ml_dtypes.bfloat16,
        ),
        (
            [x.astype(E4M3) for x in (PACKED_Q, PACKED_K, PACKED_V)],
            {**OFFSETS, "v_descale": np.float32([[2, 4], [1, 3]])},
            ml_dtypes.bfloat16,
        ),
        ((PACKED_Q, PACKED_K, PACKED_V), {**OFFSETS, "causal": True}, np.float16),
    ],
)
def test_attention_is_the_reference_rounded(qkv, options, result):
    out, lse = attention(*qkv, return_lse=True, **options)
    exact, exact_lse = attention_reference(
        *qkv, **{name: value for name, value in options.items() if name not in ("dtype", "num_splits")}
    )
    assert out.dtype == result and lse.dtype == np.float32
    # As float64: where no sequence uses a row it is NaN, which NumPy does not know in other libraries' types.
    np.testing.assert_array_equal(out.astype(np.float64), exact.astype(result).astype(np.float64))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    np.testing.assert_array_equal(attention(*qkv, **options).astype(np.float64), out.astype(np.float64))


def test_attention_writes_out_in_place_and_no_row_beyond_the_sequences():
    out = np.full_like(PACKED_Q, 7)
    assert attention(PACKED_Q, PACKED_K, PACKED_V, out=out, **OFFSETS) is out
    np.testing.assert_array_equal(out[:5], attention(PACKED_Q, PACKED_K, PACKED_V, **OFFSETS)[:5])
    assert (out[:3] == 0).all() and (out[5:] == 7).all()


FP8 = [x.astype(E4M3) for x in (Q, K, V)]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("qkv, options", [(FP8, {}), ([x.view(np.uint8) for x in FP8], {"dtype": "float8_e4m3fn"})])
def test_a_given_out_says_what_fp8_gives(dtype, qkv, options):
    """FP8 values, whatever the arrays are called, and O in one of the two 16-bit types."""
    out = np.zeros(Q.shape, dtype)
    assert attention(*qkv, out=out, **options, v_descale=3.0) is out
    exact, _ = attention_reference(*(x.astype(np.float64) for x in FP8))
    np.testing.assert_array_equal(out, (3.0 * exact).astype(dtype))


class DeviceArray:
    __cuda_array_interface__ = {}


REFUSED = [
    (-9, (Q, DeviceArray(), V), {}, "k is a .*DeviceArray: must be a NumPy array, as q is"),
    (-9, (Q, K, V), {"out": DeviceArray()}, "out is a .*DeviceArray"),
    (-9, (Q, K, V), {"out": np.broadcast_to(Q, Q.shape)}, "out is a read-only array"),
    (-16, (Q, K, V), {"num_splits": 4}, "num_splits=4: must be 0 or 1"),
    (-13, (Q, K, V), {"num_splits": 257}, "num_splits=257"),
    (-9, (Q, K, V), {"stream": 7}, "stream=7: must be None"),
    (-9, (Q, K, V), {"softmax_scale": -1.0}, "softmax_scale=-1.0"),
    (-9, (Q, K, V), {"window_size": 3}, "window_size=3: must be a pair"),
    (-9, (Q, K.astype(np.float32), V), {}, "float16, float32, float16 of q, k, v"),
    (-9, (Q, K, V), {"dtype": "bfloat16"}, "dtype='bfloat16' with arrays of float16"),
    (-9, [x.astype(np.int32) for x in (Q, K, V)], {}, "arrays of int32"),
    (-9, (Q, K, V), {"q_descale": 2.0}, "q_descale: must be None .*FP8_E4M3"),
    (-9, [x.view(np.uint8) for x in FP8], {}, "dtype=None with arrays of uint8"),
    (
        -9,
        [FP8[0], *(x.view(np.uint8) for x in FP8[1:])],
        {"dtype": "float8_e4m3fn"},
        "float8_e4m3fn, uint8, uint8 of q, k, v",
    ),
    (-9, [x.astype(ml_dtypes.float8_e5m2) for x in FP8], {}, "arrays of float8_e5m2"),
    (-9, FP8, {"out": np.empty(Q.shape, E4M3)}, "out is float8_e4m3fn.*must be bfloat16 or float16"),
    (-7, FP8, {"k_descale": np.ones((2, 4), np.float32)}, r"k_descale.shape=\(2, 4\): must broadcast to .* = \[2, 2\]"),
    (-3, [np.zeros((1, 3, 1, 200), E4M3)] * 3, {}, "head_dim=200: must be a multiple of 16 from 16 to 256"),
    (-9, (Q, K, V), {"out": np.empty(Q.shape, np.float64)}, "out is float64.*must be float16 or float32"),
    (
        -7,
        (Q, K, V),
        {"out": np.empty((2, 64), np.float16)},
        r"out is float16\[2, 64\]: must be float16 or float32\[2, 5, 4, 64\]",
    ),
    (-7, (Q[0], K, V), {}, r"q.shape=\(5, 4, 64\)"),
    (-7, (Q, K, V[:, :3]), {}, "k and v alike"),
    (-7, (Q, K, V), {"seqused_k": np.array([4, 10])}, r"seqused_k \[4, 10\]: .*one entry per sequence"),
    (-7, (Q, K, V), {"seqused_k": np.array([4, -1])}, r"seqused_k \[4, -1\]"),
    (-7, (Q, K, V), {"seqused_k": np.array([4])}, r"seqused_k \[4\]"),
    (-7, (Q, K, V), {"seqused_k": np.array([[4], [9]])}, r"seqused_k.shape=\(2, 1\): must have one dimension"),
    (-7, (Q, K, V), {"seqused_k": np.array(4)}, r"seqused_k.shape=\(\): must have one dimension"),
    (-9, (Q, K, V), {"seqused_k": np.array([4.0, 9.0])}, "seqused_k is float64: must be integers"),
    (-9, (Q, K, V), {"seqused_k": np.array([4j, 9])}, "seqused_k is complex128: must be integers"),
    (-9, (Q, K, V), {"seqused_k": np.array([True, True])}, "seqused_k is bool: must be integers"),
    (-9, (Q, K, V), {"return_lse": np.zeros(2)}, "return_lse=array.*: must be True or False"),
    (-9, (Q, K, V), {"causal": np.array(True)}, "causal=array.*: must be True or False"),
    (-9, (Q, K, V), {"dtype": np.zeros(2)}, "dtype=array.* with arrays of float16"),
    (-9, FP8, {"k_descale": np.ones(2, np.complex64)}, "k_descale is complex64: must be real numbers"),
    (-9, FP8, {"k_descale": np.array(["1", "2"])}, "k_descale is str.*: must be real numbers"),
    (-6, (PACKED_Q, PACKED_K, PACKED_V), {"cu_seqlens_q": OFFSETS["cu_seqlens_q"]}, "cu_seqlens_k=None: .* an array"),
    *(
        (-7, (PACKED_Q, PACKED_K, PACKED_V), OFFSETS | {name: np.array(offsets, kind)}, f"{name} must never fall")
        for name, kind, offsets in (
            ("cu_seqlens_q", np.uint32, [0, 5, 3]),
            ("cu_seqlens_q", np.uint64, [0, 2**64 - 1, 7]),
            ("cu_seqlens_k", np.uint8, [0, 9, 8]),
            ("cu_seqlens_k", np.int64, [0, 9, 10]),
            ("cu_seqlens_k", np.int64, [-1, 9, 9]),
        )
    ),
    *(
        (-9, (PACKED_Q, PACKED_K, PACKED_V), OFFSETS | {name: array.astype(kind)}, f"{name} is .*: must be integers")
        for kind in (float, complex)
        for name, array in OFFSETS.items()
    ),
    (
        -7,
        (PACKED_Q, PACKED_K, PACKED_V),
        OFFSETS | {"cu_seqlens_q": OFFSETS["cu_seqlens_q"][:, None]},
        r"cu_seqlens_q.shape=\(3, 1\): must have one dimension",
    ),
    (-9, (np.ma.array(Q), K, V), {}, "q is a numpy.ma.*MaskedArray: must have no mask"),
    (-9, (Q, np.ma.masked_invalid(K), V), {}, "k is a numpy.ma.*MaskedArray: must have no mask"),
    *(
        (-9, qkv, options | {name: np.ma.array(array)}, f"{name} is a numpy.ma.*MaskedArray: must have no mask")
        for qkv, options, name, array in (
            ((Q, K, V), {}, "out", Q),
            ((Q, K, V), {}, "seqused_k", np.array([4, 0])),
            ((PACKED_Q, PACKED_K, PACKED_V), OFFSETS, "cu_seqlens_k", OFFSETS["cu_seqlens_k"]),
            (FP8, {}, "v_descale", np.ones(2, np.float32)),
        )
    ),
    (
        -5,
        (Q, K, V),
        {"causal": True, "window_size": (4, -1)},
        r"window_size\[0\]=4: must be negative .* with causal=True",
    ),
    (-4, (Q[:, :, :3], K, V), {}, "num_heads=3: must be a multiple of num_heads_k=2"),
    (-2, (Q[..., :44], K[..., :44], V[..., :44]), {}, "head_dim=44"),
]


@pytest.mark.parametrize("code, qkv, options, words", REFUSED)
def test_attention_refuses(code, qkv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*qkv, **options)
    assert caught.value.code == code


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_lengths_of_any_integers(kind):
    """Unsigned ones too, whose differences never are negative."""
    offsets = {name: array.astype(kind) for name, array in OFFSETS.items()} | {"seqused_k": np.array([0, 4], kind)}
    wanted = attention(PACKED_Q, PACKED_K, PACKED_V, **OFFSETS, seqused_k=np.array([0, 4]))
    np.testing.assert_array_equal(attention(PACKED_Q, PACKED_K, PACKED_V, **offsets), wanted)


def test_no_keys_at_all():
    """Packed sequences without a key: rows of 0, LSE of -inf."""
    out, lse = attention(
        PACKED_Q[:5],
        PACKED_K[:0],
        PACKED_V[:0],
        cu_seqlens_q=OFFSETS["cu_seqlens_q"],
        cu_seqlens_k=np.zeros(3, np.int32),
        return_lse=True,
    )
    assert (out == 0).all() and (lse == -np.inf).all() and out.shape == (5, 4, 64)


@pytest.mark.parametrize("scale", [Fraction(1, 4), Decimal("0.25"), np.float16(0.25), np.float64(0.25)])
def test_a_scale_of_any_kind_of_number(scale):
    """And a mask: what forward reads them as is what is computed here."""
    found = attention(Q, K, V, softmax_scale=scale, causal=np.True_, num_splits=np.int8(1))
    np.testing.assert_array_equal(found, attention(Q, K, V, softmax_scale=0.25, causal=True))


@pytest.mark.parametrize(
    "qkv, options",
    [((Q.tolist(), K, V), {}), ((Q, K, None), {}), ((Q, K, V), {"q_descale": "1"}), ((Q, K, V), {"seqused_k": [1, 2]})],
)
def test_attention_of_no_array(qkv, options):
    with pytest.raises(TypeError, match="must be an? (NumPy )?array"):
        attention(*qkv, **options)
