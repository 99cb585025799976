"""attention() over pages, entries of a cache and packed queries: as params of `forward`, and in NumPy. No GPU."""

# ruff: noqa: F811
import numpy as np
import pytest
from test_dlpack import OFFSETS, A, CAIArray, DLArray, dense, gpu, lengths, packed  # noqa: F401

from fa3_cute import AttentionMode, FlashAttentionError, attention
from fa3_cute.contract.reference import attention_reference

POOL = DLArray(7, 16, 2, 64), DLArray(7, 16, 2, 64)


def table(rows=2, pages=3, **facts):
    return DLArray(rows, pages, **{"dtype": "int32", **facts})


# ---- on a device -----------------------------------------------------------------------------------------------------


def test_pages_become_params(gpu):
    used, pages = lengths(2, address=5 * A), table(address=6 * A)
    attention(dense()[0], *POOL, seqused_k=used, page_table=pages, causal=True)
    p, _ = gpu.launches[0]
    assert (p.page_table, p.seqused_k, p.page_size, p.num_pages, p.seqlen_k) == (6 * A, 5 * A, 16, 7, 48)
    assert (p.page_table_batch_stride, p.batch_size, p.seqlen_q, p.mode) == (3, 2, 5, AttentionMode.PREFILL)
    assert (p.kv_batch_idx, p.batch_size_k, p.num_heads_k, p.cu_seqlens_q) == (None, 0, 2, None)
    assert (p.k_batch_stride, p.k_row_stride, p.k_head_stride) == (2048, 128, 64)


@pytest.mark.parametrize(
    "strides",
    [(2048, 64, 1024, 1), (4096, 128, 64, 1), (4096, 256, 128, 1), (8 * 4096, 256, 64, 1)],
    ids=["HND", "K and V in a page", "K and V in a head", "one layer of many"],
)
def test_pages_of_any_strides(gpu, strides):
    pool = DLArray(7, 16, 2, 64, strides=strides)
    attention(dense()[0], pool, POOL[1], seqused_k=lengths(2), page_table=table(strides=(40, 1)))
    p, _ = gpu.launches[0]
    assert (p.k_batch_stride, p.k_row_stride, p.k_head_stride, p.page_table_batch_stride) == (*strides[:3], 40)
    assert (p.v_batch_stride, p.v_row_stride, p.v_head_stride) == (2048, 128, 64)


def test_packed_queries_over_pages(gpu):
    options = {"cu_seqlens_q": OFFSETS["cu_seqlens_q"], "seqused_k": lengths(2), "page_table": table()}
    attention(packed()[0], *POOL, **options, max_seqlen_q=4, zero_padding=True)
    p, _ = gpu.launches[0]
    assert (p.mode, p.batch_size, p.total_q, p.total_k, p.seqlen_k) == (AttentionMode.VARLEN_PREFILL, 2, 7, 0, 48)
    assert (p.max_seqlen_q, p.zero_padding, p.cu_seqlens_k) == (4, True, None)


def test_packed_queries_over_a_dense_cache(gpu):
    attention(packed()[0], *dense()[1:], cu_seqlens_q=OFFSETS["cu_seqlens_q"], seqused_k=lengths(2))
    p, _ = gpu.launches[0]
    assert (p.mode, p.batch_size, p.total_q, p.total_k, p.seqlen_k) == (AttentionMode.VARLEN_PREFILL, 2, 7, 0, 9)
    assert (p.k_batch_stride, p.page_table, p.batch_size_k) == (9 * 2 * 64, None, 0)


def test_sequences_choose_their_entry(gpu):
    rows = lengths(2, address=8 * A)
    attention(dense()[0], DLArray(5, 9, 2, 64), DLArray(5, 9, 2, 64), kv_batch_idx=rows)
    attention(dense()[0], *POOL, kv_batch_idx=rows, page_table=table(rows=4), seqused_k=lengths(2))
    (p, _), (paged, _) = gpu.launches
    assert (p.kv_batch_idx, p.batch_size_k, p.batch_size, p.seqlen_k) == (8 * A, 5, 2, 9) and p.leftpad_k is None
    assert (paged.kv_batch_idx, paged.batch_size_k, paged.batch_size, paged.seqlen_k) == (8 * A, 4, 2, 48)


def test_a_table_of_one_row_has_no_stride(gpu):
    """What an array says of a dimension of size 1 means nothing."""
    q, used = DLArray(1, 5, 4, 64), lengths(1)
    attention(q, *POOL, seqused_k=used, page_table=CAIArray(1, 3, typestr="<i4", strides=(-4, 4)))
    assert gpu.launches[0][0].page_table_batch_stride is None


