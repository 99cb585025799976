"""The benchmark in FP8: its suite, bytes and limits, our BF16 kernel beside it, where its tables go."""

import json
from argparse import ArgumentParser
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from fake_fp8 import install_fp8
from fake_gpu import OFFSET_BITS, fake_stopwatch

from fa3_cute import DataType
from fa3_cute.runtime import launch
from fa3_cute.cli import bench, dev, main, report, results, trial
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case
from fa3_cute.cli.measure import Batch
from fa3_cute.cli.shown import OURS, OURS_16
from fa3_cute.cli.suites import decode, fp8, prefill, varlen, window
from fa3_cute.cli.trial import Question
from fa3_cute.contract.formats import FP8
from fa3_cute.contract.reference import as_float, round_to


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_cases():
    cases = fp8.cases(parsed())
    assert len(set(cases)) == len(cases) == 5 * 2 * 4 + 2 + 2 * 4 and {case.dtype for case in cases} == {FP8}
    dense, grouped, packed = cases[:40], cases[40:42], cases[42:]
    assert {(case.head_dim, case.num_heads) for case in dense} == {
        (64, 32),
        (96, 16),
        (128, 16),
        (192, 12),
        (256, 8),
    }
    assert {case.seqlen_k for case in dense} == {512, 1024, 4096, 16384}
    assert {case.batch_size * case.seqlen_q for case in dense} == {16384}
    assert [case.name for case in grouped] == ["fp8_e4m3 d128 full h64:8 1x8192", "fp8_e4m3 d128 causal h64:8 1x8192"]
    assert [(case.layout, case.mask, case.head_dim, case.heads) for case in packed] == [
        (f"packed {label}", mask, 128, "16")
        for mask in ("full", "causal")
        for label in ("256+512+128", "8x2048", "64 of 64..4096", "16384+64x128")
    ]
    assert [case.lengths for case in packed[:4]] == [
        varlen.LAYOUTS[case.label.removeprefix("packed ")] for case in packed[:4]
    ]


def test_cases_narrowed():
    assert [case.name for case in fp8.cases(parsed("--head-dim", "64", "--seqlen", "2048", "--causal"))] == [
        "fp8_e4m3 d64 causal h32 8x2048"
    ]
    assert {case.head_dim for case in fp8.cases(parsed("--head-dim", "64,96"))} == {64, 96}
    assert {case.mask for case in fp8.cases(parsed("--full"))} == {"full"}


@pytest.mark.parametrize("suite, count", [(prefill, 5 * 2 * 6), (varlen, 24), (window, 6), (decode, 2 * 13)])
def test_other_suites_in_fp8(suite, count):
    cases = suite.cases(parsed("--dtype", FP8))
    assert len(cases) == count and {case.head_dim for case in cases} <= {64, 96, 128, 192, 256}
    assert {case.dtype for case in cases} == {FP8}
    if suite is window:
        assert len(window.conclusions(dict.fromkeys(cases, 1.0))) == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--suite", "fp8", "--dtype", "bf16"], "the fp8 suite has its own dtype"),
        (["--suite", "fp8", "--num-heads", "4"], "the fp8 suite has its own num_heads"),
    ],
)
def test_what_cannot_be(argv, said, capsys):
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err == f"{said}\n"


def test_bytes():
    """K, V and Q have one byte per element, O has two."""
    case = Case(FP8, 128, False, 1, 8192, 16, 16, 2, l2="cold")
    assert case.kv_bytes == 2 * 16 * 8192 * 2 * 128
    assert case.nbytes == case.kv_bytes + 3 * 16 * 16 * 128
    assert case.kv_sets == 300_000_000 // case.kv_bytes + 1 == 5
    twin = bench.own(case)[OURS_16]
    assert (twin.dtype, twin.kv_bytes, twin.kv_sets) == ("bf16", 2 * case.kv_bytes, 3)
    assert case.element_out == "bf16" and replace(case, out_dtype="fp16").element_out == "fp16"
    assert replace(case, out_dtype="bf16").name == case.name
    assert replace(case, out_dtype="fp16").name.startswith("fp8_e4m3->fp16 d128 ")
    assert bench.own(twin) == {OURS: twin}


