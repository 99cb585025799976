"""16-bit queries over FP8 keys: what is accepted, what is refused and how, and what it computes on the host."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from backward_calls import DENSE as BACKWARD_DENSE
from rule_calls import BF16, DENSE, DESCALES, FP8, FP16, FP32, PACKED, PER_HEAD, A

from fa3_cute import FlashAttentionError, attention
from fa3_cute.contract.backward_rules import contract_problems as backward_problems
from fa3_cute.contract.fp8_cache import UNSERVED
from fa3_cute.contract.mods import ScoreMod
from fa3_cute.contract.plain import plain
from fa3_cute.contract.quantize import dequantize_fp8, quantize_fp8
from fa3_cute.contract.reference import attention_reference, low_precision_twin
from fa3_cute.planning.operations import problems
from fa3_cute.planning.problem import ProblemShape

CACHE = replace(DENSE, dtype=BF16, kv_dtype=FP8)
USED = {"seqused_k": A}
PAGES = {"page_table": A, "page_size": 16, "num_pages": 99} | USED
GIVEN = {
    "softcap": 30.0,
    "attention_chunk": 64,
    "p_dropout": 0.1,
    "score_mod": ScoreMod(lambda score, *place: score, name="same"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": FP16, "head_dim": 64},
        {"head_dim_v": 128},
        USED,
        PAGES,
        PAGES | {"kv_batch_idx": A, "batch_size_k": 7},
        DESCALES | PER_HEAD,
        {"is_causal": True},
        {"window_size_left": 100, "window_size_right": 0},
        {"num_splits": 7},
        {"fixed_split_size": 512},
        {"s_aux": A},
        {"out_dtype": FP32},
        {"pack_gqa": False},
    ],
    ids=str,
)
def test_served(changes):
    assert problems(replace(CACHE, **changes)) == []


def test_served_with_packed_queries():
    assert problems(replace(PACKED, dtype=BF16, kv_dtype=FP8, **DESCALES)) == []


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"head_dim": 96}, (-3, "head_dim=96: must be 64 or 128 with kv_dtype=FP8_E4M3 and 16-bit queries")),
        (
            {"head_dim_v": 64},
            (-3, "head_dim_v=64: must be 0 or head_dim=128 with kv_dtype=FP8_E4M3 and 16-bit queries"),
        ),
        ({"kv_dtype": FP16}, (-9, "kv_dtype=DataType.FP16: must be None (dtype), what dtype is, or FP8_E4M3")),
        ({"kv_dtype": "fp8"}, (-9, "kv_dtype='fp8': must be None (dtype), what dtype is, or FP8_E4M3")),
        ({"out_dtype": FP16}, (-9, "out_dtype=DataType.FP16: must be None or BF16 or FP32 with dtype=BF16")),
        (
            {"k_row_stride": 520},
            (
                -7,
                (
                    "k_row_stride=520: must be at least 0, below 1099511627776 and a multiple of 16 elements "
                    "(16 bytes, for TMA)"
                ),
            ),
        ),
    ],
    ids=str,
)
def test_refused(changes, found):
    assert problems(replace(CACHE, **changes)) == [found]


def test_strides_of_q_are_those_of_16_bit():
    assert problems(replace(CACHE, q_row_stride=2056)) == []


@pytest.mark.parametrize("name", UNSERVED)
def test_what_has_no_kernel_is_refused_by_name(name):
    value = GIVEN.get(name, A)
    refused = dict(problems(replace(CACHE, **{name: value})))
    assert refused[-16].startswith(f"{name}=") and refused[-16].endswith(f"16-bit queries: {UNSERVED[name]}")


def test_a_kv_dtype_that_is_dtype_means_nothing():
    for dtype in (FP16, BF16, FP8):
        stated, plainly = (
            ProblemShape.of(plain(replace(DENSE, dtype=dtype, kv_dtype=kv_dtype))) for kv_dtype in (dtype, None)
        )
        assert stated == plainly and stated.kv_dtype is None
    (found,) = problems(replace(DENSE, kv_dtype=DENSE.dtype, k_descale_ptr=A))
    assert found == (-9, f"k_descale_ptr={A}: must be None with k and v of FP16: descales belong to FP8_E4M3")


def test_descales_are_part_of_the_shape():
    shape = ProblemShape.of(plain(replace(CACHE, **DESCALES | PER_HEAD)))
    assert shape.has_fp8_keys and shape.kv_dtype == "fp8_e4m3" and shape.dtype == "bf16"
    assert len(shape.strides) == len(ProblemShape.of(plain(replace(CACHE, dtype=FP8, **DESCALES | PER_HEAD))).strides)


def test_backward_refuses_it():
    (found,) = backward_problems(replace(BACKWARD_DENSE, kv_dtype=FP8))
    assert found == (-16, "kv_dtype=DataType.FP8_E4M3: must be None or dtype: backward has no kernel for FP8")


# ---- attention() on the host ---------------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, rows, heads, 64), np.float32) for rows, heads in ((3, 4), (9, 2), (9, 2)))
    (k, k_descale), (v, v_descale) = quantize_fp8(k, "head"), quantize_fp8(v, "head")
    return q.astype(ml_dtypes.bfloat16), k, v, {"k_descale": k_descale, "v_descale": v_descale}


def test_it_is_attention_of_the_dequantised_cache(tensors):
    q, k, v, descales = tensors
    out, lse = attention(q, k, v, **descales, causal=True, return_lse=True)
    assert out.dtype == q.dtype
    wide = (dequantize_fp8(k, descales["k_descale"]), dequantize_fp8(v, descales["v_descale"]))
    exact, exact_lse = attention_reference(q, *wide, causal=True)
    assert np.abs(out.astype(np.float64) - exact).max() < 2**-7 * np.abs(exact).max()
    assert np.abs(lse - exact_lse).max() < 1e-5
    bytes_too = attention(q, k.view(np.uint8), v.view(np.uint8), **descales, causal=True, dtype="float8_e4m3fn")
    assert np.array_equal(bytes_too.view(np.uint16), out.view(np.uint16))


def test_the_twin_is_one_of_16_bit(tensors):
    """Stored values are 16-bit numbers: what rounds is Q, P and O, not K and V."""
    q, k, v, descales = tensors
    twin, _ = low_precision_twin(q, k, v, "bf16", **descales)
    exact, _ = attention_reference(q, k, v, **descales)
    assert 0 < np.abs(twin - exact).max() < 2**-7 * np.abs(exact).max()


def test_keys_of_two_types_are_refused(tensors):
    q, k, v, _ = tensors
    with pytest.raises(
        FlashAttentionError, match="dtypes bfloat16, float8_e4m3fn, bfloat16 of q, k, v: must be the same"
    ):
        attention(q, k, q[:, :1, :2].repeat(9, 1))
    with pytest.raises(FlashAttentionError, match="dtypes bfloat16, uint8, uint8"):
        attention(q, k.view(np.uint8), v.view(np.uint8))
    with pytest.raises(FlashAttentionError, match="softcap=2.0: must be None or 0 with kv_dtype=FP8_E4M3"):
        attention(q, k, v, softcap=2.0)
