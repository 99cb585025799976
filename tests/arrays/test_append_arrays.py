"""attention() that appends to a cache and rotates: as params of `forward`, and in NumPy. No GPU."""

# ruff: noqa: F811
from importlib import import_module

import numpy as np
import pytest
from test_dlpack import OFFSETS, A, DLArray, dense, gpu, lengths, packed  # noqa: F401

from fa3_cute import DataType, FlashAttentionError, attention
from fa3_cute.contract.quantize import quantize_fp8
from fa3_cute.contract.reference import attention_reference

Q, K, V = dense()
PACKED_Q = packed()[0]
USED = {"seqused_k": lengths(2)}


def new(rows=3, **facts):
    return {"k_new": DLArray(2, rows, 2, 64, **facts), "v_new": DLArray(2, rows, 2, 64)}


def tables(rows=30, columns=16, **facts):
    facts = {"dtype": "float32", **facts}
    return {"rotary_cos": DLArray(rows, columns, **facts), "rotary_sin": DLArray(rows, columns, **facts)}


@pytest.fixture
def launched(gpu, monkeypatch):
    """Params of the calls that came to be launched."""
    stand_in = lambda steps, shape, params, stream: gpu.launches.append((params, stream))  # noqa: E731
    monkeypatch.setattr(import_module("fa3_cute.runtime.append"), "launch_all", stand_in)
    return gpu.launches


def test_arrays_become_params(launched):
    starts = lengths(2, address=5 * A)
    rows = new(address=6 * A, strides=(4096, 256, 64, 1))
    attention(Q, K, V, **USED, **rows, **tables(strides=(40, 1)), rotary_interleaved=True, seqlens_rotary=starts)
    p, _ = launched[0]
    assert (p.k_new, p.seqlen_knew, p.k_new_batch_stride, p.k_new_row_stride) == (6 * A, 3, 4096, 256)
    assert (p.k_new_head_stride, p.v_new_row_stride, p.cu_seqlens_k_new) == (64, 128, None)
    assert (p.rotary_dim, p.rotary_positions, p.rotary_row_stride, p.rotary_interleaved) == (32, 30, 40, True)
    assert (int(p.rotary_dtype), p.seqlens_rotary) == (3, 5 * A)


def test_packed_rows_and_queries(launched):
    rows = {"k_new": DLArray(7, 2, 64), "v_new": DLArray(7, 2, 64), "cu_seqlens_k_new": lengths(3, address=5 * A)}
    attention(PACKED_Q, K, V, cu_seqlens_q=OFFSETS["cu_seqlens_q"], **USED, **rows)
    none = DLArray(0, 4, 64, address=0)
    attention(none, K, V, cu_seqlens_q=OFFSETS["cu_seqlens_q"], **USED, **rows)
    for p, _ in launched:
        assert (p.cu_seqlens_k_new, p.seqlen_knew, p.k_new_row_stride) == (5 * A, 7, 128)
    assert len(launched) == 2, "without queries the cache is updated"


@pytest.mark.parametrize("keys", ["float8_e4m3fn", "uint8"])
def test_new_rows_of_an_fp8_cache(launched, keys):
    """Of its type, or of q's: then the call quantises."""
    cache, stated = dense(dtype=keys)[1:], {} if keys != "uint8" else {"dtype": "float8_e4m3fn"}
    for dtype in (keys, "float16"):
        rows = {name: DLArray(2, 3, 2, 64, dtype=dtype) for name in ("k_new", "v_new")}
        attention(Q, *cache, **USED, **rows, **stated)
    assert [p.kv_new_dtype for p, _ in launched] == [None, DataType.FP16]
    rows["v_new"] = DLArray(2, 3, 2, 64, dtype=keys)
    for changes, words in (
        (rows, f"v_new is {keys}: must be float16, as k_new is"),
        ({"k_new": DLArray(2, 3, 2, 64, dtype="bfloat16")}, f"k_new is bfloat16: must be {keys} or float16"),
    ):
        with pytest.raises(FlashAttentionError, match=words):
            attention(Q, *cache, **USED, **rows | changes, **stated)


