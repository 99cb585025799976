"""attention() with softcap, sinks, slopes, masks, chunks and dropout: as params of `forward`, and in NumPy. No GPU."""

# ruff: noqa: F811
import ml_dtypes
import numpy as np
import pytest
from test_dlpack import OFFSETS, A, CAIArray, DLArray, dense, gpu, lengths, packed  # noqa: F401

from fa3_cute import DataType, FlashAttentionError, attention
from fa3_cute.contract.reference import attention_reference

FULL = (2, 4, 5, 9)  # of attn_mask, for dense()


def array(*shape, kind=DLArray, **facts):
    return kind(*shape, **{"dtype": "float32", **facts})


def flags(*shape, **facts):
    """Booleans, which have a byte each in DLPack and in the array interface."""
    return CAIArray(*shape, typestr="|b1", **facts)


# ---- on a device -----------------------------------------------------------------------------------------------------


def test_numbers_and_arrays_become_params(gpu):
    sinks, slopes, state = array(4, address=5 * A), array(4, address=6 * A), array(2, dtype="uint64", address=7 * A)
    attention(
        *dense(),
        softcap=30.0,
        s_aux=sinks,
        alibi_slopes=slopes,
        attention_chunk=8,
        dropout_p=0.25,
        rng_state=state,
        stream=0x5550,
    )
    p, _ = gpu.launches[0]
    assert (p.softcap, p.attention_chunk, p.p_dropout) == (30.0, 8, 0.25)
    assert (p.s_aux, p.alibi_slopes, p.rng_state, p.attn_mask) == (5 * A, 6 * A, 7 * A, None)
    assert (p.s_aux_dtype, p.alibi_batch_stride) == (DataType.FP32, 0)
    assert [each.asked for each in (sinks, slopes, state)] == [[0x5550]] * 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sinks_of_every_type(gpu, dtype):
    attention(*packed(), **OFFSETS, s_aux=array(4, dtype=dtype))
    p, _ = gpu.launches[0]
    wanted = {"float16": DataType.FP16, "bfloat16": DataType.BF16, "float32": DataType.FP32}
    assert p.s_aux == A and p.s_aux_dtype is wanted[dtype]


@pytest.mark.parametrize(
    "shape, strides, stride", [((4,), (1,), 0), ((2, 4), (4, 1), 4), ((2, 4), (48, 1), 48), ((2, 4), (0, 1), 0)]
)
def test_slopes_of_any_strides(gpu, shape, strides, stride):
    attention(*dense(), alibi_slopes=array(*shape, strides=strides))
    p, _ = gpu.launches[0]
    assert (p.alibi_slopes, p.alibi_batch_stride) == (A, stride)


MASKS = [
    (FULL, (180, 45, 9, 1), (180, 45, 9)),
    (FULL, (1000, 0, 16, 1), (1000, 0, 16)),
    ((5, 9), (9, 1), (0, 0, 9)),
    ((9,), (1,), (0, 0, 0)),
    ((2, 1, 1, 9), (9, 9, 9, 1), (9, 0, 0)),
    ((1, 4, 5, 9), (180, 45, 9, 1), (0, 45, 9)),
    ((4, 1, 9), (9, 77, 1), (0, 9, 0)),
]


@pytest.mark.parametrize("shape, strides, expected", MASKS)
@pytest.mark.parametrize("dtype", ["bool8", "uint8", "float16", "bfloat16", "float32"])
def test_masks_of_any_strides(gpu, shape, strides, expected, dtype):
    """Of stride 0 along what they are broadcast along."""
    if dtype == "bool8":
        mask = flags(*shape, strides=strides)
    else:
        mask = array(*shape, strides=strides, dtype=dtype)
    attention(*dense(), attn_mask=mask)
    p, _ = gpu.launches[0]
    wanted = {"float16": DataType.FP16, "bfloat16": DataType.BF16, "float32": DataType.FP32}
    assert (p.attn_mask, p.attn_mask_dtype) == (A, wanted.get(dtype))
    assert (p.attn_mask_batch_stride, p.attn_mask_head_stride, p.attn_mask_row_stride) == expected


