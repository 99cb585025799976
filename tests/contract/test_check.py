"""The judge of the GPU tests is itself judged: the tolerance rule passes what it should and names what it refuses."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import descales
import numpy as np
import pytest
from cases import FP8, FP8_GRID, FP8_HEAD_DIMS, FP8_OUT_DTYPES, HEADS, Case, Layout, with_heads
from check import LSE_TOLERANCE, Problem, assert_out, check, make_problem, packed_problem, params_of, poison_of
from images import POISON, Tensor, contiguous, heads_before_rows, padded
from sources import ROOT, source_hash
from tolerance import assert_lse

from fa3_cute import DataType
from fa3_cute.contract.reference import TWINS, attention_reference, low_precision_twin, round_to, to_bits
from fa3_cute.contract.rules import contract_problems

NAN, INF = np.nan, np.inf


@pytest.fixture(scope="module")
def attended():
    q, k, v = (round_to(x, "bf16") for x in np.random.default_rng(0).standard_normal((3, 1, 60, 2, 64)))
    return attention_reference(q, k, v)[0], low_precision_twin(q, k, v, "bf16")[0]


def test_the_twin_passes(attended):
    ref, twin = attended
    assert_out(twin, ref, twin)
    assert_out(ref, ref, twin)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda out: np.where(np.indices(out.shape).sum(0) == 70, out + 0.02, out), "max error"),
        (lambda out: out * 1.01, "mean error"),
        (lambda out: np.where(np.indices(out.shape)[1] == 30, NAN, out), "128 elements are NaN or infinite"),
        (lambda out: np.roll(out, 1, axis=2), "worst at"),
    ],
)
def test_a_damaged_output_is_refused(attended, damage, words):
    ref, twin = attended
    with pytest.raises(AssertionError, match=words):
        assert_out(damage(twin), ref, twin)


def test_a_lost_nan_is_refused(attended):
    ref, twin = (array.copy() for array in attended)
    ref[0, 3] = NAN
    with pytest.raises(AssertionError, match="128 should be NaN and are not"):
        assert_out(twin, ref, twin)


@pytest.mark.parametrize(
    "lse, words",
    [
        ([1.0002, -INF, NAN], "LSE at"),
        ([INF, -INF, NAN], "LSE at"),
        ([1.0, NAN, NAN], "LSE NaN"),
        ([1.0, -INF, -INF], "LSE NaN"),
        ([1.0, -80.0, NAN], "LSE -inf"),
    ],
)
def test_a_wrong_lse_is_refused(lse, words):
    ref = np.array([1.0, -INF, NAN])[None, None]
    assert_lse(ref + 5e-5, ref, LSE_TOLERANCE)
    with pytest.raises(AssertionError, match=words):
        assert_lse(np.array(lse)[None, None], ref, LSE_TOLERANCE)


@pytest.fixture
def packed():
    """A problem without a device, with the result that its twin gives: sequences of 40, 1, 0 and 3 rows."""
    layout = Layout((40, 1, 0, 3), (30, 2, 5, 3), before=2, after=1)
    case = Case("bf16", 64, True, 2, 1, layout.total_q, layout.total_k, batch=4)
    rng = np.random.default_rng(0)
    q, k, v = (
        Tensor(None, to_bits(rng.standard_normal((rows, heads, 64)), "bf16"))
        for rows, heads in ((case.seqlen_q, 2), (case.seqlen_k, 1), (case.seqlen_k, 1))
    )
    lengths = {
        name: Tensor(None, np.array(values, np.int32))
        for name, values in {**layout.cu_seqlens, "seqused_q": [38, 1, 0, 3]}.items()
    }
    problem = Problem(case, q, k, v, None, None, lengths=lengths)
    out, lse = low_precision_twin(*problem.inputs, "bf16", **problem.options)
    out, lse = to_bits(out, "bf16"), lse.astype(np.float32)
    out[~problem.is_used("q")] = poison_of(out.dtype)
    lse[:, ~problem.is_used("q")] = poison_of(lse.dtype)
    return problem, out, lse


def test_a_packed_result_passes(packed):
    problem, out, lse = packed
    assert np.flatnonzero(~problem.is_used("q")).tolist() == [0, 1, 40, 41, 46]
    check(problem, out, lse)
    check(problem, out, None)


@pytest.mark.parametrize("row", [1, 40, 46])
def test_any_bit_written_to_a_row_of_no_sequence_is_refused(packed, row):
    """Also if what is written is NaN."""
    problem, out, lse = packed
    damaged = out.copy()
    damaged[row, 1, 63] = 0x7FFF
    with pytest.raises(AssertionError, match="out: 1 rows written"):
        check(problem, damaged, lse)
    lse[1, row] = np.float32(NAN)
    with pytest.raises(AssertionError, match="LSE: 1 rows written"):
        check(problem, out, lse)


@pytest.mark.parametrize("row, words", [(20, "out of sequence 0"), (42, "out of the short sequences")])
def test_a_wrong_row_is_refused_in_its_sequence(packed, row, words):
    problem, out, lse = packed
    out[row] = 0
    with pytest.raises(AssertionError, match=words):
        check(problem, out, lse)


# ---- FP8 -----------------------------------------------------------------------------------------------------------


FP8_CASE = Case(FP8, 64, True, 6, 2, 40, 70, batch=2, out_dtype="bf16")
FP8_LAYOUT = Layout((40, 0, 33), (70, 20, 50), before=2, after=1)


def fp8_problem(kind="dense", **changes) -> Problem:
    case = replace(FP8_CASE, **changes)
    if kind == "packed":
        return packed_problem(case, FP8_LAYOUT, descale=descales.per_batch_and_head)
    return make_problem(case, descale=descales.per_batch_and_head)


def twin_result(problem, **options) -> tuple[np.ndarray, np.ndarray]:
    """What the twin gives, other options instead of the problem's, as if a kernel had written it."""
    case = problem.case
    out, lse = low_precision_twin(*problem.inputs, FP8, out_dtype=case.out_dtype, **{**problem.options, **options})
    out, lse = to_bits(out, case.out_dtype), lse.astype(np.float32)
    unused = ~problem.is_used("q")
    out[unused] = poison_of(out.dtype)
    lse.swapaxes(-1, -2)[unused] = poison_of(lse.dtype)
    return out, lse


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("out_dtype", FP8_OUT_DTYPES)
def test_the_fp8_twin_passes(gpu, out_dtype, kind):
    problem = fp8_problem(kind, out_dtype=out_dtype)
    assert problem.out.array.dtype == {"bf16": np.uint16, "fp16": np.float16}[out_dtype]
    check(problem, *twin_result(problem))


