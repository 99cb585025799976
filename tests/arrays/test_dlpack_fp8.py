"""attention over FP8 arrays on a device, and their descales, on the stand-ins of test_dlpack.py. No GPU."""

# ruff: noqa: F811
import pytest
from test_dlpack import OFFSETS, A, CAIArray, DLArray, K, OldDLArray, Q, Stubborn, V, dense, gpu, packed  # noqa: F401

from fa3_cute import DataType, FlashAttentionError, api, attention

FP8 = DataType.FP8_E4M3
BYTES = {"dtype": "float8_e4m3fn"}  # what uint8 arrays hold


@pytest.mark.parametrize(
    "qkv, options",
    [
        (dense(dtype="float8_e4m3fn"), {}),
        (dense(dtype="float8_e4m3fn"), BYTES),
        (dense(dtype="uint8"), BYTES),
        (dense(OldDLArray, dtype="float8_e4m3fn"), {}),
        (dense(OldDLArray, dtype="uint8"), BYTES),
        (dense(CAIArray, typestr="|u1"), BYTES),
    ],
    ids=["FP8", "FP8 said twice", "bytes", "old FP8", "old bytes", "CAI"],
)
def test_fp8_arrays(gpu, qkv, options):
    out = attention(*qkv, **options)
    p, _ = gpu.launches[0]
    assert (p.dtype, p.out_dtype, out.dtype, out.shape) == (FP8, None, "bfloat16", (2, 5, 4, 64))
    assert gpu.allocated == [(2 * 5 * 4 * 64 * 2, 0, 0)]
    assert (p.q_descale_ptr, p.k_descale_ptr, p.v_descale_ptr) == (None, None, None)


@pytest.mark.parametrize("dtype, out_dtype", [("bfloat16", DataType.BF16), ("float16", DataType.FP16)])
def test_a_given_out_says_what_fp8_gives(gpu, dtype, out_dtype):
    out = DLArray(2, 5, 4, 64, dtype=dtype)
    assert attention(*dense(dtype="uint8"), **BYTES, out=out) is out
    p, _ = gpu.launches[0]
    assert (p.dtype, p.out_dtype) == (FP8, out_dtype) and gpu.allocated == []


def test_strides_of_fp8_bytes_are_elements(gpu):
    """Both protocols, one in bytes and one in elements: the same for 1-byte elements."""
    for kind in (DLArray, CAIArray):
        steps = {"strides": (1280, 64, 320, 1)} | ({"typestr": "|u1"} if kind is CAIArray else {"dtype": "uint8"})
        attention(kind(2, 5, 4, 64, **steps), *dense(dtype="uint8")[1:], **BYTES)
        p, _ = gpu.launches.pop()
        assert (p.q_batch_stride, p.q_row_stride, p.q_head_stride) == (1280, 64, 320)


@pytest.mark.parametrize(
    "shape, strides, expected",
    [
        ((), (), (0, 0)),
        ((1,), (1,), (0, 0)),
        ((1, 1), (9, 9), (0, 0)),
        ((4,), (3,), (0, 3)),
        ((4,), (0,), (0, 0)),
        ((1, 4), (7, 2), (0, 2)),
        ((2, 1), (5, 1), (5, 0)),
        ((2, 4), (4, 1), (4, 1)),
        ((2, 4), (1, 2), (1, 2)),
    ],
)
@pytest.mark.parametrize("kind", [DLArray, CAIArray])
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_descales(gpu, name, kind, shape, strides, expected):
    """Of four query heads and two KV heads; the two strides are those of the sequence and of the head."""
    shape = tuple(2 if size == 4 and name != "q_descale" else size for size in shape)
    facts = (
        {"dtype": "float32", "strides": strides}
        if kind is DLArray
        else {"typestr": "<f4", "strides": tuple(4 * stride for stride in strides)}
    )
    attention(*dense(dtype="uint8"), **BYTES, **{name: kind(*shape, address=9 * A, **facts)})
    p, _ = gpu.launches[0]
    assert tuple(getattr(p, f"{name}_{what}") for what in ("ptr", "batch_stride", "head_stride")) == (9 * A, *expected)
    assert api.kernel_config(p).element_out == "bf16"


def test_descales_of_packed_sequences(gpu):
    """Their batch is the number of sequences."""
    attention(
        *packed(dtype="float8_e4m3fn"),
        **OFFSETS,
        q_descale=DLArray(2, 4, dtype="float32"),
        v_descale=DLArray(2, 1, dtype="float32", strides=(6, 1)),
    )
    p, _ = gpu.launches[0]
    assert (p.q_descale_batch_stride, p.q_descale_head_stride) == (4, 1)
    assert (p.v_descale_batch_stride, p.v_descale_head_stride, p.k_descale_ptr) == (6, 0, None)