def test_peak_and_limits():
    case = Case(FP8, 128, False, 1024, 1024, 1, 16, 16)
    batches = [Batch(1.0, 1.0, 1500, None)]
    eight, sixteen = (results.medians(each, batches, batches, 132)["peak"] for each in bench.own(case).values())
    assert eight == pytest.approx(case.flops / 1e-3 / (132 * 8192 * 1500e6)) and sixteen == pytest.approx(2 * eight)
    limits = [bench.limit(FP8, name) for name in (OURS, "fa3", OURS_16)] + [bench.limit("fp16", OURS)]
    assert limits == [6e-2, 6e-2, 1e-2, 1e-2]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    return install_fp8(monkeypatch)


def test_tensors_are_e4m3(gpu):
    case = Case(FP8, 64, False, 5, 70, 2, 4, 2)
    tensors = case_module.Tensors([case], gpu.stream)
    params = tensors.params(case)
    assert (params.dtype, params.out_dtype) == (DataType.FP8_E4M3, DataType.BF16)
    assert params.q_descale_ptr is params.k_descale_ptr is params.v_descale_ptr is None
    k = gpu.read(params.k, case.kv_shape, np.uint8)
    assert np.array_equal(k, tensors.numbers("k", 0, case.kv_shape))
    values = as_float(k)
    assert np.array_equal(round_to(values, FP8), values) and 0.9 < values.std() < 1.1 and abs(values.mean()) < 0.1
    assert tensors.buffers["q"].bytes.size == prod(case.q_shape) == tensors.buffers["out"].bytes.size // 2


ARGV = ["bench", "--suite", "fp8", "--head-dim", "64", "--seqlen", "96", "--rounds", "2"]


def test_bench_beside_our_own_bf16(gpu, tmp_path, monkeypatch, capsys):
    """Of the same sizes, in the same rounds; checked, printed, concluded from and kept like a peer."""
    monkeypatch.setattr(prefill, "TOKENS", 192)
    monkeypatch.setattr(prefill, "HIDDEN", 128)
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert list(written["environment"]["peers"]) == [OURS_16]
    assert [row["name"] for row in written["rows"]] == ["fp8_e4m3 d64 full h2 2x96", "fp8_e4m3 d64 causal h2 2x96"]
    for row in written["rows"]:
        assert 0 < row["errors"][OURS] < 1e-2 and 0 < row["errors"][OURS_16] < 5e-3
        assert (row["results"][OURS]["ms"], row["results"][OURS_16]["ms"]) == (10, 20)
        assert row["results"][OURS_16]["ratio"] == 2
    assert {DataType.FP8_E4M3, DataType.BF16} == set(gpu.calls)
    said = capsys.readouterr().out.splitlines()
    assert said[1].endswith("ours bf16  vs ours bf16")
    assert said[2].split()[-1] == "2.000" and "; ;" not in said[0]
    assert not written["conclusions"]  # of sequences as short as these


def test_a_wrong_bf16_result_fails(gpu, monkeypatch, capsys):
    right = gpu.forward

    def forward(params, stream):
        status = right(params, stream)
        if params.dtype is DataType.BF16:
            gpu.buffers[params.out >> OFFSET_BITS].bytes[:] = 0
        return status

    monkeypatch.setattr(gpu, "forward", forward)
    monkeypatch.setattr(prefill, "TOKENS", 96)
    assert main([*ARGV, "--full"]) == 1
    assert "ours bf16 is off by 1.0e+00" in capsys.readouterr().out.splitlines()[-1]


