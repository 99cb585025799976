"""The benchmark: its order and arithmetic, what it prints and writes; other libraries are called as they expect."""

import json
import sys
from types import SimpleNamespace

import pytest
from fake_gpu import FakeStream, fake_stopwatch, install

from fa3_cute.cli import bench, main, measure, peers, results, shown
from fa3_cute.cli.case import Case
from fa3_cute.cli.measure import CALLS_PER_GRAPH, Batch, Stopwatch, Work
from fa3_cute.cli.suites import varlen, window
from fa3_cute.arrays.memory import hopper_device_problem
from fa3_cute.contract.status import Status


def test_bench_without_a_gpu(capsys):
    if hopper_device_problem() is None:
        pytest.skip("this machine has a Hopper GPU")
    assert main(["bench"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench needs a Hopper GPU: ")


def test_rounds_interleave(monkeypatch):
    stream, order = FakeStream(), []

    def launch(name, milliseconds):
        def run():
            stream.now += milliseconds
            if order[-1:] != [name]:
                order.append(name)

        return run

    stopwatch = fake_stopwatch(stream, monkeypatch)
    works = {name: Work(launch(name, milliseconds)) for name, milliseconds in (("a", 1.0), ("b", 4.0), ("c", 100.0))}
    batches = stopwatch.rounds(works, 3, batch_ms=40)
    assert {name: [batch.milliseconds for batch in list_] for name, list_ in batches.items()} == {
        "a": pytest.approx([1] * 3),
        "b": pytest.approx([4] * 3),
        "c": pytest.approx([100] * 3),
    }
    assert batches["a"][0].clock_mhz == 1500 and batches["a"][0].power_watts == 600
    assert "".join(order) == "abc" + "abc" + "acb" + "cab" + "cba"  # calibration, the unrecorded round, three rounds


def test_two_come_behind_each_other_in_turn(monkeypatch):
    stream, order = FakeStream(), []

    def launch(name):
        def run():
            stream.now += 10.0
            order.append(name)

        return run

    works = {name: Work(launch(name)) for name in "ab"}
    fake_stopwatch(stream, monkeypatch).rounds(works, 3, batch_ms=30)
    assert "".join(order[10:]) == "".join(3 * name for name in "ab" + "ba" + "ab" + "ba")


def test_the_same_work_settles_the_clock(monkeypatch):
    """Before each batch that is recorded, in as many launches as it takes."""
    stream, order, timed = FakeStream(), [], []

    def launch(name, milliseconds):
        def run():
            stream.now += milliseconds
            order.append(name)

        return run

    stopwatch = fake_stopwatch(stream, monkeypatch)
    time = stopwatch.time
    monkeypatch.setattr(stopwatch, "time", lambda work, count: timed.append(count) or time(work, count))
    works = {name: Work(launch(name, milliseconds)) for name, milliseconds in (("a", 10.0), ("b", 50.0))}
    batches = stopwatch.rounds(works, 1, batch_ms=30, settle_ms=100)
    assert timed == [2, 3, 2, 3] + [10, 3, 2, 3] + [2, 3, 10, 3]  # calibration, the unrecorded round, the other one
    assert "".join(order[10:]) == 13 * "a" + 5 * "b" + 5 * "b" + 13 * "a"
    assert [batch.milliseconds for name in "ab" for batch in batches[name]] == pytest.approx([10, 50])


def test_a_graph_is_many_calls(monkeypatch):
    stream, captured = FakeStream(), []
    stopwatch = fake_stopwatch(stream, monkeypatch)
    work = stopwatch.capture(lambda: captured.append(0.01))
    assert len(captured) == CALLS_PER_GRAPH and not stream.is_capturing
    (batch,) = stopwatch.rounds({"graph": work}, 1, batch_ms=2)["graph"]
    assert batch.milliseconds == pytest.approx(1 / CALLS_PER_GRAPH)

    def fails():
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError):
        stopwatch.capture(fails)
    assert not stream.is_capturing


@pytest.mark.parametrize("milliseconds, is_short", [(0.01, True), (10.0, False)])
def test_short_calls(milliseconds, is_short, monkeypatch):
    stream = FakeStream()
    work = Work(lambda: setattr(stream, "now", stream.now + milliseconds))
    assert fake_stopwatch(stream, monkeypatch).is_short(work) == is_short


def test_no_clocks_without_a_driver():
    if hopper_device_problem() is None:
        pytest.skip("this machine has a driver")
    monitor = measure.Monitor(SimpleNamespace(pci_bus_id="0000:00:00.0"))
    assert monitor.problem and monitor.sample() == (None, None) and monitor.limits() == {}


def test_result_is_a_median_of_ratios():
    ours = [Batch(ms, 5.0, 1600, 690.0) for ms in (1.0, 2.0, 4.0)]
    theirs = [Batch(ms, 5000.0, 1500, None) for ms in (1.1, 2.4, 3.0)]
    case = Case("bf16", 128, False, 1024, 1024, 1, 16, 16)
    result = results.medians(case, theirs, ours, 132)
    assert result["ratio"] == pytest.approx(1.1)
    assert result["ms"] == 2.4 and result["tflops"] == pytest.approx(case.flops / 2.4e9)
    assert result["peak"] == pytest.approx(result["tflops"] * 1e12 / (132 * 4096 * 1500e6))
    assert result["host_bound"] and not results.medians(case, ours, ours, 132)["host_bound"]
    assert result["power_watts"] is None
    assert shown.rate(result).endswith("*")


def test_row_prints_with_and_without_clocks_and_peers():
    result = {
        "ms": 0.5,
        "tflops": 600.04,
        "peak": None,
        "clock_mhz": None,
        "power_watts": None,
        "ratio": 1.0,
        "host_bound": False,
    }
    row = {
        "name": "case",
        "host_us": 5.25,
        "errors": {bench.OURS: 2e-3},
        "results": {bench.OURS: result, "fa3": result | {"peak": 0.75, "ratio": 1.25}},
    }
    cells = bench.cells(row, ["fa3", "cudnn"])
    assert len(cells) == len(bench.columns(["fa3", "cudnn"]))
    assert cells == ["case", "600.0", "500.0", "-", "-", "-", "5.2", "2.0e-03", "600.0", "1.250", "-", "-"]


@pytest.fixture
def fake_gpu(monkeypatch):
    return install(monkeypatch)


BENCH = [
    "bench",
    "--head-dim",
    "64",
    "--seqlen",
    "96",
    "--batch-size",
    "2",
    "--num-heads",
    "4",
    "--num-heads-k",
    "2",
    "--rounds",
    "3",
]


def test_bench_from_end_to_end(fake_gpu, tmp_path, monkeypatch, capsys):
    def make_peer(case, pointers):
        return lambda: setattr(fake_gpu.stream, "now", fake_gpu.stream.now + 15)

    monkeypatch.setitem(
        peers.PEERS,
        "fa3",
        lambda: SimpleNamespace(version="fa3-fwd 0", launch=make_peer, error=lambda case, pointers, launch: 1e-3),
    )
    monkeypatch.setitem(peers.PEERS, "cudnn", lambda: (_ for _ in ()).throw(ImportError("no torch here")))
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    file = tmp_path / "rows.json"
    assert main([*BENCH, "--peers", "fa3,cudnn", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "cudnn is not available here (no torch here)" and "fa3-fwd 0" in said[1]
    assert said[2].split()[-2:] == ["vs", "fa3"] and said[3].split()[-1] == "1.500"
    written = json.loads(file.read_text())
    assert written["environment"]["dsl"] == "4.8.1" and written["environment"]["peers"] == {"fa3": "fa3-fwd 0"}
    assert written["environment"]["command"] == f"python -m fa3_cute {' '.join(BENCH)} --peers fa3,cudnn --json {file}"
    assert [row["name"] for row in written["rows"]] == ["bf16 d64 full h4:2 2x96", "bf16 d64 causal h4:2 2x96"]
    assert all(row["errors"][bench.OURS] < 5e-3 for row in written["rows"])


@pytest.mark.parametrize("options, settle_ms", [([], 0), (["--settle-ms", "20"], 20)])
def test_the_time_to_settle_is_in_the_report(options, settle_ms, fake_gpu, tmp_path, capsys):
    """In its command, where it was given."""
    file = tmp_path / "rows.json"
    argv = [*BENCH, "--full", *options, "--json", str(file)]
    assert main(argv) == 0
    assert json.loads(file.read_text())["environment"]["settle_ms"] == settle_ms
    capsys.readouterr()
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"\n    python -m fa3_cute {' '.join(argv)}\n")
    assert ("--settle-ms 20 " in said) == bool(options)


def test_bench_of_packed_sequences_and_windows(fake_gpu, tmp_path, monkeypatch, capsys):
    """Offsets, totals and windows reach `forward`; short calls are replayed; the conclusions are printed and kept."""
    monkeypatch.setattr(varlen, "LAYOUTS", {varlen.PER_SEQUENCE: (3, 1, 40, 7), varlen.IN_2K: (51,)})
    monkeypatch.setattr(window, "SEQLENS", (200,))
    monkeypatch.setattr(window, "WINDOWS", ((50, 0), (9, 9)))
    fake_gpu.milliseconds = 0.01
    for suite, count in (("varlen", 2), ("window", 1)):
        file = tmp_path / f"{suite}.json"
        assert (
            main(
                [
                    "bench",
                    "--suite",
                    suite,
                    "--head-dim",
                    "64",
                    "--num-heads",
                    "2",
                    "--rounds",
                    "2",
                    "--batch-ms",
                    "2",
                    "--json",
                    str(file),
                ]
            )
            == 0
        )
        written = json.loads(file.read_text())
        said = capsys.readouterr().out.splitlines()
        assert said[-count:] == written["conclusions"] and len(written["conclusions"]) == count
        for row in written["rows"]:
            assert row["errors"][bench.OURS] < 5e-3 and "lengths" not in row["case"]
            assert row["results"][bench.OURS]["replayed"] and not row["results"][bench.OURS]["host_bound"]
            assert row["results"][bench.OURS]["ms"] == pytest.approx(1 / CALLS_PER_GRAPH)


def test_a_short_call_that_cannot_be_captured_is_marked(fake_gpu, tmp_path, monkeypatch, capsys):
    def refuse(launch, calls):
        raise RuntimeError("no capture\nof this")

    def make_peer(case, pointers):
        return lambda: setattr(fake_gpu.stream, "now", fake_gpu.stream.now + 15)

    monkeypatch.setitem(
        peers.PEERS,
        "fa3",
        lambda: SimpleNamespace(version="fa3-fwd 0", launch=make_peer, error=lambda case, pointers, launch: 1e-3),
    )
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    monkeypatch.setattr(peers, "capture", refuse)
    fake_gpu.milliseconds = 0.01
    assert main([*BENCH, "--full", "--peers", "fa3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2].split()[-2].endswith("*")
    assert said[-1] == "fa3 cannot be captured into a CUDA graph: no capture"


def test_bench_fails_on_a_wrong_result(fake_gpu, monkeypatch, capsys):
    """A kernel that writes nothing leaves NaN behind."""
    monkeypatch.setattr(fake_gpu, "forward", lambda params, stream: setattr(fake_gpu.stream, "now", 1.0) or Status.OK)
    monkeypatch.setattr(Stopwatch, "is_short", lambda self, work: False)
    monkeypatch.setattr(
        Stopwatch,
        "rounds",
        lambda self, works, rounds, batch_ms, settle_ms: {name: [Batch(1.0, 1.0, None, None)] for name in works},
    )
    assert main([*BENCH, "--causal"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "bf16 d64 causal h4:2 2x96: fa3_cute is off by nan"


def test_missing_peer_is_one_line(monkeypatch):
    def load():
        raise ImportError("no module\nand a traceback")

    monkeypatch.setitem(peers.PEERS, "fa3", load)
    with pytest.raises(peers.PeerMissing, match=r"^fa3 is not available here \(no module\)$"):
        peers.load("fa3")


PACKED = Case("bf16", 128, True, 40, 40, 2, 16, 2, lengths=(3, 40), label="3+40")
DENSE = Case("bf16", 64, False, 50, 70, 3, 16, 16, window=(9, 0))


@pytest.mark.parametrize(
    "case, name, shapes",
    [
        (PACKED, "flash_attn_varlen_func", [(43, 16, 128), (43, 2, 128), (43, 2, 128), (3,), (3,), 40, 40]),
        (DENSE, "flash_attn_func", [(3, 50, 16, 64), (3, 70, 16, 64), (3, 70, 16, 64)]),
    ],
)
def test_fa3_is_called_as_it_expects(case, name, shapes, monkeypatch):
    calls = []
    fake = {
        each: lambda *args, each=each, **options: calls.append((each, list(args), options)) or ("out", "lse")
        for each in ("flash_attn_func", "flash_attn_varlen_func")
    }
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(**fake))
    monkeypatch.setattr(peers.metadata, "version", lambda name: "0")
    monkeypatch.setattr(peers, "view", lambda pointer, shape, dtype: shape)
    launch = peers.load("fa3").launch(case, {"q": 1, "k": 2, "v": 3, "cu_seqlens": 4})
    assert launch() == "out"
    assert calls == 2 * [(name, shapes, {"causal": case.is_causal, "window_size": case.window})]


def test_peer_without_the_dtype_is_left_out():
    peer = peers.Peer("fa3", "0", ("bf16",), make_launch=None)
    with pytest.raises(peers.PeerMissing, match="fa3 has no fp16 kernels"):
        peer.launch(Case("fp16", 128, False, 512, 512, 1, 16, 16), {})


@pytest.mark.gpu
def test_bench_runs(tmp_path, capsys):
    file = tmp_path / "rows.json"
    argv = ["bench", "--head-dim", "128", "--seqlen", "512", "--rounds", "2", "--batch-ms", "2", "--json", str(file)]
    assert main(argv) == 0
    written = json.loads(file.read_text())
    assert {"gpu", "sms", "dsl", "dsl_cuda", "sources", "date", "peers"} <= written["environment"].keys()
    assert [row["case"]["is_causal"] for row in written["rows"]] == [False, True]
    for row in written["rows"]:
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS) and row["host_us"] > 0
        assert row["results"][bench.OURS]["tflops"] > 0 and row["results"][bench.OURS]["ratio"] == 1
    assert "TFLOP/s" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["varlen", "window"])
def test_bench_replays_short_calls(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(varlen, "LAYOUTS", {"256+512+128": (256, 512, 128)})
    monkeypatch.setattr(window, "SEQLENS", (512,))
    monkeypatch.setattr(measure, "SHORT_MS", 1.0)
    file = tmp_path / "rows.json"
    assert (
        main(
            [
                "bench",
                "--suite",
                suite,
                "--head-dim",
                "64",
                "--num-heads",
                "4",
                "--rounds",
                "2",
                "--batch-ms",
                "2",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    for row in json.loads(file.read_text())["rows"]:
        ours = row["results"][bench.OURS]
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS) and ours["replayed"] and ours["ms"] > 0
