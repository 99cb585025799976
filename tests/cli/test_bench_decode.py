"""The benchmark of decode: its problems, warm and cold calls, bandwidths beside a copy's, what is printed."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
from fake_gpu import COPY_MS, FakeBuilder, install

from fa3_cute import AttentionMode
from fa3_cute.cli import bench, main, peers, report, results, shown
from fa3_cute.cli import case as case_module
from fa3_cute.cli.case import Case
from fa3_cute.cli.measure import CALLS_PER_GRAPH, Batch, Work, in_turn
from fa3_cute.cli.suites import decode


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_cases():
    cases = decode.cases(parsed())
    assert len(cases) == 2 * 13 and len(set(cases)) == len(cases)
    assert all(case.is_decode and (case.dtype, case.mask) == ("bf16", "full") for case in cases)
    assert {case.head_dim for case in cases} == {64, 96, 128, 192, 256}
    assert {case.head_dim for case in cases if case.kv_bytes > decode.LARGE_BYTES} == {64, 128, 256}
    narrowed = decode.cases(parsed("--head-dim", "128", "--dtype", "fp16"))
    assert [case.name for case in narrowed[:2]] == [
        "fp16 d128 full h16:2 1x(1:2048) warm",
        "fp16 d128 full h16:2 1x(1:2048) cold",
    ]
    assert [f"{case.layout} {case.heads}" for case in narrowed[::2]] == [
        "1x(1:2048) 16:2",
        "4x(1:2048) 16:2",
        "1x(1:32768) 16:2",
        "1x(1:131072) 16:2",
        "16x(1:8192) 16:2",
        "64x(1:4096) 16:1",
        "64x(1:8192) 32:8",
    ]


def test_bytes_and_sets():
    for case in decode.cases(parsed()):
        cold = replace(case, l2="cold")
        assert case.kv_bytes == 4 * case.batch_size * case.seqlen_k * case.num_heads_k * case.head_dim
        assert case.nbytes == case.kv_bytes + 4 * case.batch_size * case.num_heads * case.head_dim
        assert case.kv_sets == (cold.kv_sets if case.l2 == "cold" else 1)
        assert cold.kv_sets * cold.kv_bytes > 300e6 >= (cold.kv_sets - 1) * cold.kv_bytes
        assert case.calls_per_graph >= CALLS_PER_GRAPH and case.calls_per_graph % cold.kv_sets == 0
        assert case.as_dict()["kv_sets"] == case.kv_sets and case.as_dict()["l2"] == case.l2
    prefill = Case("bf16", 128, False, 1024, 1024, 2, 16, 16)
    assert (prefill.kv_sets, prefill.calls_per_graph, prefill.is_decode) == (1, CALLS_PER_GRAPH, False)


def test_in_turn():
    order = []
    launch = in_turn([lambda name=name: order.append(name) for name in "abc"])
    for _ in range(7):
        launch()
    assert "".join(order) == "abcabca"


def test_a_set_lies_behind_the_other(monkeypatch):
    gpu = install(monkeypatch)
    monkeypatch.setattr(case_module, "DISTINCT_NUMBERS", 5003)
    monkeypatch.setattr(case_module, "COLD_BYTES", 100_000)
    case = Case("bf16", 64, False, 1, 70, 2, 4, 2, l2="cold")
    assert (case.kv_bytes, case.kv_sets) == (71680, 2)
    tensors = case_module.Tensors([case], gpu.stream)
    first, second = (tensors.params(case, kv_set) for kv_set in range(2))
    assert (second.k - first.k, second.v - first.v) == (35840, 35840)
    assert (first.q, first.out, first.mode) == (second.q, second.out, AttentionMode.DECODE)
    for params in (first, second):
        tensors.poison_out()
        gpu.forward(params, 1)
        assert [tensors.error_of(case, kv_set) < 5e-3 for kv_set in range(2)] == [
            params is first,
            params is second,
        ]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch):
    """A small problem with three sets of K and V, which are 98304 bytes each."""
    monkeypatch.setattr(decode, "PROBLEMS", {64: ((2, 96, 4, 2),)})
    monkeypatch.setattr(decode, "LARGE_BYTES", 50_000)
    monkeypatch.setattr(case_module, "COLD_BYTES", 200_000)
    for module in (case_module, results):
        monkeypatch.setattr(module, "COPIED_BYTES", 300_000)
    return install(monkeypatch)


def fake_peer(gpu, monkeypatch, name: str):
    """A peer whose graph takes 2 ms for a replay; returns the addresses of K that it captured."""
    captured = []

    def make_launch(case, pointers):
        return lambda: captured.append(pointers["k"]) if gpu.stream.is_capturing else None

    def capture(launch, calls):
        builder = FakeBuilder(gpu.stream).begin_building()
        for _ in range(calls):
            launch()
        builder.end_building()
        return Work(lambda: setattr(gpu.stream, "now", gpu.stream.now + 2), calls)

    monkeypatch.setitem(
        peers.PEERS,
        name,
        lambda: SimpleNamespace(version=f"{name} 0", launch=make_launch, error=lambda case, pointers, launch: 1e-3),
    )
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    monkeypatch.setattr(peers, "capture", capture)
    return captured


ARGV = ["bench", "--suite", "decode", "--head-dim", "64", "--rounds", "2", "--batch-ms", "2"]


def test_bench_from_end_to_end(fake_gpu, tmp_path, monkeypatch, capsys):
    theirs = fake_peer(fake_gpu, monkeypatch, "fa3")
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--peers", "fa3", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert [row["case"]["l2"] for row in written["rows"]] == ["warm", "cold"]

    # Either row is 21 calls in a graph: on one set, and on three in turn; the peer reads what we read.
    ours = fake_gpu.captured_k
    assert len(ours) == len(theirs) == 42 and ours == theirs
    first = ours[0]
    assert ours[:21] == 21 * [first] and ours[21:] == 7 * [first, first + 49152, first + 98304]

    copy_gbs = 2 * 300_000 / COPY_MS / 1e6
    for row in written["rows"]:
        result, peer = row["results"][bench.OURS], row["results"]["fa3"]
        assert row["errors"][bench.OURS] < 5e-3 and row["host_us"] > 0 and "copy" not in row["results"]
        assert result["replayed"] and not result["host_bound"]
        assert result["ms"] == pytest.approx(1 / 21) and peer["ratio"] == pytest.approx(2)
        assert result["gbs"] == pytest.approx((98304 + 2048) / result["ms"] / 1e6)
        assert result["copy_gbs"] == pytest.approx(copy_gbs)
        assert result["of_copy"] == pytest.approx(result["gbs"] / copy_gbs)

    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["case", "us", "GB/s", "copy", "host", "us", "error", "fa3", "vs", "fa3"]
    assert said[2].split()[5:8] == ["warm", "47.6", "2"] and said[2].split()[-2:] == ["95.2", "2.000"]
    assert said[-2:] == written["conclusions"]
    assert said[-2] == "slower than the better peer in none of 2 rows"
    assert said[-1].startswith("bf16 d64 full h4:2 2x(1:96): 0.00 GB of K and V, at 702.5% warm and 702.5% cold of ")


def test_decode_that_is_not_captured_is_marked(fake_gpu, tmp_path, monkeypatch, capsys):
    fake_peer(fake_gpu, monkeypatch, "fa3")

    def refuse(launch, calls):
        raise RuntimeError("no capture")

    def make_launch(case, pointers):
        return lambda: setattr(fake_gpu.stream, "now", fake_gpu.stream.now + 0.01)

    monkeypatch.setattr(peers, "capture", refuse)
    monkeypatch.setitem(
        peers.PEERS,
        "fa3",
        lambda: SimpleNamespace(version="fa3 0", launch=make_launch, error=lambda case, pointers, launch: 1e-3),
    )
    assert main([*ARGV, "--peers", "fa3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].split()[-2] == "10.0*" and said[-1] == "fa3 cannot be captured into a CUDA graph: no capture"
    assert not [line for line in said if line.startswith("slower")]


def test_host_time_is_that_of_the_case_itself(fake_gpu, monkeypatch):
    """A shortened one would not be split."""
    seen = []
    monkeypatch.setattr(fake_gpu, "forward", lambda params, stream: seen.append(params.seqlen_k))
    case = Case("bf16", 64, False, 1, 1000, 1, 4, 2, l2="warm")
    run = bench.Bench.__new__(bench.Bench)
    run.handle, run.tensors = 1, {shown.OURS: case_module.Tensors([case], fake_gpu.stream)}
    run.stopwatch = SimpleNamespace(host_microseconds=lambda launch: launch())
    run.host_microseconds(case)
    run.host_microseconds(replace(case, l2="", seqlen_q=1000))
    assert seen == [1000, 128]


def test_bandwidths_are_medians_over_the_rounds():
    case = Case("bf16", 128, False, 1, 8192, 16, 16, 2, l2="cold")
    assert case.nbytes == 134_217_728 + 131_072
    ours, copies = ([Batch(ms, 1.0, None, None) for ms in list_] for list_ in ((0.04, 0.05, 0.02), (0.5, 1.0, 0.25)))
    found = results.bandwidths(case, ours, copies)
    copied = 2 * case_module.COPIED_BYTES
    assert found["gbs"] == pytest.approx(case.nbytes / 0.04 / 1e6)
    assert found["copy_gbs"] == pytest.approx(copied / 0.5 / 1e6)
    assert found["of_copy"] == pytest.approx(case.nbytes / copied * 12.5)


def test_fa3_splits_by_its_own_heuristic(monkeypatch):
    calls = []
    fake = {
        name: lambda *args, **options: calls.append((list(args), options)) or "out"
        for name in ("flash_attn_func", "flash_attn_varlen_func")
    }
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(**fake))
    monkeypatch.setattr(peers.metadata, "version", lambda name: "0")
    monkeypatch.setattr(peers, "view", lambda pointer, shape, dtype: (pointer, prod(shape)))
    case = Case("bf16", 128, False, 1, 8192, 4, 16, 2, l2="cold")
    peers.load("fa3").launch(case, {"q": 1, "k": 2, "v": 3})
    assert calls == [
        ([(1, 8192), (2, 1 << 23), (3, 1 << 23)], {"causal": False, "window_size": (-1, -1), "num_splits": 0})
    ]


# ---- what is concluded and rendered ----------------------------------------------------------------------------------


def result(ratio: float = 1.0, **other) -> dict:
    return {
        "ms": 0.0345,
        "tflops": 1.0,
        "peak": None,
        "gbs": 3890.4,
        "of_copy": 0.912,
        "ratio": ratio,
        "host_bound": False,
    } | other


def rows_of(cases, *peer_results: dict) -> list[dict]:
    return [
        {"name": case.name, "case": case.as_dict(), "results": {shown.OURS: result(), **theirs}}
        for case, theirs in zip(cases, peer_results, strict=True)
    ]


def test_conclusions():
    cases = decode.cases(parsed("--head-dim", "256"))
    assert [case.kv_bytes > decode.LARGE_BYTES for case in cases] == [True] * 4
    rows = rows_of(
        cases,
        {"fa3": result(1.2), "cudnn": result(0.98)},
        {"fa3": result(1.01)},
        {"fa3": result(0.5, host_bound=True)},
        {},
    )
    lines = decode.conclusions(dict.fromkeys(cases, 1.0), rows)
    assert lines[0] == (
        "slower than the better peer in 1 of 2 rows (its time over ours): "
        "bf16 d256 full h16:2 16x(1:8192) warm (cudnn 0.980)"
    )
    assert lines[1:] == [
        f"bf16 d256 full {case}: {gigabytes} GB of K and V, at 91.2% warm and 91.2% cold of the "
        "bandwidth of a copy on the device"
        for case, gigabytes in (("h16:2 16x(1:8192)", "0.27"), ("h32:8 32x(1:8192)", "2.15"))
    ]
    small = decode.cases(parsed("--head-dim", "96"))
    assert decode.conclusions(dict.fromkeys(small, 1.0), rows_of(small, {}, {})) == []


def decode_run(tmp_path, suite: str = "decode"):
    """A file of one problem's results."""
    cases = decode.cases(parsed("--head-dim", "192"))
    rows = rows_of(cases, {"fa3": result(1.25, ms=0.043)}, {"fa3": result(1.5, ms=0.0521, host_bound=True)})
    known = {
        "suite": suite,
        "command": f"python -m fa3_cute bench --suite {suite}",
        "gpu": "NVIDIA H200",
        "sms": 132,
        "clock_problem": "none",
        "dsl": "4.8.1",
        "dsl_cuda": "12.9",
        "sources": "0123456789abcdef",
        "peers": {"fa3": "fa3-fwd 0.0.3"},
        "date": "2026-11-22T12:00:00",
    }
    file = tmp_path / f"{suite}.json"
    file.write_text(json.dumps({"environment": known, "rows": rows, "conclusions": ["so it is"]}))
    return file


