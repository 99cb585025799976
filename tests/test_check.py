"""The judge of the GPU tests is itself judged: the tolerance rule passes what it should and names what it refuses."""
import hashlib

import numpy as np
import pytest
from cases import Case, Layout
from check import Problem, Tensor, assert_lse, assert_out, check, poison_of
from conftest import ROOT, source_hash

from fa3_cute.reference import attention_reference, low_precision_twin, round_to, to_bits

NAN, INF = np.nan, np.inf


@pytest.fixture(scope="module")
def attended():
    q, k, v = (round_to(x, "bf16") for x in np.random.default_rng(0).standard_normal((3, 1, 60, 2, 64)))
    return attention_reference(q, k, v)[0], low_precision_twin(q, k, v, "bf16")[0]


def test_the_twin_passes(attended):
    ref, twin = attended
    assert_out(twin, ref, twin)
    assert_out(ref, ref, twin)


@pytest.mark.parametrize("damage, words", [
    (lambda out: np.where(np.indices(out.shape).sum(0) == 70, out + 0.02, out), "max error"),
    (lambda out: out * 1.01, "mean error"),
    (lambda out: np.where(np.indices(out.shape)[1] == 30, NAN, out), "128 elements are NaN or infinite"),
    (lambda out: np.roll(out, 1, axis=2), "worst at"),
])
def test_a_damaged_output_is_refused(attended, damage, words):
    ref, twin = attended
    with pytest.raises(AssertionError, match=words):
        assert_out(damage(twin), ref, twin)


def test_a_lost_nan_is_refused(attended):
    ref, twin = (array.copy() for array in attended)
    ref[0, 3] = NAN
    with pytest.raises(AssertionError, match="128 should be NaN and are not"):
        assert_out(twin, ref, twin)


@pytest.mark.parametrize("lse, words", [
    ([1.0002, -INF, NAN], "LSE at"), ([INF, -INF, NAN], "LSE at"), ([1.0, NAN, NAN], "LSE NaN"),
    ([1.0, -INF, -INF], "LSE NaN"), ([1.0, -80.0, NAN], "LSE -inf")])
def test_a_wrong_lse_is_refused(lse, words):
    ref = np.array([1.0, -INF, NAN])[None, None]
    assert_lse(ref + 5e-5, ref)
    with pytest.raises(AssertionError, match=words):
        assert_lse(np.array(lse)[None, None], ref)


@pytest.fixture
def packed():
    """A problem without a device, with the result that its twin gives: sequences of 40, 1, 0 and 3 rows."""
    layout = Layout((40, 1, 0, 3), (30, 2, 5, 3), before=2, after=1)
    case = Case("bf16", 64, True, 2, 1, layout.total_q, layout.total_k, batch=4)
    rng = np.random.default_rng(0)
    q, k, v = (Tensor(None, to_bits(rng.standard_normal((rows, heads, 64)), "bf16"))
               for rows, heads in ((case.seqlen_q, 2), (case.seqlen_k, 1), (case.seqlen_k, 1)))
    lengths = {name: Tensor(None, np.array(values, np.int32))
               for name, values in {**layout.cu_seqlens, "seqused_q": [38, 1, 0, 3]}.items()}
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


def test_source_hash_covers_every_file_of_the_package():
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fa3_cute").glob("**/*.py"), key=lambda path: path.relative_to(ROOT).as_posix()):
        digest.update(path.relative_to(ROOT).as_posix().encode("utf-8"))
        digest.update(b"\0")
        digest.update(path.read_bytes())
    assert source_hash() == digest.hexdigest()