def test_decode_in_fp8(gpu, tmp_path, monkeypatch, capsys):
    """Each type takes turns on its own sets of K and V; bandwidths count its own bytes."""
    monkeypatch.setattr(decode, "PROBLEMS", {64: ((2, 1024, 4, 2),)})
    monkeypatch.setattr(case_module, "COLD_BYTES", 2_000_000)
    for module in (case_module, results):
        monkeypatch.setattr(module, "COPIED_BYTES", 300_000)
    file = tmp_path / "rows.json"
    assert (
        main(["bench", "--suite", "decode", "--dtype", FP8, "--rounds", "2", "--batch-ms", "2", "--json", str(file)])
        == 0
    )
    warm, cold = json.loads(file.read_text())["rows"]
    assert (warm["case"]["kv_sets"], cold["case"]["kv_sets"]) == (1, 4)
    kv_bytes = 2 * 2 * 1024 * 2 * 64
    for row in (warm, cold):
        eight, sixteen = row["results"][OURS], row["results"][OURS_16]
        assert eight["ms"] == pytest.approx(1 / 20) and sixteen["ms"] == pytest.approx(1 / 20)
        assert eight["gbs"] == pytest.approx((kv_bytes + 3 * 2 * 4 * 64) / eight["ms"] / 1e6)
        assert sixteen["gbs"] == pytest.approx((2 * kv_bytes + 4 * 2 * 4 * 64) / sixteen["ms"] / 1e6)
        assert row["errors"][OURS] < 1e-2 and row["errors"][OURS_16] < 5e-3
    # Captured K's of the two rows: 20 calls of ours, then 20 of the BF16 kernel, whose sets are 2 and twice as long.
    eight, sixteen = gpu.captured_k[40:60], gpu.captured_k[60:]
    assert len(set(eight)) == 4 and len(set(sixteen)) == 2 and len(gpu.captured_k) == 80
    assert max(eight) - min(eight) == 3 * kv_bytes // 2 and max(sixteen) - min(sixteen) == kv_bytes
    said = capsys.readouterr().out
    assert "slower than ours bf16 in none of 2 rows from 1024 tokens up" in said and "better peer" not in said


def test_conclusions():
    cases = fp8.cases(parsed("--head-dim", "128", "--full"))[:3]
    assert [case.seqlen_k for case in cases] == [512, 1024, 4096]

    def row(case, ratio, peer, host_bound=False):
        result = {"host_bound": False}
        return {
            "name": case.name,
            "case": case.as_dict(),
            "results": {
                OURS: result | {"ratio": 1.0},
                OURS_16: result | {"ratio": ratio},
                "fa3": {"host_bound": host_bound, "ratio": peer},
            },
        }

    rows = [row(cases[0], 0.9, 1.1), row(cases[1], 0.95, 0.8, True), row(cases[2], 1.2, 0.99)]
    assert fp8.conclusions({}, rows) == [
        "slower than the better peer in 1 of 2 rows (its time over ours): fp8_e4m3 d128 full h16 4x4096 (fa3 0.990)",
        (
            "slower than ours bf16 in 1 of 2 rows from 1024 tokens up (its time over ours): "
            "fp8_e4m3 d128 full h16 16x1024 (0.950)"
        ),
    ]


@pytest.mark.parametrize(
    "question", [Question(FP8, 64, "causal", seqlens=(256,)), Question(FP8, 64, is_decode=True, seqlens=(512,))]
)
def test_dev_checks_fp8(question, gpu, monkeypatch):
    monkeypatch.setattr(case_module, "COLD_BYTES", 1_000_000)
    monkeypatch.setattr(prefill, "TOKENS", 512)
    monkeypatch.setattr(trial, "open_device", bench.open_device)
    monkeypatch.setattr(trial, "download", gpu.download)
    monkeypatch.setattr(trial, "Stopwatch", lambda device, stream: fake_stopwatch(stream, monkeypatch))
    monkeypatch.setattr(launch, "launch_through", lambda params, cfg, stream: gpu.forward(params, stream))
    found = dev.measure_task(question)()
    assert 0 < found["worst_row"] < 1e-2 and found["wrong"] == 8e-2
    assert set(gpu.calls) == {DataType.FP8_E4M3}


# ---- report ----------------------------------------------------------------------------------------------------------