def test_no_queries(gpu):
    options = {"seqused_k": lengths(2), "page_table": table()}
    none = DLArray(0, 4, 64, address=0)
    assert attention(none, *POOL, cu_seqlens_q=OFFSETS["cu_seqlens_q"], **options).shape == (0, 4, 64)
    assert attention(DLArray(2, 0, 4, 64, address=0), *POOL, **options).shape == (2, 0, 4, 64)
    assert gpu.launches == []


Q, PACKED_Q, CACHE = dense()[0], packed()[0], dense()[1:]
PAGES = {"page_table": table(), "seqused_k": lengths(2)}
LONE = {"cu_seqlens_q": OFFSETS["cu_seqlens_q"], "seqused_k": lengths(2)}
REFUSED = [
    (-9, (Q, *POOL), PAGES | {"page_table": table(dtype="int64")}, "page_table is int64: must be int32"),
    (-9, (Q, *CACHE), {"kv_batch_idx": lengths(2, dtype="int64")}, "kv_batch_idx is int64: must be int32"),
    (-9, (Q, *POOL), PAGES | {"page_table": np.zeros((2, 3), np.int32)}, "page_table is a numpy.ndarray in host"),
    (-9, (Q, *POOL), PAGES | {"page_table": table(address=A + 2)}, "page_table=0x.*2: must be .*aligned to 4"),
    (-9, (Q, *POOL), PAGES | {"zero_padding": True}, "zero_padding=True: must be False without cu_seqlens_q"),
    (-6, (Q, *POOL), PAGES | {"max_seqlen_q": 5}, "max_seqlen_q=5: must be None or 0 without cu_seqlens_q"),
    (
        -7,
        (PACKED_Q, *POOL),
        LONE | {"max_seqlen_q": -1, "page_table": table()},
        "max_seqlen_q=-1: must be an int from 0",
    ),
    (-7, (Q, *POOL), PAGES | {"page_table": lengths(2)}, r"page_table.shape=\(2,\): must have two dimensions, \[batch"),
    (-7, (Q, *POOL), PAGES | {"page_table": table(rows=3)}, r"page_table.shape=\(3, 3\): must be \(2, 3\)"),
    (-7, (Q, *POOL), PAGES | {"page_table": table(pages=0)}, r"page_table.shape=\(2, 0\): must not be empty"),
    (-7, (Q, *POOL), PAGES | {"page_table": table(strides=(1, 2))}, "page_table has the strides .* contiguous"),
    (-7, (Q, DLArray(7, 0, 2, 64), DLArray(7, 0, 2, 64)), PAGES, r"k.shape=\(7, 0, 2, 64\): must not be empty"),
    (-7, (Q, *packed()[1:]), PAGES, r"k.shape=\(9, 2, 64\): must be \[num_pages, page_size, heads, head_dim\]"),
    (-7, (Q, POOL[0], DLArray(6, 16, 2, 64)), PAGES, r"v.shape=\(6, 16, 2, 64\): must be \(7, 16, 2, 64\)"),
    (-7, (Q, *POOL), PAGES | {"seqused_k": lengths(3)}, r"seqused_k.shape=\(3,\): must be \(2,\)"),
    (-7, (Q, *CACHE), {"kv_batch_idx": lengths(3)}, r"kv_batch_idx.shape=\(3,\): must be \(2,\)"),
    (-7, (Q, *CACHE), {"leftpad_k": lengths(3)}, r"leftpad_k.shape=\(3,\): must be \(2,\)"),
    (-7, (Q, *CACHE), {"kv_batch_idx": table()}, r"kv_batch_idx.shape=\(2, 3\): must have one dimension"),
    (-7, (PACKED_Q, *[DLArray(3, 9, 2, 64)] * 2), LONE, r"k.shape=\(3, 9, 2, 64\): must be \(2, 9, 2, 64\)"),
    (-7, (PACKED_Q, *packed()[1:]), LONE, r"k.shape=\(9, 2, 64\): must be \[batch, seqlen"),
    (-14, (Q, *POOL), {"page_table": table()}, "seqused_k=None: must be an array with page_table"),
    (
        -6,
        (PACKED_Q, *packed()[1:]),
        OFFSETS | {"kv_batch_idx": lengths(2)},
        "kv_batch_idx: must be None with cu_seqlens_k",
    ),
    (-6, (PACKED_Q, *POOL), OFFSETS | PAGES, "page_table: must be None with cu_seqlens_k"),
]


@pytest.mark.parametrize("code, qkv, options, words", REFUSED)
def test_refusals_enqueue_and_allocate_nothing(gpu, code, qkv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*qkv, **options)
    assert caught.value.code == code
    assert gpu.launches == gpu.allocated == []


