"""The judge of the GPU tests is itself judged: the tolerance rule passes what it should and names what it refuses."""
import hashlib

import numpy as np
import pytest
from check import assert_lse, assert_out
from conftest import ROOT, source_hash

from fa3_cute.reference import attention_reference, low_precision_twin, round_to

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
    (lambda out: np.where(np.indices(out.shape)[1] == 30, NAN, out), "NaN: 128 places, expected 0"),
    (lambda out: np.roll(out, 1, axis=2), "worst at"),
])
def test_a_damaged_output_is_refused(attended, damage, words):
    ref, twin = attended
    with pytest.raises(AssertionError, match=words):
        assert_out(damage(twin), ref, twin)


def test_a_lost_nan_is_refused(attended):
    ref, twin = (array.copy() for array in attended)
    ref[0, 3] = NAN
    with pytest.raises(AssertionError, match="NaN: 0 places, expected 128"):
        assert_out(twin, ref, twin)


@pytest.mark.parametrize("lse, words", [
    ([1.0002, -INF, NAN], "LSE at"), ([INF, -INF, NAN], "LSE at"), ([1.0, NAN, NAN], "LSE NaN"),
    ([1.0, -INF, -INF], "LSE NaN"), ([1.0, -80.0, NAN], "LSE -inf")])
def test_a_wrong_lse_is_refused(lse, words):
    ref = np.array([1.0, -INF, NAN])[None, None]
    assert_lse(ref + 5e-5, ref)
    with pytest.raises(AssertionError, match=words):
        assert_lse(np.array(lse)[None, None], ref)


def test_source_hash_covers_every_file_of_the_package():
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fa3_cute").glob("**/*.py"), key=lambda path: path.relative_to(ROOT).as_posix()):
        digest.update(path.relative_to(ROOT).as_posix().encode("utf-8"))
        digest.update(b"\0")
        digest.update(path.read_bytes())
    assert source_hash() == digest.hexdigest()