def run_of(suite: str, cases) -> dict:
    """A file of results, with a column of our BF16 kernel's and one of a peer's."""
    result = {
        "ms": 0.5,
        "tflops": 800.0,
        "peak": 0.5,
        "gbs": 3000.0,
        "of_copy": 0.75,
        "ratio": 1.0,
        "host_bound": False,
    }
    results = {
        OURS: result,
        OURS_16: result | {"ms": 0.75, "tflops": 533.3, "ratio": 1.5},
        "fa3": result | {"tflops": 720.0, "ratio": 1.11},
    }
    rows = [{"name": case.name, "case": case.as_dict(), "results": results} for case in cases]
    known = {
        "suite": suite,
        "command": f"python -m fa3_cute bench --suite {suite}",
        "gpu": "NVIDIA H200",
        "sms": 132,
        "clock_problem": "none",
        "dsl": "4.8.1",
        "dsl_cuda": "12.9",
        "sources": "0123456789abcdef",
        "peers": {OURS_16: "", "fa3": "fa3-fwd 0.0.3"},
        "date": "2026-11-22T12:00:00",
    }
    return {"environment": known, "rows": rows, "conclusions": ["so it is"]}


def test_report_into_the_place_of_fp8(tmp_path, capsys):
    """Whatever suite it is of; what was measured in 16 bits stays."""
    runs = {
        "fp8.json": run_of("fp8", fp8.cases(parsed("--head-dim", "128", "--seqlen", "4096"))),
        "fp8-decode.json": run_of("decode", decode.cases(parsed("--head-dim", "96", "--dtype", FP8))),
        "decode.json": run_of("decode", decode.cases(parsed("--head-dim", "96"))),
    }
    for name, run in runs.items():
        (tmp_path / name).write_text(json.dumps(run))
    begin, end = "<!-- performance of fp8: begin -->", "<!-- performance of fp8: end -->"
    marks = [
        f"{report.BEGIN}\nall\n{report.END}",
        "<!-- performance of decode: begin -->\nformer\n<!-- performance of decode: end -->",
        f"{begin}\nformer FP8\n{end}",
    ]
    document = tmp_path / "document.md"
    document.write_text("\n".join(marks) + "\n")
    files = [str(tmp_path / name) for name in ("fp8.json", "fp8-decode.json")]
    for _ in range(2):
        assert main(["report", "--into", str(document), *files]) == 0
    text = document.read_text()
    assert text.startswith("\n".join(marks[:2])) and "former FP8" not in text
    own = text[text.index(begin) : text.index(end)]
    assert own.index(f"### {fp8.TITLE}") < own.index(f"### {decode.TITLE}") and own.count("### ") == 2
    assert "| of peak | BF16 TFLOP/s | BF16 time / ours | FA3 TFLOP/s | FA3 time / ours |\n" in own
    assert (
        "\n| FP8_E4M3 | 128 | 16 | 4x4096 | 500.0 / 500.0 | 800.0 / 800.0 | 50% / 50% | 533.3 / 533.3 | "
        "1.50 / 1.50 | 720.0 / 720.0 | 1.11 / 1.11 |\n"
    ) in own
    assert "for CUDA 12.9; fa3-fwd 0.0.3; 2026" in own
    assert main(["report", "--into", str(document), str(tmp_path / "decode.json")]) == 0
    text = document.read_text()
    assert own in text and text.count(f"### {decode.TITLE}") == 2 and "former" not in text
    assert capsys.readouterr().out == ""


def test_bars_of_fp8(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "fp8.json", tmp_path / "out.png"
    file.write_text(json.dumps(run_of("fp8", fp8.cases(parsed("--head-dim", "128")))))
    assert main(["report", "--plot", str(picture), str(file)]) == 0 and picture.stat().st_size > 1000


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_runs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(prefill, "TOKENS", 2048)
    monkeypatch.setattr(varlen, "LAYOUTS", {"256+512+128": (256, 512, 128)})
    monkeypatch.setattr(fp8, "SEQLENS", (1024,))
    monkeypatch.setattr(fp8, "GROUPED_SEQLEN", 512)
    file = tmp_path / "rows.json"
    assert (
        main(
            ["bench", "--suite", "fp8", "--head-dim", "64,128", "--rounds", "2", "--batch-ms", "2", "--json", str(file)]
        )
        == 0
    )
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 + 2 + 2
    for row in rows:
        assert 0 < row["errors"][OURS_16] < row["errors"][OURS] < bench.limit(FP8, OURS)
        assert row["results"][OURS]["tflops"] > 0 and row["results"][OURS_16]["ratio"] > 0