REFUSED = [
    (-9, USED | new(dtype="bfloat16"), "k_new is bfloat16: must be float16"),
    (-9, USED | {"k_new": new()["k_new"]}, "v_new=None: must be an array with k_new"),
    (-9, new(), "seqused_k=None: must be an array with k_new"),
    (-7, USED | new(rows=0), "rows of k_new=0: must be an int from 1"),
    (-7, USED | new() | {"v_new": DLArray(2, 4, 2, 64)}, r"v_new.shape=\(2, 4, 2, 64\): must be \(2, 3, 2, 64\)"),
    (-7, USED | new() | {"k_new": DLArray(2, 3, 4, 64)}, r"k_new.shape=\(2, 3, 4, 64\): must be \[2, rows, 2, 64\]"),
    (
        -7,
        USED | {"k_new": DLArray(6, 2, 64), "v_new": DLArray(6, 2, 64)},
        r"k_new.shape=\(6, 2, 64\): must be \[2, rows",
    ),
    (-7, USED | new(strides=(4096, 257, 64, 1)), "k_new's row stride=257: must be None"),
    (-7, USED | new() | {"seqlens_rotary": lengths(3)}, r"seqlens_rotary.shape=\(3,\): must be \(2,\)"),
    (-15, USED | new() | {"seqlens_rotary": lengths(2)}, "seqlens_rotary: must be None without rotary_cos"),
    (-15, tables(columns=12), "rotary_dim=24: must be a multiple of 16"),
    (-15, tables(strides=(18, 1)), "rotary_cos's row stride=18"),
    (-15, {"rotary_cos": DLArray(30, 16)}, "rotary_sin=None: must be an array with rotary_cos"),
    (-15, tables() | {"rotary_interleaved": "no"}, "rotary_interleaved='no': must be True or False"),
    (
        -9,
        tables() | {"rotary_sin": DLArray(30, 16, dtype="float16")},
        "rotary_sin is float16 .*: must be as rotary_cos",
    ),
    (
        -7,
        tables() | {"rotary_sin": DLArray(31, 16, dtype="float32")},
        r"rotary_sin.shape=\(31, 16\): must be \(30, 16\)",
    ),
    (-7, tables(rows=0), "rotary_cos.shape=.*positions"),
]


@pytest.mark.parametrize("code, changes, words", REFUSED)
def test_refused(launched, code, changes, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(Q, K, V, **changes)
    assert caught.value.code == code
    assert not launched


def test_no_queries_of_a_dense_call(launched):
    with pytest.raises(FlashAttentionError, match="must not be empty with k_new"):
        attention(DLArray(2, 0, 4, 64, address=0), K, V, **USED, **new())


# ---- on the host -----------------------------------------------------------------------------------------------------


def host():
    rng = np.random.default_rng(3)
    arrays = {
        "q": (2, 2, 4, 64),
        "k": (2, 9, 2, 64),
        "v": (2, 9, 2, 64),
        "k_new": (2, 3, 2, 64),
        "v_new": (2, 3, 2, 64),
    }
    found = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in arrays.items()}
    angles = rng.uniform(-3, 3, (12, 16))
    found |= {"rotary_cos": np.cos(angles).astype(np.float32), "rotary_sin": np.sin(angles).astype(np.float32)}
    return found | {"seqused_k": np.array([4, 8], np.int32), "causal": True}


def test_numpy_arrays_are_updated_in_place():
    given, fresh = host(), host()
    out, lse = attention(**given, return_lse=True)
    expected, expected_lse = attention_reference(**fresh)
    np.testing.assert_array_equal(out, expected.astype(np.float16))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    np.testing.assert_array_equal(given["v"][0, 4:7], fresh["v_new"][0])
    np.testing.assert_array_equal(given["v"][1, 8:], fresh["v_new"][1, :1])
    assert not np.array_equal(given["k"][0, 4:7], fresh["k_new"][0]), "rotated"
    for name in "kv":
        np.testing.assert_array_equal(given[name][0, 7:], fresh[name][0, 7:])
        np.testing.assert_array_equal(given[name][:, :4], fresh[name][:, :4])


@pytest.mark.parametrize("rotates", [False, True])
def test_numpy_rows_are_quantised(rotates):
    """Of q's type over a cache in FP8, as the reference says."""
    given = host()
    for name in ("k", "v"):
        given[name], given[f"{name}_descale"] = quantize_fp8(given[name], "batch_head")
    if not rotates:
        given = {name: value for name, value in given.items() if not name.startswith("rotary")}
    fresh = given | {name: given[name].copy() for name in "kv"}
    out = attention(**given)
    expected, _ = attention_reference(**fresh)
    np.testing.assert_array_equal(out, expected.astype(np.float16))
    values, _ = quantize_fp8(given["v_new"], descale=given["v_descale"])
    assert np.array_equal(given["v"][0, 4:7].view(np.uint8), values[0].view(np.uint8))
    with pytest.raises(FlashAttentionError, match="v_new is float8_e4m3fn: must be float16, as k_new is"):
        attention(**given | {"v_new": values})


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"k_new": np.zeros((2, 3, 2, 64), np.float32)}, -9, "k_new is float32: must be float16, as k is"),
        ({"rotary_cos": np.zeros((12, 16), int)}, -9, "rotary_cos is int64: must be real numbers"),
        ({"v_new": None}, -9, "v_new=None: must be an array with k_new"),
        ({"rotary_sin": np.zeros((12, 8), np.float32)}, -7, "rotary_sin.shape"),
    ],
)
def test_numpy_arrays_that_do_not_fit(changes, code, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(**host() | changes)
    assert caught.value.code == code


def test_a_numpy_cache_must_be_writable():
    given = host()
    given["v"].flags.writeable = False
    with pytest.raises(FlashAttentionError, match="v is read-only"):
        attention(**given)