# ---- on the host -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
HOST_Q, HOST_PACKED_Q = (RNG.standard_normal(shape).astype(np.float16) for shape in ((2, 5, 4, 64), (7, 4, 64)))
HOST_POOL, HOST_CACHE = (RNG.standard_normal((2, *shape, 2, 64)).astype(np.float16) for shape in ((7, 16), (5, 9)))
HOST_TABLE = np.array([[3, 1, -1], [0, 2, 6]], np.int32)
HOST_OFFSETS = np.array([1, 3, 5], np.int32)
IN_PAGES = {"page_table": HOST_TABLE, "seqused_k": np.array([20, 40], np.int32)}
CALLS = {
    "pages": (HOST_Q, HOST_POOL, IN_PAGES),
    "rows of the table": (
        HOST_Q,
        HOST_POOL,
        IN_PAGES | {"kv_batch_idx": np.array([1, 0]), "seqused_k": np.array([40, 20])},
    ),
    "left padding": (HOST_Q, HOST_POOL, IN_PAGES | {"leftpad_k": np.array([17, 30]), "causal": True}),
    "entries": (HOST_Q, HOST_CACHE, {"kv_batch_idx": np.array([4, 0], np.int8), "causal": True}),
    "packed, pages": (HOST_PACKED_Q, HOST_POOL, IN_PAGES | {"cu_seqlens_q": HOST_OFFSETS, "causal": True}),
    "packed, cache": (
        HOST_PACKED_Q,
        HOST_CACHE[:, :2],
        {"cu_seqlens_q": HOST_OFFSETS, "seqused_k": np.array([9, 3]), "window_size": (4, 0)},
    ),
}


@pytest.mark.parametrize("q, kv, options", CALLS.values(), ids=CALLS.keys())
def test_attention_is_the_reference_rounded(q, kv, options):
    out, lse = attention(q, *kv, **options, return_lse=True)
    exact, exact_lse = attention_reference(q, *kv, **options)
    np.testing.assert_array_equal(out, exact.astype(np.float16))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    assert np.isfinite(out[1:5]).all()


def test_zero_padding_is_written_behind_the_last_sequence_alone():
    q, kv, options = CALLS["packed, pages"]
    out = np.full_like(q, 7)
    attention(q, *kv, **options, out=out)
    assert (out[[0, 5, 6]] == 7).all()
    padded, lse = attention(q, *kv, **options, out=out.copy(), zero_padding=np.True_, max_seqlen_q=2, return_lse=True)
    assert (padded[:5] == out[:5]).all() and (padded[5:] == 0).all() and (lse[:, 5:] == -np.inf).all()


HOST_REFUSED = [
    (
        -9,
        HOST_Q,
        HOST_POOL,
        IN_PAGES | {"page_table": HOST_TABLE.astype(float)},
        "page_table is float64: must be integers",
    ),
    (-7, HOST_Q, HOST_POOL, IN_PAGES | {"page_table": HOST_TABLE[0]}, "page_table.shape=.* two dimensions"),
    (-7, HOST_Q, HOST_POOL, IN_PAGES | {"page_table": HOST_TABLE[:, :0]}, "page_table.shape=.* not be empty"),
    (-7, HOST_Q, HOST_POOL, IN_PAGES | {"seqused_k": np.array([40, 40])}, r"page_table\[0\] \[3, 1, -1\]"),
    (-7, HOST_Q, HOST_CACHE, {"kv_batch_idx": np.array([5, 0])}, r"kv_batch_idx \[5, 0\]"),
    (-7, HOST_Q, HOST_CACHE, {}, "same batch size"),
    (-14, HOST_Q, HOST_POOL, {"page_table": HOST_TABLE}, "seqused_k=None: must be an array with page_table"),
    (-9, HOST_Q, HOST_POOL, IN_PAGES | {"zero_padding": True}, "zero_padding=True"),
    (-9, HOST_PACKED_Q, HOST_POOL, IN_PAGES | {"cu_seqlens_q": HOST_OFFSETS, "zero_padding": 3}, "zero_padding=3"),
    (-6, HOST_Q, HOST_POOL, IN_PAGES | {"max_seqlen_q": 4}, "max_seqlen_q=4"),
]


@pytest.mark.parametrize("code, q, kv, options, words", HOST_REFUSED)
def test_the_host_refuses(code, q, kv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(q, *kv, **options)
    assert caught.value.code == code


def test_tables_are_numpy_arrays():
    with pytest.raises(TypeError, match="page_table must be a NumPy array"):
        attention(HOST_Q, *HOST_POOL, page_table=HOST_TABLE.tolist(), seqused_k=IN_PAGES["seqused_k"])