def test_report_puts_warm_and_cold_side_by_side(tmp_path, capsys):
    assert main(["report", str(decode_run(tmp_path))]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"### {decode.TITLE}\n\nIn a cell: warm / cold.\n") and "\n- so it is\n" in said
    assert "| sequences | us | GB/s | of copy | FA3 us | FA3 time / ours |\n" in said
    assert (
        "\n| BF16 | 192 | 16:2 | 16x(1:8192) | 34.5 / 34.5 | 3890 / 3890 | 91% / 91% | 43.0 / 52.1* | 1.25 / 1.50 |\n"
    ) in said


def test_report_into_the_place_of_a_suite(tmp_path, capsys):
    """The other tables stay; without a place of its own, a suite goes where they are."""
    begin, end = "<!-- performance of decode: begin -->", "<!-- performance of decode: end -->"
    assert begin == report.BEGIN.replace("performance:", report.OWN.format("decode"))
    files = [str(decode_run(tmp_path, suite)) for suite in ("decode", "prefill")]
    document = tmp_path / "document.md"
    document.write_text(f"a\n{report.BEGIN}\nformer\n{report.END}\nb\n{begin}\n{end}\nc\n")
    assert main(["report", "--into", str(document), files[0]]) == 0
    text = document.read_text()
    assert text.startswith(f"a\n{report.BEGIN}\nformer\n{report.END}\nb\n{begin}\n### Decode")
    assert text.endswith(f"\n{end}\nc\n")
    for _ in range(2):
        assert main(["report", "--into", str(document), *files]) == 0
    text = document.read_text()
    general, own = text.index("### Dense prefill"), text.index("### Decode")
    assert "former" not in text and text.count("### ") == 2
    assert text.index(report.BEGIN) < general < text.index(report.END) < text.index(begin) < own < text.index(end)

    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert main(["report", "--into", str(document), *files]) == 0
    assert document.read_text().startswith(f"{report.BEGIN}\n### Decode") and "### Dense" in document.read_text()
    document.write_text(begin)
    assert main(["report", "--into", str(document), files[0]]) == 2
    assert "performance of decode: end" in capsys.readouterr().err


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bench_runs_on_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "PROBLEMS", {128: ((2, 1024, 16, 2),)})
    monkeypatch.setattr(decode, "LARGE_BYTES", 1 << 20)
    monkeypatch.setattr(case_module, "COLD_BYTES", 1 << 23)
    file = tmp_path / "rows.json"
    assert main(["bench", "--suite", "decode", "--rounds", "2", "--batch-ms", "2", "--json", str(file)]) == 0
    warm, cold = json.loads(file.read_text())["rows"]
    assert (warm["case"]["kv_sets"], cold["case"]["kv_sets"]) == (1, 5)
    for row in (warm, cold):
        ours = row["results"][bench.OURS]
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS) and row["host_us"] > 0 and ours["replayed"]
        assert ours["gbs"] > 0 and ours["of_copy"] > 0 and 100 < ours["copy_gbs"] < 5000
    assert "of the bandwidth of a copy" in capsys.readouterr().out
