"""attention() of 512 columns of v: q_v, and MLA's v in k; on the host as on a device, on stand-ins. No GPU."""

# ruff: noqa: F811
import numpy as np
import pytest
from test_dlpack import A, OFFSETS, DLArray, gpu  # noqa: F401

from fa3_cute import FlashAttentionError, attention
from fa3_cute.contract.reference import attention_reference

RNG = np.random.default_rng(9)
WHOLE, LATENT = (RNG.standard_normal((2, n, h, 576)).astype(np.float32) for n, h in ((3, 4), (9, 1)))
Q, Q_V, K, V = WHOLE[..., 512:], WHOLE[..., :512], LATENT[..., 512:], LATENT[..., :512]
USED = np.array([7, 9], np.int32)
PAGES = {"page_table": np.array([[1, 0], [2, 1]], np.int32), "seqused_k": np.array([12, 16], np.int32)}
PACKED = {name: np.array(rows, np.int32) for name, rows in (("cu_seqlens_q", [0, 1, 3]), ("cu_seqlens_k", [0, 4, 9]))}

# Of a device.
DEVICE = DLArray(2, 3, 4, 64), DLArray(2, 9, 1, 64), DLArray(2, 9, 1, 512)
SECOND = DLArray(2, 3, 4, 512, address=A + 4096)


# ---- the host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"seqused_k": USED, "softmax_scale": 0.1}], ids=str)
def test_scores_are_of_both_parts(options):
    """As of one part; the default scale is that of 576 columns."""
    out, lse = attention(Q, K, V, q_v=Q_V, return_lse=True, **options)
    expected, lse_of_it = attention_reference(WHOLE, LATENT, V, **options)
    assert out.shape == (2, 3, 4, 512) and out.dtype == np.float32
    assert np.allclose(out, expected, atol=1e-5) and np.allclose(lse, lse_of_it, atol=1e-5)


def test_packed_and_in_pages():
    packed = [x[0] for x in (Q, K, V, Q_V)]
    out = attention(*packed[:3], q_v=packed[3], **PACKED)
    expected, _ = attention_reference(WHOLE[0], LATENT[0], V[0], **PACKED)
    assert np.allclose(out, expected, atol=1e-5)
    pool = RNG.standard_normal((3, 8, 1, 576)).astype(np.float32)
    out = attention(Q, pool[..., 512:], pool[..., :512], q_v=Q_V, causal=True, **PAGES)
    expected, _ = attention_reference(WHOLE, pool, pool[..., :512], causal=True, **PAGES)
    assert np.allclose(out, expected, atol=1e-5)


# ---- what both refuse ------------------------------------------------------------------------------------------------

WORDS = [  # (columns of q, of v, those of q_v, options, status, words)
    (64, 512, (2, 2, 4, 512), {}, -7, r"q_v.shape=\(2, 2, 4, 512\): must be \(2, 3, 4, 512\)"),
    (64, 512, (2, 3, 4, 64), {}, -7, r"q_v.shape=\(2, 3, 4, 64\): must be \(2, 3, 4, 512\)"),
    (64, 64, (2, 3, 4, 64), {}, -9, "^q_v: must be None unless head_dim=64 and head_dim_v=512 "),
    (576, 512, (2, 3, 4, 512), {}, -9, "^q_v: must be None unless head_dim=64 and head_dim_v=512 "),
    (64, 512, None, {}, -2, "head_dim_v=512: must be .* without q_v"),
    (64, 512, (2, 3, 4, 512), {"softcap": 9.0}, -16, "softcap=9.0: must be 0 with q_v"),
    (64, 512, (2, 3, 4, 512), {"window_size": (4, 0)}, -16, r"window_size\[0\]=4: must be negative .* with q_v"),
]


@pytest.mark.parametrize("columns, columns_v, second, options, status, words", WORDS)
@pytest.mark.parametrize("where", ["host", "device"])
def test_refused(columns, columns_v, second, options, status, words, where, gpu):
    make = DLArray if where == "device" else lambda *shape: np.zeros(shape, np.float16)
    q, k = make(2, 3, 4, columns), make(2, 9, 1, columns)
    v = make(2, 9, 1, columns_v) if where == "device" or columns != 576 else k[..., :512]
    if where == "device" and columns == 576:
        v.strides = (9 * 576, 576, 576, 1)
    with pytest.raises(FlashAttentionError, match=words) as raised:
        attention(q, k, v, q_v=second and make(*second), **options)
    assert raised.value.code == status and gpu.launches == []


@pytest.mark.parametrize("where", ["host", "device"])
def test_of_another_type(where, gpu):
    call = ((Q, K, V), Q_V.astype(np.float64)) if where == "host" else (DEVICE, DLArray(2, 3, 4, 512, dtype="bfloat16"))
    with pytest.raises(FlashAttentionError, match="q_v is (float64: must be float32|bfloat16: must be float16)"):
        attention(*call[0], q_v=call[1])
    with pytest.raises(TypeError, match="q_v must be"):
        attention(*call[0], q_v=[0.0])


# ---- a device --------------------------------------------------------------------------------------------------------


