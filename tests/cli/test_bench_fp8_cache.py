"""The benchmark's suite of 16-bit queries over an FP8 cache: cases, what is timed beside them, what is counted."""

from argparse import Namespace

from fa3_cute import DataType
from fa3_cute.cli import bench
from fa3_cute.cli.case import call_of
from fa3_cute.cli.shown import OURS, OURS_8, OURS_16
from fa3_cute.cli.suites import fp8cache
from fa3_cute.contract.formats import FP8

CASES = fp8cache.cases(Namespace(dtype=None, head_dim=None))


def test_cases():
    assert {case.head_dim for case in CASES} == {64, 128}
    assert all(case.kv_dtype == FP8 and case.dtype == "bf16" and case.head_dim in bench.served(case) for case in CASES)
    assert CASES[0].name == "bf16 over fp8_e4m3 d64 full h32:8 64x(1:8192) warm"
    assert fp8cache.cases(Namespace(dtype=None, head_dim=[96])) == []


def test_the_same_sizes_are_timed_in_bf16_and_in_fp8():
    case = CASES[-1]
    beside = bench.own(case)
    assert list(beside) == [OURS, OURS_16, OURS_8] and beside[OURS] is case
    assert [beside[name].dtype for name in (OURS_16, OURS_8)] == ["bf16", FP8]
    assert beside[OURS_16].kv_bytes == 2 * case.kv_bytes == 2 * beside[OURS_8].kv_bytes
    assert beside[OURS_16].nbytes - case.nbytes == case.kv_bytes
    assert [bench.limit("bf16", name) for name in (OURS, OURS_16, OURS_8)] == [1e-2, 1e-2, 6e-2]


def test_the_call_says_what_keys_are():
    fields = call_of(CASES[0], {})
    assert (fields["dtype"], fields["kv_dtype"]) == (DataType.BF16, DataType.FP8_E4M3)


def test_conclusions_say_the_share_of_time():
    results = {OURS: {"ratio": 1.0}, OURS_16: {"ratio": 1.6, "host_bound": False}, OURS_8: {"ratio": 0.8}}
    results[OURS_8]["host_bound"] = results[OURS]["host_bound"] = False
    row = {"name": "a case", "case": {"seqlen_k": 8192}, "results": results}
    lines = fp8cache.conclusions({}, [row])
    assert lines[-1] == "a case: 0.625x of ours bf16, 1.250x of ours fp8"
    assert lines[0].startswith("slower than ours bf16 in none of 1")