def test_a_mask_of_pages_has_the_capacity(gpu):
    pool, pages = (DLArray(7, 16, 2, 64), DLArray(7, 16, 2, 64)), DLArray(2, 3, dtype="int32")
    cache = {"seqused_k": lengths(2), "page_table": pages}
    attention(dense()[0], *pool, **cache, attn_mask=flags(5, 48))
    with pytest.raises(FlashAttentionError, match=r"attn_mask.shape=\(5, 47\): must broadcast to \(2, 4, 5, 48\)"):
        attention(dense()[0], *pool, **cache, attn_mask=flags(5, 47))


REFUSED_DEVICE = [
    (-7, {"s_aux": array(3)}, r"s_aux.shape=\(3,\): must be \(4,\)"),
    (-7, {"s_aux": array(2, 4)}, r"s_aux.shape=\(2, 4\): must be \(4,\)"),
    (-9, {"s_aux": array(4, dtype="int32")}, "s_aux is int32: must be float16 or bfloat16 or float32"),
    (-7, {"s_aux": array(4, strides=(2,))}, "s_aux has the strides .*: the last dimension must be contiguous"),
    (-9, {"s_aux": array(4, place=(2, 1))}, "s_aux is on device 1: must be on device 0"),
    (-9, {"s_aux": array(4, address=A + 2)}, "s_aux=0x.*: must be a device address aligned to 4 bytes"),
    (-7, {"alibi_slopes": array(2, 3)}, r"alibi_slopes.shape=\(2, 3\): must be \(4,\) or \(2, 4\)"),
    (-9, {"alibi_slopes": array(4, dtype="float16")}, "alibi_slopes is float16: must be float32"),
    (-9, {"attn_mask": array(5, 9, dtype="int32")}, "attn_mask is int32: must be bool8 or uint8 or float16"),
    (-7, {"attn_mask": flags(5, 8)}, r"attn_mask.shape=\(5, 8\): must broadcast to \(2, 4, 5, 9\)"),
    (-7, {"attn_mask": flags(5, 1)}, r"attn_mask.shape=\(5, 1\): must broadcast .* all of the last dimension"),
    (-7, {"attn_mask": flags()}, r"attn_mask.shape=\(\): must broadcast"),
    (-7, {"attn_mask": flags(1, 2, 4, 5, 9)}, "attn_mask.shape=.*: must broadcast"),
    (-7, {"attn_mask": flags(9, 5, strides=(5, 1))}, "attn_mask.shape=.*: must broadcast"),
    (-7, {"attn_mask": flags(5, 9, strides=(1, 5))}, "attn_mask has the strides .*: the last dimension must be contig"),
    (-7, {"attn_mask": flags(5, 9, strides=(-9, 1))}, "attn_mask's row stride=-9: must be None .* or an int from 0"),
    (-7, {"alibi_slopes": array(2, 4, strides=(-4, 1))}, "^alibi_slopes's batch stride=-4: must be an int from 0 to"),
    (-7, {"alibi_slopes": array(2, 4, strides=(2**31, 1))}, "^alibi_slopes's batch stride=2147483648: must be an int"),
    (-9, {"alibi_slopes": array(4), "softmax_scale": 1e-30}, "^softmax_scale=1e-30: must be .* with alibi_slopes"),
    (-9, {"dropout_p": 0.5}, "rng_state=None: must be an array with dropout_p=0.5"),
    (-9, {"rng_state": array(2, dtype="uint64")}, "rng_state: must be None with dropout_p=0"),
    (-9, {"dropout_p": 1.0, "rng_state": array(2, dtype="uint64")}, "dropout_p=1.0: must be a number from 0"),
    (-7, {"dropout_p": 0.5, "rng_state": array(3, dtype="uint64")}, r"rng_state.shape=\(3,\): must be \(2,\)"),
    (-9, {"dropout_p": 0.5, "rng_state": array(2)}, "rng_state is float32: must be uint64 or int64"),
    (-11, {"softcap": -1.0}, "softcap=-1.0: must be 0"),
    (-9, {"attention_chunk": -1}, "attention_chunk=-1: must be an int from 0"),
]


@pytest.mark.parametrize("code, options, words", REFUSED_DEVICE)
def test_what_a_device_call_refuses(gpu, code, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*dense(), **options)
    assert caught.value.code == code and not gpu.launches


def test_masks_of_packed_queries_are_refused(gpu):
    with pytest.raises(NotImplementedError, match="attn_mask: must be None with cu_seqlens_q"):
        attention(*packed(), **OFFSETS, attn_mask=flags(7, 9))