def test_reaches_forward(gpu):
    second = DLArray(2, 3, 4, 512, address=A + 4096, strides=(3 * 4 * 576, 4 * 576, 576, 1))
    out = attention(*DEVICE, q_v=second, causal=True)
    p, _ = gpu.launches[0]
    assert (p.head_dim, p.head_dim_v, p.q_v) == (64, 512, A + 4096) and tuple(out.shape) == (2, 3, 4, 512)
    assert (p.q_v_batch_stride, p.q_v_row_stride, p.q_v_head_stride) == (3 * 4 * 576, 4 * 576, 576)


def test_packed_reaches_forward(gpu):
    q, k, v, second = DLArray(7, 4, 64), DLArray(9, 1, 64), DLArray(9, 1, 512), DLArray(7, 4, 512)
    attention(q, k, v, q_v=second, **OFFSETS)
    p, _ = gpu.launches[0]
    assert (p.q_v, p.q_v_row_stride, p.q_v_head_stride) == (second.address, 4 * 512, 512)


# ---- MLA: v is in k --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "v",
    [LATENT[..., :512].copy(), LATENT[..., 1:513], LATENT[:, ::-1, :, :512], LATENT[:1, :, :, :512].repeat(2, 0)],
    ids=["copy", "later columns", "turned", "other rows"],
)
def test_v_that_is_not_in_k_is_refused_on_the_host(v):
    """As on a device; a device would read the first columns of k."""
    with pytest.raises(FlashAttentionError) as raised:
        attention(WHOLE, LATENT, v)
    assert raised.value.code == -16
    assert raised.value.detail == "v: must be k[..., :512], the same memory, with head_dim=576"


@pytest.mark.parametrize("k", [LATENT, LATENT[:, ::2], LATENT[:, :, ::-1], LATENT[:, 4:5], LATENT.astype(np.float64)])
def test_v_in_k_on_the_host(k):
    """Of any strides."""
    expected, _ = attention_reference(WHOLE, k, k[..., :512])
    q = WHOLE.astype(k.dtype)
    assert np.allclose(attention(q, k, k[..., :512]), expected, atol=1e-5)


def test_v_in_k_on_a_device(gpu):
    q, k = DLArray(2, 3, 4, 576), DLArray(2, 9, 1, 576)
    v = DLArray(2, 9, 1, 512, strides=(9 * 576, 576, 576, 1))
    attention(q, k, v)
    assert gpu.launches[0][0].v == k.address
    v.address += 1024
    with pytest.raises(FlashAttentionError, match=r"^v: must be k\[..., :512\], the same memory, with head_dim=576 "):
        attention(q, k, v)
    v.address, v.strides = k.address, (9 * 512, 512, 512, 1)
    with pytest.raises(FlashAttentionError, match="v's batch stride=4608: must be that of k, 5184, or None"):
        attention(q, k, v)


# ---- sentences show what was given -----------------------------------------------------------------------------------

HALF = [RNG.standard_normal((2, n, 2, 64)).astype(np.float16) for n in (3, 9, 9)]
BYTES = [np.zeros((2, 9, 2, 64), np.uint8)] * 2
TABLES = {name: np.ones((20, 8), np.float32) for name in ("rotary_cos", "rotary_sin")}
NEW = {name: np.zeros((2, 1, 2, 64), np.uint8) for name in ("k_new", "v_new")} | {"seqused_k": USED}
ADVICE = "or give it in 16 bit, of q's type"
SHOWN = [
    ((WHOLE, LATENT, LATENT[..., :512]), {"leftpad_k": USED}, "leftpad_k: must be None with head_dim=576"),
    ((WHOLE, LATENT, LATENT[..., :512]), {"alibi_slopes": np.ones(4)}, "alibi_slopes: must be None with head_dim=576"),
    (HALF, {"seqlens_rotary": USED}, "seqlens_rotary: must be None without rotary_cos and rotary_sin"),
    (HALF, {"cu_seqlens_k_new": PACKED["cu_seqlens_q"]}, "cu_seqlens_k_new: must be None without k_new and v_new"),
    (HALF, {"k_new": HALF[0]}, "v_new=None: must be an array with k_new"),
    (HALF, {"dropout_p": 0.5}, "rng_state=None: must be an array with dropout_p=0.5"),
    (HALF, {"k_descale": 1.0}, "k_descale: must be None with dtype=FP16: descales belong to FP8_E4M3"),
    (
        (HALF[0], *BYTES),
        NEW | TABLES | {"dtype": "float8_e4m3fn"},
        "rotary_cos: must be None with k_new of FP8_E4M3: rotate before k_new is quantised, " + ADVICE,
    ),
]


@pytest.mark.parametrize("qkv, options, sentence", SHOWN)
def test_sentences_show_what_was_given(qkv, options, sentence):
    """And name arguments of attention(), not fields of FlashAttentionParams or what stands for an address."""
    with pytest.raises(FlashAttentionError) as raised:
        attention(*qkv, **options)
    assert raised.value.detail == sentence


def test_what_the_sentence_of_an_fp8_cache_advises_is_taken():
    """New rows of q's type are rotated and quantised."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    cache = [x.astype(ml_dtypes.float8_e4m3fn) for x in HALF[1:]]
    new = dict(zip(("k_new", "v_new"), (x[:, :1] for x in HALF[1:]), strict=True))
    out = attention(HALF[0], *cache, **new, **TABLES, seqused_k=np.array([3, 4], np.int32))
    assert out.dtype == np.float16 and np.isfinite(out).all()
    assert np.array_equal(cache[1][1, 4], HALF[2][1, 0].astype(ml_dtypes.float8_e4m3fn))
