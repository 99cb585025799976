"""Number formats: FP16, BF16 and FP8 E4M3 in NumPy arrays, and rounding to them. NumPy only.

BF16 arrays are ml_dtypes.bfloat16 arrays, or uint16 arrays of the bits; FP8 arrays are ml_dtypes.float8_e4m3fn arrays,
or uint8 arrays of the bits. `as_float` reads them all, `to_bits` makes the bits.
"""

import numpy as np


def bf16_bits(values) -> np.ndarray:
    """The BF16 nearest to each value (ties to even), as uint16 bits; overflow gives inf, every NaN gives 0x7FFF."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    tie_to_even = (bits >> 16) & 1
    with np.errstate(over="ignore"):  # only NaN patterns wrap around, and they are replaced below
        rounded = ((bits + (0x7FFF + tie_to_even)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def as_float(array, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Any array that this module reads, as float32 or float64: uint16 is BF16 bits, uint8 is FP8 E4M3 bits."""
    array = np.asarray(array)
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif array.dtype == np.uint8:
        array = _E4M3_VALUES[array]
    return array.astype(dtype, copy=False)


def e4m3_bits(values) -> np.ndarray:
    """The FP8 E4M3 number nearest to each value (ties to even), as uint8 bits; every NaN gives 0x7F.

    Saturating, as the hardware's cvt.satfinite: what is beyond +-448, infinities too, becomes +-448.
    """
    return _E4M3_ROUNDED_BITS[_rounded_to_odd(values)]


def to_bits(values, dtype: str) -> np.ndarray:
    """Values rounded to `dtype` in the array a kernel's buffer holds: "fp16" float16, "bf16" uint16 bits, "fp8_e4m3"
    uint8 bits (saturated at +-448), "fp32" float32."""
    return {
        "fp16": lambda: np.asarray(values).astype(np.float16),
        "bf16": lambda: bf16_bits(values),
        "fp8_e4m3": lambda: e4m3_bits(values),
        "fp32": lambda: np.asarray(values, np.float32),
    }[dtype]()


def round_to(values, dtype: str) -> np.ndarray:
    """Values rounded to the nearest "fp16", "bf16" or "fp8_e4m3" number (ties to even), as float32."""
    return ROUND[dtype](np.asarray(values, np.float32))


def round_bf16(values: np.ndarray) -> np.ndarray:
    return as_float(bf16_bits(values))


def round_fp16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def round_e4m3(values: np.ndarray) -> np.ndarray:
    return _E4M3_ROUNDED[_rounded_to_odd(values)]


def _e4m3_values() -> np.ndarray:
    """The value of each of the 256 E4M3 bit patterns: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7F is NaN."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7))
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude]).astype(np.float32)


def _rounded_to_odd(values) -> np.ndarray:
    """The first 14 bits of float32 values, sign, exponent and 5 of the mantissa, the last one set if any behind it is.

    So they still tell what E4M3 with its 3 mantissa bits asks: which number is nearest, and whether it is a tie.
    """
    bits = np.asarray(values, np.float32).view(np.uint32)
    return bits >> 18 | ((bits & 0x3FFFF) != 0)


def _e4m3_rounded_bits() -> np.ndarray:
    """`e4m3_bits` of each of the 2^14 numbers of 14 bits: a look-up takes a fifth of the time of the arithmetic."""
    numbers = (np.arange(1 << 14, dtype=np.uint32) << 18).view(np.float32)
    saturated = np.fmin(np.abs(numbers), 448)  # NaN too, for now
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(saturated)[1] - 1, -6) - 3)
    magnitude = np.searchsorted(_E4M3_VALUES[:0x7F], np.rint(saturated / step) * step)
    return np.where(np.isnan(numbers), 0x7F, magnitude + 0x80 * np.signbit(numbers)).astype(np.uint8)


_E4M3_VALUES = _e4m3_values()
_E4M3_ROUNDED_BITS = _e4m3_rounded_bits()
_E4M3_ROUNDED = _E4M3_VALUES[_E4M3_ROUNDED_BITS]
ROUND = {"fp16": round_fp16, "bf16": round_bf16, "fp8_e4m3": round_e4m3, "fp32": lambda values: values}