def test_an_array_on_the_host_is_none_on_a_device(gpu):
    for name, value in (("s_aux", np.zeros(4, np.float32)), ("attn_mask", [[True]]), ("rng_state", (1, 2))):
        with pytest.raises((FlashAttentionError, TypeError), match=f"{name} "):
            attention(*dense(), **{name: value})


# ---- on the host -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(shape).astype(np.float16) for shape in ((2, 5, 4, 64), (2, 9, 2, 64), (2, 9, 2, 64)))
MASK = RNG.random(FULL) < 0.7
OPTIONS = [
    {"softcap": 2.0},
    {"softcap": np.float32(2)},
    {"s_aux": np.float32([0, 1, 2, -np.inf])},
    {"s_aux": np.array([0, 1, 2, 3], ml_dtypes.bfloat16)},
    {"alibi_slopes": RNG.random((2, 4)).astype(np.float32)},
    {"alibi_slopes": RNG.random(4)},
    {"attn_mask": MASK},
    {"attn_mask": MASK[0, 0].astype(np.uint8)},
    {"attn_mask": RNG.standard_normal((4, 1, 9)).astype(np.float16)},
    {"attn_mask": np.where(MASK, 0, -np.inf).astype(ml_dtypes.bfloat16)},
    {"attention_chunk": 4, "causal": True},
    {"dropout_p": 0.25, "rng_state": np.array([7, 2**63], np.uint64)},
    {"dropout_p": 0.25, "rng_state": np.array([-1, 3])},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_numpy_arrays_go_to_the_reference(options):
    out, lse = attention(Q, K, V, return_lse=True, **options)
    wanted = {{"dropout_p": "p_dropout"}.get(name, name): value for name, value in options.items()}
    exact, exact_lse = attention_reference(Q, K, V, **wanted)
    np.testing.assert_array_equal(out, exact.astype(np.float16))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    assert not np.array_equal(out, attention(Q, K, V, causal=options.get("causal", False)))


def test_a_signed_state_has_the_bits_of_an_unsigned_one():
    state = np.array([2**64 - 5, 12], np.uint64)
    outs = [attention(Q, K, V, dropout_p=0.5, rng_state=each) for each in (state, state.view(np.int64))]
    np.testing.assert_array_equal(*outs)


REFUSED_HOST = [
    (-7, {"s_aux": np.zeros(3)}, r"s_aux.shape=\(3,\): must be \(4,\)"),
    (-9, {"s_aux": np.zeros(4, int)}, "s_aux is int64: must be real numbers"),
    (-9, {"s_aux": np.zeros(4, complex)}, "s_aux is complex128: must be real numbers"),
    (-9, {"s_aux": np.zeros(4, ml_dtypes.float8_e4m3fn)}, "s_aux is float8_e4m3fn: must be real numbers"),
    (-9, {"alibi_slopes": np.zeros(4, bool)}, "alibi_slopes is bool: must be real numbers"),
    (-9, {"attn_mask": np.zeros((5, 9), int)}, "attn_mask is int64: must be bool, uint8 or real numbers"),
    (-7, {"attn_mask": np.zeros((5, 1))}, "must broadcast .* all of the last dimension"),
    (-9, {"attn_mask": np.ma.array(MASK)}, "attn_mask is a numpy.ma.*: must have no mask"),
    (-9, {"dropout_p": 0.5, "rng_state": np.zeros(2)}, "rng_state is float64: must be integers"),
    (-9, {"dropout_p": 0.5}, "rng_state=None: must be an array with dropout_p=0.5"),
    (-9, {"dropout_p": -0.5}, "dropout_p=-0.5: must be a number from 0"),
    (-11, {"softcap": float("nan")}, "softcap=nan: must be 0"),
    (-9, {"attention_chunk": 1.5}, "attention_chunk=1.5: must be an int"),
]


@pytest.mark.parametrize("code, options, words", REFUSED_HOST)
def test_what_a_host_call_refuses(code, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(Q, K, V, **options)
    assert caught.value.code == code


def test_masks_of_packed_queries_are_refused_on_the_host():
    with pytest.raises(NotImplementedError, match="attn_mask: must be None with cu_seqlens_q"):
        attention(Q[0], K[0], V[0], cu_seqlens_q=np.array([0, 5]), cu_seqlens_k=np.array([0, 9]), attn_mask=MASK[0])
