"""Number formats, and the low-precision twin: rounded where a kernel must round, and nowhere else."""

import math

import ml_dtypes
import numpy as np
import pytest

from fa3_cute.contract.reference import as_float, attention_reference, bf16_bits, low_precision_twin, round_to, to_bits

INF = math.inf
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def one_head(rows):
    """[[...], ...] as a tensor [1, rows, 1, head_dim]."""
    return np.array(rows, np.float64)[None, :, None, :]


def float32_samples():
    """Random bit patterns of float32, every BF16 and the midpoints between neighbours, with their neighbours."""
    every_bf16 = np.arange(2**16, dtype=np.uint32) << 16
    bits = [every_bf16 + offset for offset in (0, 0x7FFF, 0x8000, 0x8001)]
    bits.append(np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint32))
    return np.concatenate(bits).view(np.float32)


def test_bf16_bits_match_ml_dtypes():
    values = float32_samples()
    is_nan = np.isnan(values)
    with np.errstate(all="ignore"):
        expected = values.astype(BF16).view(np.uint16)
    np.testing.assert_array_equal(bf16_bits(values)[~is_nan], expected[~is_nan])
    assert np.isnan(as_float(bf16_bits(values)[is_nan])).all()


def around_e4m3():
    """Every E4M3 number, the midpoints between neighbours, and the float32 numbers next to them."""
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    return np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (INF, -INF))])


@pytest.mark.parametrize("samples", [float32_samples, around_e4m3])
def test_e4m3_bits_match_ml_dtypes(samples):
    """Beyond 448 they saturate, where ml_dtypes gives NaN; the sign of a zero is kept, that of a NaN is not."""
    values = samples()
    is_nan = np.isnan(values)
    with np.errstate(all="ignore"):
        expected = np.clip(values, -448, 448).astype(E4M3)
    bits = to_bits(values, "fp8_e4m3")
    assert bits.dtype == np.uint8 and (bits[is_nan] == 0x7F).all()
    np.testing.assert_array_equal(bits[~is_nan], expected.view(np.uint8)[~is_nan])
    np.testing.assert_array_equal(round_to(values, "fp8_e4m3"), expected.astype(np.float32))


def test_e4m3_bits_by_hand():
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        448.0,
        449.0,
        1e30,
        INF,
        -INF,
        math.nan,
        -math.nan,
        2.0**-9,
        2.0**-10,
        3 * 2.0**-10,
        17.0,
        19.0,
    ]  # the last two are ties, of 16 and 18, and of 18 and 20
    assert to_bits(values, "fp8_e4m3").tolist() == [
        0x00,
        0x80,
        0x38,
        0xB8,
        0x7E,
        0x7E,
        0x7E,
        0x7E,
        0xFE,
        0x7F,
        0x7F,
        0x01,
        0x00,
        0x02,
        0x58,
        0x5A,
    ]
    assert round_to([1e9, -500.0], "fp8_e4m3").tolist() == [448, -448]


def test_e4m3_bits_of_any_array():
    """Of any shape and strides; the bits of a bit pattern's value are that pattern."""
    patterns = np.delete(np.arange(256, dtype=np.uint8), (0x7F, 0xFF))
    np.testing.assert_array_equal(to_bits(as_float(patterns), "fp8_e4m3"), patterns)
    square = np.random.default_rng(9).standard_normal((6, 8))
    np.testing.assert_array_equal(to_bits(square.T[::2], "fp8_e4m3"), square.T[::2].astype(E4M3).view(np.uint8))
    assert to_bits(np.zeros((2, 0)), "fp8_e4m3").shape == (2, 0) and to_bits(-2.0, "fp8_e4m3") == 0xC0


def test_every_bit_pattern_reads_as_its_value():
    bf16, e4m3 = np.arange(2**16, dtype=np.uint16), np.arange(2**8, dtype=np.uint8)
    np.testing.assert_array_equal(as_float(bf16), bf16.view(BF16).astype(np.float32))
    np.testing.assert_array_equal(as_float(e4m3), e4m3.view(E4M3).astype(np.float32))


