"""MergeParams: what merge_attention accepts, refuses and means. No GPU."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rule_calls import BF16, DENSE, FP8, FP16, FP32, VALUES, A, Array, Handle, first_problem

import fa3_cute
from fa3_cute import MergeParams, Status, explain, last_error, merge_attention, warmup
from fa3_cute.contract.merge import ARGUMENTS, MERGE_ENTRY, POINTERS
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.reference import attention_reference, bf16_bits
from fa3_cute.planning import merge as planning
from fa3_cute.planning.merge import checked, merge_config

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {"out_a": A, "lse_a": A + 4, "out_b": A + 1024, "lse_b": A + 8, "out": A + 2048, "lse": A + 12}
GOOD = MergeParams(**TENSORS, batch_size=2, seqlen_q=100, num_heads=6, head_dim=64)
PACKED = replace(GOOD, batch_size=1, seqlen_q=777, lse=None)
SIZE = 2**31 - 256


@pytest.mark.parametrize("value", [FP32, 3])
def test_forward_reads_no_fp32(value):
    """It writes partial results in it, and reads none."""
    problem = first_problem(replace(DENSE, dtype=value))
    assert problem.status is Status.INVALID_ARGUMENT
    assert "dtype=" in problem.detail and "FP16, BF16 or FP8_E4M3" in problem.detail
    apart = {"out_batch_stride": 512 * 2112, "out_row_stride": 2112, "out_head_stride": 132}
    assert first_problem(replace(DENSE, out_dtype=value, **apart)) is None
    assert "out_head_stride=132" in first_problem(replace(DENSE, **apart)).detail


# ---- what is accepted and refused ------------------------------------------------------------------------------------

ACCEPTED = [
    (GOOD, {}),
    (PACKED, {}),
    *((GOOD, {"head_dim": head_dim}) for head_dim in (8, 24, 80, 128, 256, 512)),
    *((GOOD, {"dtype": dtype, "out_dtype": out}) for dtype in (FP16, BF16, FP32) for out in (None, FP16, BF16, FP32)),
    (GOOD, {"dtype": 3, "out_dtype": np.int64(1), "seqlen_q": np.int32(5), "lse_base": 2, "out_a": Handle()}),
    (GOOD, {"lse_base": np.float64(math.e)}),
    (GOOD, {"lse": 0}),
    # In place.
    (GOOD, {"out": A, "lse": A + 8}),
    (PACKED, {"out": A + 1024, "out_b_row_stride": 640, "out_row_stride": 640}),
    (replace(GOOD, dtype=FP32), {"out": A, "out_dtype": FP32}),
    # Strides: any along one entry; LSEs as (rows, heads) and inputs broadcast.
    (PACKED, {"out_batch_stride": -1, "lse_a_batch_stride": 3}),
    (GOOD, {"lse_a_row_stride": 6, "lse_a_head_stride": 1, "lse_b_head_stride": 0, "out_b_batch_stride": 0}),
    (GOOD, {"lse_row_stride": 6, "lse_head_stride": 1}),
    (replace(PACKED, dtype=FP32, out_dtype=BF16), {"out_a_row_stride": 388, "out_row_stride": 392}),
    (GOOD, {"out_head_stride": 6400, "out_row_stride": 64, "out_a_batch_stride": 2**40}),
    # Without a row nothing is read or written.
    *((call, {**dict.fromkeys(POINTERS, None), name: 0}) for call in (GOOD, PACKED) for name in ("seqlen_q",)),
    (GOOD, {"batch_size": 0, "out": None}),
    (GOOD, {"batch_size": 1, "seqlen_q": SIZE, "num_heads": 1}),
]


@pytest.mark.parametrize("base, changes", ACCEPTED)
def test_accepted(base, changes):
    assert explain(replace(base, **changes)) == []


REFUSED = [
    *((-1, {name: value}, (f"{name}=", "device address")) for name in POINTERS[:5] for value in (None, 0)),
    *(
        (-2, {"head_dim": value}, (f"head_dim={value}", "multiple of 8 up to 512"))
        for value in (0, 4, 60, 520, -8, 8.0)
    ),
    *((-4, {"num_heads": value}, (f"num_heads={value!r}", "from 1")) for value in (0, -1, True, None, 1.0)),
    *(
        (-7, {name: value}, (f"{name}={value!r}", f"from 0 to {SIZE}"))
        for name in ("batch_size", "seqlen_q")
        for value in (None, -1, True, 2.0, SIZE + 1, "4")
    ),
    (-7, {"seqlen_q": 2**30}, ("num_heads=6", f"at most {SIZE} rows", str(12 * 2**30))),
    *((-7, {f"{name}_row_stride": 380}, (f"{name}_row_stride=380", "multiple of 8")) for name in ("out_a", "out_b")),
    (-7, {"out_row_stride": 390, "out_dtype": FP32}, ("out_row_stride=390", "multiple of 4 (16 bytes)")),
    (-7, {"out_head_stride": 56}, ("out_head_stride=56", "from 64")),
    (-7, {"out_row_stride": 64}, ("out_row_stride=64", "rows of out apart", "[2, 100, 6]")),
    (-7, {"lse_row_stride": 0}, ("lse_row_stride=0", "from 1")),
    (-7, {"lse_row_stride": 5, "lse_head_stride": 1}, ("lse_row_stride=5", "rows of lse apart")),
    *((-7, {name: -8}, (f"{name}=-8", "None (contiguous)")) for name, a in ARGUMENTS.items() if a.kind == "stride"),
    *((-7, {"lse_b_row_stride": value}, ("lse_b_row_stride=", "or an int")) for value in (1.0, "1", Array())),
    (-7, {"out_b_batch_stride": 2**40 + 8}, ("out_b_batch_stride=", f"to {2**40}")),
    *((-9, {name: A + 8}, (f"{name}={A + 8:#x}", "aligned to 16 bytes")) for name in ("out_a", "out_b", "out")),
    *((-9, {name: A + 2}, (f"{name}={A + 2:#x}", "aligned to 4 bytes")) for name in ("lse_a", "lse_b", "lse")),
    *((-9, {name: value}, (f"{name}=", "__int__")) for name in POINTERS for value in (1.5, "x", Array())),
    *((-9, {"out": value}, ("out=", "device address")) for value in (-16, 1 << 64)),
    *((-9, {"dtype": value}, ("dtype=", "FP16, BF16 or FP32")) for value in (FP8, None, 4, "bf16")),
    *((-9, {"out_dtype": value}, ("out_dtype=", "None (dtype), DataType.FP16")) for value in (FP8, 4, "bf16")),
    *(
        (-9, {"lse_base": value}, (f"lse_base={value!r}", "math.e or 2"))
        for value in (10, 0, None, True, 2.7, "e", float("nan"), [2.0])
    ),
    (-9, {"out": A, "out_dtype": FP32}, (f"out={A:#x}", "is out_a", "element type")),
    (
        -9,
        {"out": A + 1024, "out_row_stride": 392, "out_batch_stride": 40000},
        (f"out={A + 1024:#x}", "is out_b", "strides"),
    ),
    (-9, {"lse": A + 8, "lse_b_head_stride": 0}, (f"lse={A + 8:#x}", "is lse_b", "same strides")),
]


@pytest.mark.parametrize("status, changes, words", REFUSED)
def test_refused(status, changes, words):
    """One sentence, which names the field, its value and what is accepted; nothing else is objected to."""
    params = replace(GOOD, **changes)
    (problem,) = explain(params)
    assert problem.status == status and all(word in problem.detail for word in words), problem
    assert merge_attention(params) == warmup(params) == status
    assert last_error().detail == problem.detail


def test_problems_come_in_the_order_of_the_statuses():
    params = MergeParams(out_a=A + 8, dtype=FP8, out_row_stride=1.5)
    found = [problem.status for problem in explain(params)]
    assert found == sorted(found, reverse=True) and set(found) == {-1, -2, -4, -7, -9}
    assert merge_attention(params) == -1


def test_any_value_in_any_field_is_a_status():
    """Whatever it is: no exception. It changes nothing of what a good call says."""
    for name in ARGUMENTS:
        for value in VALUES:
            planning._known.clear()  # of equal values, 1.0 after 1, the short cut knows no types
            params = replace(GOOD, **{name: value})
            problems = explain(params)
            found = checked(params)
            assert problems[:1] == [found] if problems else found[0].dtype, (name, value)
            assert explain(GOOD) == [] and checked(GOOD)[1] == tuple(TENSORS.values())


def test_what_is_no_params_is_a_type_error():
    for call in (merge_attention, checked):
        with pytest.raises(TypeError, match="MergeParams, not FlashAttentionParams"):
            call(DENSE)
    with pytest.raises(TypeError, match="FlashAttentionParams, not MergeParams"):
        fa3_cute.forward(GOOD)


def test_params_are_a_record():
    with pytest.raises(TypeError):
        MergeParams(out_c=A)
    with pytest.raises(AttributeError):
        MergeParams().out_c = A


def test_refusals_import_nothing_heavy():
    script = (
        "import sys; from fa3_cute import MergeParams, explain, merge_attention;"
        "assert merge_attention(MergeParams()) == -1 and explain(MergeParams());"
        "print(*sorted({'cutlass', 'cuda', 'numpy'} & {name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# ---- the shape ------------------------------------------------------------------------------------------------------


def shape_of(params):
    return checked(params)[0]


def test_shape_of_a_call():
    """Strides in the order of the entry, contiguous where there are none or where they mean nothing."""
    shape = shape_of(
        replace(
            GOOD,
            out_b_row_stride=1024,
            lse_head_stride=200,
            lse_batch_stride=2000,
            dtype=BF16,
            out_dtype=FP32,
            lse_base=2,
        )
    )
    contiguous, lse = (100 * 6 * 64, 6 * 64, 64), (600, 1, 100)
    assert shape.strides == (*contiguous, 38400, 1024, 64, *contiguous, *lse, *lse, 2000, 1, 200)
    assert shape.sizes == (2, 100, 6, 64) and shape.scales == (1.0,) and not shape.is_empty
    assert shape.launch.config is merge_config("bf16", "fp32")
    assert shape_of(GOOD).scales == (math.log2(math.e),)
    assert shape_of(replace(PACKED, out_batch_stride=7)) == shape_of(PACKED)
    assert shape_of(replace(GOOD, seqlen_q=0)).is_empty and shape_of(replace(GOOD, batch_size=0)).is_empty


def test_entry_has_every_field_but_the_types():
    names = [name for name, _ in MERGE_ENTRY.arguments]
    assert sorted(names) == sorted([*ARGUMENTS.keys() - {"dtype", "out_dtype", "lse_base"}, "log2_base", "stream"])
    assert MERGE_ENTRY.per_call == (*POINTERS, "stream")


def test_a_known_shape_takes_only_good_addresses():
    """What the short cut lets through is what the rules let through."""
    apart = replace(GOOD, out_batch_stride=2**20, lse_row_stride=6, lse_head_stride=1)
    assert explain(apart) == [] and checked(apart)[1] == tuple(TENSORS.values())
    for changes in ({"out": A}, {"out": A + 1024}, {"lse": A + 4}, {"lse": A + 8}, {"out": A + 8}, {"lse_a": 1}):
        assert checked(replace(apart, **changes)) == explain(replace(apart, **changes))[0]
    assert checked(replace(apart, lse=None))[1][-1] == 0 == checked(replace(apart, lse=0))[1][-1]
    assert checked(replace(apart, out_a=Handle()))[1][0] == A


# ---- the reference --------------------------------------------------------------------------------------------------


def problem(batch=2, rows=5, keys=12, heads=3, head_dim=16, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, heads, head_dim))
    k, v = rng.standard_normal((2, batch, keys, heads, head_dim))
    return q, k, v


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_merged_parts_are_the_whole(cut):
    q, k, v = problem()
    parts = [attention_reference(q, k[:, keys], v[:, keys]) for keys in (slice(cut), slice(cut, None))]
    out, lse = merge_reference(*parts[0], *parts[1])
    whole_out, whole_lse = attention_reference(q, k, v)
    np.testing.assert_allclose(out, whole_out, rtol=1e-12)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-12)


def test_base_of_the_logarithms():
    q, k, v = problem()
    a, b = attention_reference(q, k[:, :4], v[:, :4]), attention_reference(q, k[:, 4:], v[:, 4:])
    out, lse = merge_reference(*a, *b)
    out_2, lse_2 = merge_reference(a[0], a[1] / np.log(2), b[0], b[1] / np.log(2), lse_base=2)
    np.testing.assert_allclose(out_2, out, rtol=1e-12)
    np.testing.assert_allclose(lse_2 * np.log(2), lse, rtol=1e-12)
    assert np.abs(merge_reference(a[0], a[1], b[0], b[1], lse_base=2)[0] - out).max() > 0.01


def test_parts_that_saw_no_key():
    """Of packed rows, 0 and 1: a, b, neither, both."""
    out_a, out_b = np.full((4, 1, 8), 1.5), np.full((4, 1, 8), -2.5)
    out_a[0], out_b[1], out_a[2], out_b[2] = np.nan, np.inf, np.nan, np.nan
    nothing = -np.inf
    out, lse = merge_reference(out_a, [[nothing, 3, nothing, 3]], out_b, [[7, nothing, nothing, 3]])
    assert out[:, 0, 0].tolist() == [-2.5, 1.5, 0, -0.5]
    assert lse[0, :3].tolist() == [7, 3, nothing] and abs(lse[0, 3] - 3 - math.log(2)) < 1e-12


def test_magnitudes_and_nan():
    """LSEs of any size, as far apart as may be; NaN stays NaN."""
    out_a, out_b = np.full((4, 1, 8), 1.0), np.full((4, 1, 8), 3.0)
    out, lse = merge_reference(out_a, [[3000, -3000, 1e38, np.nan]], out_b, [[3000, 3000, -1e38, 0]])
    assert out[:3, 0, 0].tolist() == [2, 3, 1] and np.isnan(out[3]).all() and np.isnan(lse[0, 3])
    np.testing.assert_allclose(lse[0, :3], [3000 + math.log(2), 3000, 1e38])


def test_bf16_bits_are_read_as_such():
    out = merge_reference(bf16_bits(np.full((1, 1, 8), 1.5)), [[0.0]], bf16_bits(np.full((1, 1, 8), 2.5)), [[0.0]])[0]
    assert (out == 2).all()


@pytest.mark.parametrize("changes", [{"seqlen_q": None}, {"num_heads": "2"}, {"out": {}}])
def test_in_place_calls_of_bad_sizes_have_problems_not_exceptions(changes):
    assert explain(replace(GOOD, **{"out": GOOD.out_a, "lse": GOOD.lse_b} | changes))