WRONG_DESCALES = {
    "another head's": lambda x: np.roll(x, 1, axis=1),
    "another sequence's": lambda x: np.roll(x, 1, axis=0),
    "one for all": lambda x: np.full_like(x, x[0, 0]),
    "none": np.ones_like,
}


@pytest.mark.parametrize("wrong", WRONG_DESCALES.values(), ids=WRONG_DESCALES.keys())
@pytest.mark.parametrize("name", descales.RANGES)
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_wrong_descale_is_refused(gpu, kind, name, wrong):
    """By O alone, without LSE."""
    problem = fp8_problem(kind)
    name = f"{name}_descale"
    out, lse = twin_result(problem, **{name: wrong(problem.descales[name].array)})
    with pytest.raises(AssertionError, match="out of"):
        check(problem, out, None)
    if name != "v_descale":
        right_out, _ = twin_result(problem)
        with pytest.raises(AssertionError, match="LSE at"):
            check(problem, right_out, lse)


def test_descales_of_q_by_kv_head_are_refused(gpu):
    problem = fp8_problem()
    q_descale = problem.descales["q_descale"].array
    with pytest.raises(AssertionError, match="head"):
        check(problem, *twin_result(problem, q_descale=np.repeat(q_descale[:, :2], 3, axis=1)))


def test_a_wrong_head_is_found_beside_a_much_larger_one(gpu):
    """Its values are less than the other head's error."""
    problem = fp8_problem()
    problem.descales["v_descale"].array[...] = (1.0, 1e-4)
    out, lse = twin_result(problem)
    check(problem, out, lse)
    out[0, :, 4] = 0
    with pytest.raises(AssertionError, match="out of sequence 0, head 4"):
        check(problem, out, lse)


def test_nan_from_unused_rows_is_refused(gpu):
    problem = fp8_problem("packed")
    out, lse = twin_result(problem)
    out[50, 3, 7] = 0x7FFF
    with pytest.raises(AssertionError, match="1 elements are NaN"):
        check(problem, out, lse)