@pytest.mark.parametrize("dtype, ml_dtype", [("bf16", BF16), ("fp16", np.float16), ("fp8_e4m3", E4M3)])
def test_bits_and_typed_arrays_are_the_same_input(dtype, ml_dtype):
    q, k, v = np.random.default_rng(6).standard_normal((3, 1, 9, 2, 16))
    typed, bits = ([x.astype(ml_dtype) for x in (q, k, v)], [to_bits(x, dtype) for x in (q, k, v)])
    for a, b in zip(attention_reference(*typed), attention_reference(*bits), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "dtype, ulp, out_dtype",
    [
        ("fp16", 2**-11, None),
        ("bf16", 2**-8, None),
        ("fp8_e4m3", 2**-4, None),
        ("fp8_e4m3", 2**-4, "bf16"),
        ("fp8_e4m3", 2**-4, "fp16"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_twin_error_is_what_the_format_explains(dtype, ulp, out_dtype, options):
    """Errors of the order of one rounding of P and one of O: not zero, not many; LSE is not rounded at all."""
    q, k, v = (round_to(x, dtype) for x in np.random.default_rng(7).standard_normal((3, 2, 200, 2, 64)))
    ref, ref_lse = attention_reference(q, k, v, **options)
    rounding = {"out_dtype": out_dtype} if out_dtype else {}
    twin, twin_lse = low_precision_twin(q, k, v, dtype, **rounding, **options)
    error = np.abs(twin - ref)
    assert 0 < error.max() <= 2 * ulp * np.abs(ref).max()
    assert error.mean() <= ulp * np.abs(ref).mean()
    np.testing.assert_allclose(twin_lse, ref_lse, atol=2e-6)
    element_out = out_dtype or ("bf16" if dtype == "fp8_e4m3" else dtype)
    np.testing.assert_array_equal(twin, round_to(twin, element_out))
    other = "fp16" if element_out == "bf16" else "bf16"
    assert (twin != round_to(twin, other)).any()


def test_twin_of_fp8_differs_by_o_alone():
    """O in FP16 and in BF16 are two roundings of one FP32 number, to 11 bits and to 8."""
    q, k, v = (round_to(x, "fp8_e4m3") for x in np.random.default_rng(10).standard_normal((3, 1, 90, 2, 64)))
    bf16, fp16 = (low_precision_twin(q, k, v, "fp8_e4m3", out_dtype=out_dtype)[0] for out_dtype in ("bf16", "fp16"))
    np.testing.assert_allclose(bf16, fp16, rtol=2**-8 + 2**-11, atol=2**-25)
    assert (bf16 != fp16).any()
    fp32, _ = low_precision_twin(q, k, v, "fp8_e4m3", out_dtype="fp32")
    np.testing.assert_array_equal(round_to(fp32, "bf16"), bf16)
    with pytest.raises(KeyError):
        low_precision_twin(q, k, v, "fp8_e4m3", out_dtype="fp64")


@pytest.mark.parametrize(
    "p, rounded",
    [
        (1.1 * 2.0**-13, 1.125 * 2.0**-13),
        (2.0**-17, 2.0**-17),
        (1.6 * 2.0**-17, 2.0**-16),
        (1.1 * 2.0**-18, 2.0**-17),
        (0.9 * 2.0**-18, 0.0),
    ],
)
def test_twin_of_fp8_rounds_256_times_p(p, rounded):
    """So that P relative to the row maximum is lost below 2^-18 only, not below 2^-10. O = P / (1 + P), which is P."""
    q, k, v = one_head([[1.0]]), one_head([[0.0], [-1.0]]), one_head([[0.0], [1.0]])
    out, _ = low_precision_twin(q, k, v, "fp8_e4m3", softmax_scale=-math.log(p))
    assert out.item() == rounded


@pytest.mark.parametrize("dtype, expected", [("fp16", 1891 / 8192), ("bf16", 237 / 1024), ("fp8_e4m3", 246 / 1024)])
def test_twin_rounds_p_but_not_the_row_sum(dtype, expected):
    """P = (1, 0.3), V = (0, 1). P in FP16 0.30005, BF16 0.30078, FP8 80 / 256; O = P / 1.3, rounded in its turn."""
    q, k, v = one_head([[1.0]]), one_head([[0.0], [-1.0]]), one_head([[0.0], [1.0]])
    out, _ = low_precision_twin(q, k, v, dtype, softmax_scale=-math.log(0.3))
    assert out.item() == expected


def test_twin_of_a_single_key_is_its_value():
    q, k, v = (to_bits(x, "bf16") for x in np.random.default_rng(8).standard_normal((3, 1, 1, 1, 64)))
    np.testing.assert_array_equal(low_precision_twin(q, k, v, "bf16")[0], as_float(v, np.float64))