def test_descales_of_no_sequences(gpu):
    """[0, heads] beside tensors of no batch: nothing to launch, and no complaint."""
    q, k, v = (DLArray(0, 5, heads, 64, dtype="uint8", address=0) for heads in (4, 2, 2))
    out = attention(q, k, v, **BYTES, q_descale=DLArray(0, 4, dtype="float32", address=0))
    assert (out.shape, out.dtype, gpu.launches) == ((0, 5, 4, 64), "bfloat16", [])


REFUSED = [
    (-9, dense(dtype="uint8"), {}, "dtype=None with arrays of uint8: must be .*'float8_e4m3fn' with arrays of uint8"),
    (-9, dense(CAIArray, typestr="|i1"), BYTES, "dtype='float8_e4m3fn' with arrays of int8"),
    (-9, dense(dtype="float8_e5m2"), {}, "dtype=None with arrays of float8_e5m2"),
    (-9, dense(dtype="float8_e4m3fnuz"), BYTES, "with arrays of float8_e4m3fnuz"),
    (
        -9,
        (DLArray(2, 5, 4, 64, dtype="float8_e4m3fn"), *dense(dtype="uint8")[1:]),
        BYTES,
        "dtypes float8_e4m3fn, uint8, uint8 of q, k, v: must be the same",
    ),
    (-9, (Q, K, V), BYTES, "dtype='float8_e4m3fn' with arrays of float16"),
    (
        -9,
        dense(Stubborn, dtype="torch.float8_e4m3fn", words="not in dlpack"),
        {},
        "q is a .*Stubborn .*DLPack: not in dlpack; view it as uint8 and say dtype='float8_e4m3fn'",
    ),
    (
        -9,
        dense(dtype="uint8"),
        {**BYTES, "out": DLArray(2, 5, 4, 64, dtype="uint8")},
        "out is uint8: must be bfloat16 or float16",
    ),
    (
        -9,
        dense(dtype="uint8"),
        {**BYTES, "q_descale": DLArray(4, dtype="float16")},
        "q_descale is float16: must be float32",
    ),
    (
        -9,
        dense(dtype="uint8"),
        {**BYTES, "q_descale": DLArray(dtype="float32", address=A + 2)},
        "q_descale=0x7f0000000002: must be a device address aligned to 4 bytes",
    ),
    (
        -9,
        dense(dtype="uint8"),
        {**BYTES, "k_descale": DLArray(2, dtype="float32", place=(2, 1))},
        "k_descale is on device 1",
    ),
    (
        -7,
        dense(dtype="uint8"),
        {**BYTES, "k_descale": DLArray(2, 4, dtype="float32")},
        r"k_descale.shape=\(2, 4\): must be \(\), \(2,\), \(2, 1\) or \(2, 2\)",
    ),
    (-7, dense(dtype="uint8"), {**BYTES, "q_descale": DLArray(4, 2, dtype="float32")}, r"q_descale.shape=\(4, 2\)"),
    (-7, dense(dtype="uint8"), {**BYTES, "q_descale": DLArray(2, 4, 1, dtype="float32")}, "q_descale.shape="),
    (-7, dense(dtype="uint8"), {**BYTES, "q_descale": DLArray(0, 4, dtype="float32")}, r"q_descale.shape=\(0, 4\)"),
    (-7, dense(dtype="uint8", strides=(5120, 520, 64, 1)), BYTES, "q's row stride=520: .*multiple of 16 elements"),
    (-3, [DLArray(2, 9, 2, 200, dtype="uint8")] * 3, BYTES, "head_dim=200: must be a multiple of 16 from 16 to 256"),
]


@pytest.mark.parametrize("code, qkv, options, words", REFUSED)
def test_refusals_enqueue_and_allocate_nothing(gpu, code, qkv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*qkv, **options)
    assert caught.value.code == code
    assert gpu.launches == gpu.allocated == []


@pytest.mark.parametrize("dtype, data_type", [("bfloat16", DataType.BF16), ("float16", DataType.FP16)])
@pytest.mark.parametrize("keys, options", [("float8_e4m3fn", {}), ("float8_e4m3fn", BYTES), ("uint8", BYTES)])
def test_fp8_keys_of_16_bit_queries(gpu, dtype, data_type, keys, options):
    q, descale = DLArray(2, 5, 4, 64, dtype=dtype), DLArray(2, 2, dtype="float32")
    out = attention(q, *dense(dtype=keys)[1:], **options, k_descale=descale, v_descale=descale)
    p, _ = gpu.launches[0]
    assert (p.dtype, p.kv_dtype, p.out_dtype, out.dtype) == (data_type, FP8, None, dtype)
    assert p.k_descale_ptr and (p.k_descale_batch_stride, p.v_descale_head_stride) == (2, 1)