def test_weights_rounded_without_their_scale_are_refused(gpu, monkeypatch):
    """P as it is, not 2^8 times it: 70 weights of 3e-4 become zero."""
    problem = fp8_problem(is_causal=False)
    problem.k.array[...] = 0
    problem.q.array[..., 0] = to_bits(8.0, FP8)
    problem.k.array[:, 5, :, 0] = to_bits(8.0, FP8)
    problem.v.array[...] = to_bits(1.0, FP8)
    problem.v.array[:, 5] = 0
    for tensor in problem.descales.values():
        tensor.array[...] = 1
    check(problem, *twin_result(problem))
    with monkeypatch.context() as patched:
        patched.setitem(TWINS, FP8, replace(TWINS[FP8], round_p=TWINS[FP8].round_input))
        out, lse = twin_result(problem)
    with pytest.raises(AssertionError, match="max error"):
        check(problem, out, lse)


@pytest.mark.parametrize(
    "error, exact_scores, words",
    [(5e-4, False, None), (5e-4, True, "LSE at"), (5e-5, True, None), (0.05, False, "LSE at")],
)
def test_the_lse_of_fp8_may_be_off_as_its_scores_may(gpu, error, exact_scores, words):
    problem = replace(fp8_problem(), exact_scores=exact_scores)
    out, lse = twin_result(problem)
    with pytest.raises(AssertionError, match=words) if words else nullcontext():
        check(problem, out, lse + np.float32(error))


@pytest.mark.parametrize("layout", descales.LAYOUTS.values(), ids=descales.LAYOUTS.keys())
def test_descales_reach_the_call(gpu, layout):
    """At the address and with the strides of the params lies what the reference is given; NaN around it."""
    problem = make_problem(FP8_CASE, descale=layout)
    params = params_of(problem)
    assert params.out_dtype == DataType.BF16 and not contract_problems(params)
    for name, heads in (("q_descale", 6), ("k_descale", 2), ("v_descale", 2)):
        pointer, *strides = (getattr(params, f"{name}_{field}") for field in ("ptr", "batch_stride", "head_stride"))
        assert bool(pointer) == (name in problem.descales)
        if pointer:
            expected = problem.options[name]
            got = [
                [gpu.read(pointer + 4 * int(np.dot((b, h), strides)), (1,), np.float32)[0] for h in range(heads)]
                for b in range(2)
            ]
            assert np.array_equal(got, expected) and np.isfinite(expected).all()
            low, high = descales.RANGES[name[0]]
            assert low * 0.999 <= expected.min() and expected.max() <= high * 1.001
            assert np.isnan(gpu.read(pointer - 4, (1,), np.float32)[0])


@pytest.mark.parametrize("place", [contiguous, padded, heads_before_rows], ids=lambda place: place.__name__)
def test_fp8_tensors_have_strides_that_a_call_accepts(gpu, place):
    for head_dim in FP8_HEAD_DIMS:
        problem = make_problem(replace(FP8_CASE, head_dim=head_dim), place)
        assert not contract_problems(params_of(problem))
        for tensor in (problem.q, problem.k, problem.v):
            assert not any(stride % 16 for stride in tensor.strides[:-1]) and tensor.strides[-1] == 1
        gaps = gpu.read(problem.v.address + head_dim, (16,), np.uint8)
        assert (gaps == POISON).all() == (place is padded)


def test_the_fp8_grid_meets_every_choice():
    """Every head_dim and mask: each head ratio with each out_dtype, with LSE and without."""
    for head_dim, is_causal in product(FP8_HEAD_DIMS, (False, True)):
        cases = [case for case in FP8_GRID if (case.head_dim, case.is_causal) == (head_dim, is_causal)]
        for heads, out_dtype, has_lse in product(HEADS.values(), FP8_OUT_DTYPES, (False, True)):
            assert any(case == replace(with_heads(case, heads), out_dtype=out_dtype, has_lse=has_lse) for case in cases)
    assert len({str(case) for case in FP8_GRID}) == len(FP8_GRID)


def test_source_hash_covers_every_file_of_the_package():
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fa3_cute").glob("**/*.py"), key=lambda path: path.relative_to(ROOT).as_posix()):
        digest.update(path.relative_to(ROOT).as_posix().encode("utf-8"))
        digest.update(b"\0")
        digest.update(path.read_bytes())
    assert source_hash() == digest.hexdigest()
