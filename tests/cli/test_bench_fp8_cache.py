"""The benchmark's suite of 16-bit queries over an FP8 cache: cases, what is timed beside them, what is counted; steps
that append to it."""

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_append import AppendingGpu

from fa3_cute import DataType
from fa3_cute.cli import bench, main, results
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case, call_of
from fa3_cute.cli.features import arrays_of
from fa3_cute.cli.shown import OURS, OURS_8, OURS_16
from fa3_cute.cli.suites import append, fp8cache
from fa3_cute.contract.formats import FP8
from fa3_cute.contract.status import Status
from fa3_cute.planning.append import append_config
from fa3_cute.planning.operations import checked, operation_of, problems
from fa3_cute.contract.plain import plain

CASES = fp8cache.cases(Namespace(dtype=None, head_dim=None))
DECODE = [case for case in CASES if not case.group]
STEPS = [case for case in CASES if case.group]


def params_of(case: Case):
    pointers = dict.fromkeys(("q", "k", "v", "out", *case.index_shapes(), *arrays_of(case)), 1 << 20)
    return case_module.Tensors.params(SimpleNamespace(pointers=lambda case, kv_set: dict(pointers)), case)


def test_cases():
    assert {case.head_dim for case in DECODE} == {64, 128}
    assert all(case.kv_dtype == FP8 and case.dtype == "bf16" and case.head_dim in bench.served(case) for case in CASES)
    assert CASES[0].name == "bf16 over fp8_e4m3 d64 full h32:8 64x(1:8192) warm"
    assert fp8cache.cases(Namespace(dtype=None, head_dim=[96])) == []
    assert {case.head_dim for case in fp8cache.cases(Namespace(dtype=None, head_dim=[64]))} == {64}


def test_steps_stand_beside_the_same_without():
    """Dense and over pages; each is a good call, of which the appending one quantises what it rotates."""
    assert len(STEPS) == 12 and len({case.name for case in CASES}) == len(CASES)
    for without, step in zip(STEPS[::2], STEPS[1::2], strict=True):
        assert replace(step, scores=append.WITHOUT) == without and step.group == without.group
        for case, ahead in ((without, []), (step, [append_config("bf16", "halves", "bf16", FP8)])):
            params = params_of(case)
            assert problems(params) == [], case.name
            *found, attention = [launch.config for launch in operation_of(checked(plain(params))).launches]
            assert found == ahead and attention.kv_dtype == FP8
    assert (params.kv_new_dtype, params.kv_dtype) == (DataType.BF16, DataType.FP8_E4M3)
    assert STEPS[1].name == "bf16 over fp8_e4m3 d128 full h32:8 1x4096 contiguous warm append, rotary"


def test_the_same_sizes_are_timed_in_bf16_and_in_fp8():
    case = DECODE[-1]
    beside = bench.own(case)
    assert list(beside) == [OURS, OURS_16, OURS_8] and beside[OURS] is case
    assert [beside[name].dtype for name in (OURS_16, OURS_8)] == ["bf16", FP8]
    assert beside[OURS_16].kv_bytes == 2 * case.kv_bytes == 2 * beside[OURS_8].kv_bytes
    assert beside[OURS_16].nbytes - case.nbytes == case.kv_bytes
    assert [bench.limit("bf16", name) for name in (OURS, OURS_16, OURS_8)] == [1e-2, 1e-2, 6e-2]


def test_fp8_queries_are_not_rotated():
    without, step = STEPS[:2]
    assert list(bench.own(without)) == [OURS, OURS_16, OURS_8] and list(bench.own(step)) == [OURS, OURS_16]
    for case in (*bench.own(without).values(), *bench.own(step).values()):
        assert problems(params_of(case)) == [], case.name


def test_the_call_says_what_keys_are():
    fields = call_of(CASES[0], {})
    assert (fields["dtype"], fields["kv_dtype"]) == (DataType.BF16, DataType.FP8_E4M3)
    assert "kv_new_dtype" not in fields


def test_conclusions_say_the_share_of_time():
    results = {OURS: {"ratio": 1.0}, OURS_16: {"ratio": 1.6, "host_bound": False}, OURS_8: {"ratio": 0.8}}
    results[OURS_8]["host_bound"] = results[OURS]["host_bound"] = False
    row = {"name": "a case", "case": {"seqlen_k": 8192}, "results": results}
    lines = fp8cache.conclusions({CASES[0]: 1.0}, [row])
    assert lines[-1] == "a case: 0.625x of ours bf16, 1.250x of ours fp8"
    assert lines[0].startswith("slower than ours bf16 in none of 1")


def test_conclusions_say_what_a_step_is_compared_with():
    results = {OURS: {"ratio": 1.0, "of_first": 1.25}, OURS_16: {"ratio": 1.6, "host_bound": False}}
    rows = [{"name": case.name, "case": {"seqlen_k": 4096}, "results": results} for case in STEPS[:2]]
    said = "+2.00 us, 1.250x the time of the same step without, 8 MB of K and V"
    assert fp8cache.conclusions({STEPS[0]: 0.008, STEPS[1]: 0.010}, rows)[-1] == f"{STEPS[1].name}: {said}"


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(append, "STEPS", ((3, 96),))
    monkeypatch.setattr(append, "PAGES", (0, 16))
    monkeypatch.setattr(fp8cache, "APPENDING_DIM", 64)
    monkeypatch.setattr(fp8cache, "APPENDING_HEADS", ((4, 2),))
    monkeypatch.setattr(fp8cache, "PROBLEMS", {64: ((2, 64, 4, 2),)})
    monkeypatch.setattr(case_module, "COLD_BYTES", 100_000)
    for module in (case_module, results):
        monkeypatch.setattr(module, "COPIED_BYTES", 300_000)
    return AppendingGpu(monkeypatch)


def test_bench_from_end_to_end(fake, tmp_path, capsys):
    """Every row is right, and has what is timed beside it; tables have a dash where there is no first row."""
    file = tmp_path / "rows.json"
    assert main(["bench", "--suite", "fp8cache", "--rounds", "2", "--batch-ms", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"]["scores"] for row in rows] == ["", "", *["without", "append, rotary"] * 2]
    for row in rows:
        assert row["errors"][OURS] < 1e-2, row["name"]
        assert ("of_first" in row["results"][OURS]) == bool(row["case"]["scores"])
        assert (OURS_8 in row["results"]) == (row["case"]["scores"] != "append, rotary")
    capsys.readouterr()
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert "| BF16 | 64 | 4:2 | 3x96 | page 16 | append, rotary | " in said and " | 1.000 | " in said


@pytest.mark.parametrize("left_out", ["key", "values", "rotary"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_step_that_leaves_something_out_is_wrong(left_out, page_size, fake):
    seqlen = 2048
    sizes = dict.fromkeys(("seqlen_k",), seqlen) | {"lengths_k": (seqlen,) * 3, "page_size": page_size}
    step = replace(STEPS[0], batch_size=3, num_heads=4, num_heads_k=2, head_dim=64, **sizes)
    _, case = append.problem(step, (append.WITHOUT, append.ROTATED))
    tensors = case_module.Tensors([case], fake.gpu.stream)
    for fake.left_out, is_right in (("", True), (left_out, False)):
        tensors.poison_out()
        assert fake.forward(tensors.params(case), 1) is Status.OK
        assert (tensors.error_of(case) < bench.limit("bf16", OURS)) == is_right
