"""The command line: what is compiled and timed, what is printed, which exit status; the benchmark's arithmetic."""
import json
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import replace
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

from fa3_cute.cli import COMMANDS, bench, main, measure, peers
from fa3_cute.cli import case as case_module
from fa3_cute.cli import compile as compile_command
from fa3_cute.cli.case import Case
from fa3_cute.cli.measure import Batch, Stopwatch
from fa3_cute.cli.suites import prefill
from fa3_cute.cli.table import Table, one_or_more
from fa3_cute.device import hopper_device_problem
from fa3_cute.heuristics import all_forward_configs
from fa3_cute.reference import attention_reference, to_bits
from fa3_cute.status import Status


def parsed(command, *argv: str):
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


# ---- main, tables, lists ---------------------------------------------------------------------------------------------

def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said and summary.split()[0] in said for name, summary in COMMANDS.items())


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["compile", "--head-dim", "80"], ["bench", "--peers", "fa9"],
                                  ["bench", "--causal", "--full"]])
def test_bad_command_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: fa3_cute" in capsys.readouterr().err


def test_lists():
    assert one_or_more(int)("1,2,3") == [1, 2, 3]
    for kind, choices, text in ((int, None, "1,x"), (int, None, ""), (int, (64, 128), "64,65"), (str, ("a",), "a,")):
        with pytest.raises(ArgumentTypeError):
            one_or_more(kind, choices)(text)


def test_table_aligns_and_keeps_wide_cells(capsys):
    table = Table([("name", 6), ("n", 3)])
    table.print_row(["a", 1])
    table.print_row(["a long name", 1000])
    assert capsys.readouterr().out == "name      n\na         1\na long name  1000\n"


# ---- compile ---------------------------------------------------------------------------------------------------------

def test_compile_prints_json_and_fills_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    from fa3_cute import compiler
    monkeypatch.setattr(compiler, "_kernels", {})
    assert main(["compile", "--head-dim", "64", "--dtype", "fp16", "--full", "--jobs", "1", "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert (row["config"]["head_dim"], row["config"]["dtype"], row["config"]["is_causal"]) == (64, "fp16", False)
    assert row["problems"] == [] and row["stack_bytes"] == 0 and row["registers"] > 0 and row["wgmmas"] > 0
    assert [path for path in tmp_path.rglob("*") if row["name"] in path.name]


@pytest.mark.parametrize("argv, count", [([], 20), (["--all"], 40), (["--causal"], 10), (["--full", "--all"], 20),
                                         (["--head-dim", "64,96", "--dtype", "bf16"], 4)])
def test_compile_selects(argv, count, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(compile_command, "compile_row", lambda cfg: seen.append(cfg) or clean_row(cfg))
    assert main(["compile", "--jobs", "1", *argv]) == 0
    assert len(set(seen)) == len(seen) == count
    assert capsys.readouterr().out.splitlines()[-1] == f"{count} kernels, all clean"


def clean_row(cfg) -> dict:
    return {"name": cfg.name, "registers": 168, "stack_bytes": 0, "smem_bytes": 1, "wgmmas": 32, "seconds": 1.0,
            "problems": []}


def test_compile_fails_on_a_problem(monkeypatch, capsys):
    from fa3_cute import compiler

    def fails_or_spills(cfg):
        if cfg.is_causal:
            raise compiler.CompileError("does not lower")
        fields = {name: () if name == "warnings" else {} if name == "notes" else 1
                  for name in compiler.Report.__dataclass_fields__}
        return compiler.Report(**fields | {"name": cfg.name, "config": cfg, "stack_bytes": 8})
    monkeypatch.setattr(compiler, "get_kernel", lambda cfg: None)
    monkeypatch.setattr(compiler, "compile_report", fails_or_spills)
    assert main(["compile", "--head-dim", "64", "--dtype", "fp16", "--jobs", "1"]) == 1
    *rows, summary = capsys.readouterr().out.splitlines()[1:]
    assert summary == "2 kernels, 2 with problems"
    assert any("spills" in row for row in rows) and any("does not lower" in row for row in rows)


def test_compile_in_processes(tmp_path, monkeypatch, capfd):
    """Rows come back from spawned processes in the order of the configs."""
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    configs = [cfg for cfg in all_forward_configs() if (cfg.dtype, cfg.head_dim, cfg.has_lse) == ("fp16", 64, False)]
    assert [row["name"] for row in compile_command.compile_rows(configs, jobs=2)] == [cfg.name for cfg in configs]


# ---- bench: cases, arithmetic, order ---------------------------------------------------------------------------------

def test_prefill_cases():
    cases = prefill.cases(parsed(bench))
    assert len(cases) == 5 * 2 * 6
    assert {case.batch_size * case.seqlen_q for case in cases} == {16384}
    assert {(case.head_dim, case.num_heads) for case in cases} == {(64, 32), (96, 16), (128, 16), (192, 12), (256, 8)}
    assert all(case.num_heads == case.num_heads_k and case.seqlen_q == case.seqlen_k for case in cases)


def test_prefill_cases_narrowed():
    case, = prefill.cases(parsed(bench, "--head-dim", "128", "--seqlen", "1000", "--causal", "--dtype", "fp16",
                                 "--batch-size", "3", "--num-heads", "8", "--num-heads-k", "2"))
    assert case == Case("fp16", 128, True, 1000, 1000, 3, 8, 2)
    assert case.name == "fp16 d128 causal b3 h8:2 s1000"
    assert case.flops == 4 * 3 * 8 * 1000 * 1000 * 128 / 2
    assert replace(case, is_causal=False).flops == 2 * case.flops


def test_bench_without_a_gpu(capsys):
    if hopper_device_problem() is None:
        pytest.skip("this machine has a Hopper GPU")
    assert main(["bench"]) == 2
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("bench needs a Hopper GPU: ")


class FakeStream:
    """A stream whose events read a clock that launches move: `now` in milliseconds."""
    handle = 1
    now = 0.0

    def record(self, event):
        event.at = self.now

    def sync(self):
        pass


class FakeEvent:
    is_done = True

    def __sub__(self, other):
        return self.at - other.at


def fake_stopwatch(stream, monkeypatch) -> Stopwatch:
    monkeypatch.setattr(measure, "Monitor", lambda device: SimpleNamespace(problem=None, sample=lambda: (1500, 600.0)))
    return Stopwatch(SimpleNamespace(create_event=lambda options: FakeEvent()), stream)


def test_rounds_interleave(monkeypatch):
    stream, order = FakeStream(), []

    def launch(name, milliseconds):
        def run():
            stream.now += milliseconds
            if order[-1:] != [name]:
                order.append(name)
        return run
    stopwatch = fake_stopwatch(stream, monkeypatch)
    batches = stopwatch.rounds({"a": launch("a", 1.0), "b": launch("b", 4.0), "c": launch("c", 100.0)}, 3, batch_ms=40)
    assert {name: [batch.milliseconds for batch in list_] for name, list_ in batches.items()} == {
        "a": pytest.approx([1] * 3), "b": pytest.approx([4] * 3), "c": pytest.approx([100] * 3)}
    assert batches["a"][0].clock_mhz == 1500 and batches["a"][0].power_watts == 600
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"    # calibration, the unrecorded round, three rounds


def test_no_clocks_without_a_driver():
    if hopper_device_problem() is None:
        pytest.skip("this machine has a driver")
    monitor = measure.Monitor(SimpleNamespace(pci_bus_id="0000:00:00.0"))
    assert monitor.problem and monitor.sample() == (None, None) and monitor.limits() == {}


def test_result_is_a_median_of_ratios():
    ours = [Batch(ms, 5.0, 1600, 690.0) for ms in (1.0, 2.0, 4.0)]
    theirs = [Batch(ms, 5000.0, 1500, None) for ms in (1.1, 2.4, 3.0)]
    case = Case("bf16", 128, False, 1024, 1024, 1, 16, 16)
    run = SimpleNamespace(num_sms=132)
    result = bench.Bench.result(run, case, theirs, ours)
    assert result["ratio"] == pytest.approx(1.1)
    assert result["ms"] == 2.4 and result["tflops"] == pytest.approx(case.flops / 2.4e9)
    assert result["peak"] == pytest.approx(result["tflops"] * 1e12 / (132 * 4096 * 1500e6))
    assert result["host_bound"] and not bench.Bench.result(run, case, ours, ours)["host_bound"]
    assert result["power_watts"] is None
    assert bench.rate(result).endswith("*")


def test_row_prints_with_and_without_clocks_and_peers():
    result = {"ms": 0.5, "tflops": 600.04, "peak": None, "clock_mhz": None, "power_watts": None, "ratio": 1.0,
              "host_bound": False}
    row = {"name": "case", "host_us": 5.25, "errors": {bench.OURS: 2e-3},
           "results": {bench.OURS: result, "fa3": result | {"peak": 0.75, "ratio": 1.25}}}
    cells = bench.cells(row, ["fa3", "cudnn"])
    assert len(cells) == len(bench.columns(["fa3", "cudnn"]))
    assert cells == ["case", "600.0", "0.5000", "-", "-", "-", "5.2", "2.0e-03", "600.0", "1.250", "-", "-"]


@pytest.fixture
def fake_gpu(monkeypatch):
    """A device whose buffers are NumPy bytes and whose forward is the reference; a buffer's handle is its index."""
    buffers, stream = [], FakeStream()

    def allocate(nbytes, stream=None):
        buffers.append(SimpleNamespace(handle=len(buffers), bytes=np.zeros(nbytes, np.uint8)))
        return buffers[-1]

    def upload(array, stream=None):
        buffer = allocate(array.nbytes)
        buffer.bytes[:] = array.view(np.uint8)
        return buffer

    def download(buffer, shape, dtype, stream=None):
        return buffer.bytes[:prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def forward(p, stream):
        q_shape, kv_shape = ((p.batch_size, rows, heads, p.head_dim)
                             for rows, heads in ((p.seqlen_q, p.num_heads), (p.seqlen_k, p.num_heads_k)))
        q, k, v = (download(buffers[index], shape, np.uint16)
                   for index, shape in ((p.q, q_shape), (p.k, kv_shape), (p.v, kv_shape)))
        out = to_bits(attention_reference(q, k, v, causal=p.is_causal)[0], "bf16").reshape(-1)
        buffers[p.out].bytes[:out.nbytes] = out.view(np.uint8)
        fake_gpu.stream.now += 10
        return Status.OK
    fake_gpu = SimpleNamespace(stream=stream, forward=forward)
    device = SimpleNamespace(name="fake", properties=SimpleNamespace(multiprocessor_count=132), pci_bus_id="",
                             create_stream=lambda: stream, create_event=lambda options: FakeEvent())
    monkeypatch.setattr(bench, "hopper_device_problem", lambda: None)
    monkeypatch.setattr(bench, "open_device", lambda: device)
    monkeypatch.setattr(bench, "forward", lambda params, stream: fake_gpu.forward(params, stream))
    monkeypatch.setattr(Stopwatch.host_microseconds, "__defaults__", (2, 1))
    fakes = {"address": lambda buffer: buffer.handle, "allocate": allocate, "upload": upload, "download": download,
             "fill": lambda buffer, byte, stream: buffer.bytes.fill(byte)}
    for name, fake in fakes.items():
        monkeypatch.setattr(case_module, name, fake)
    return fake_gpu


BENCH = ["bench", "--head-dim", "64", "--seqlen", "96", "--batch-size", "2", "--num-heads", "4", "--num-heads-k", "2",
         "--rounds", "3"]


def test_bench_from_end_to_end(fake_gpu, tmp_path, monkeypatch, capsys):
    def make_peer(case, pointers):
        return lambda: setattr(fake_gpu.stream, "now", fake_gpu.stream.now + 15)
    monkeypatch.setitem(peers.PEERS, "fa3", lambda: SimpleNamespace(
        version="fa3-fwd 0", launch=make_peer, error=lambda case, pointers, launch: 1e-3))
    monkeypatch.setitem(peers.PEERS, "cudnn", lambda: (_ for _ in ()).throw(ImportError("no torch here")))
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    file = tmp_path / "rows.json"
    assert main([*BENCH, "--peers", "fa3,cudnn", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "cudnn is not available here (no torch here)" and "fa3-fwd 0" in said[1]
    assert said[2].split()[-2:] == ["vs", "fa3"] and said[3].split()[-1] == "1.500"
    written = json.loads(file.read_text())
    assert written["environment"]["dsl"] == "4.8.1" and written["environment"]["peers"] == {"fa3": "fa3-fwd 0"}
    assert [row["name"] for row in written["rows"]] == ["bf16 d64 full b2 h4:2 s96", "bf16 d64 causal b2 h4:2 s96"]
    assert all(row["errors"][bench.OURS] < 5e-3 for row in written["rows"])


def test_bench_fails_on_a_wrong_result(fake_gpu, monkeypatch, capsys):
    """A kernel that writes nothing leaves NaN behind."""
    monkeypatch.setattr(fake_gpu, "forward", lambda params, stream: setattr(fake_gpu.stream, "now", 1.0) or Status.OK)
    monkeypatch.setattr(Stopwatch, "rounds", lambda self, launches, rounds, batch_ms: {
        name: [Batch(1.0, 1.0, None, None)] for name in launches})
    assert main([*BENCH, "--causal"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "bf16 d64 causal b2 h4:2 s96: fa3_cute is off by nan"


def test_missing_peer_is_one_line(monkeypatch):
    def load():
        raise ImportError("no module\nand a traceback")
    monkeypatch.setitem(peers.PEERS, "fa3", load)
    with pytest.raises(peers.PeerMissing, match=r"^fa3 is not available here \(no module\)$"):
        peers.load("fa3")


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
        assert row["errors"][bench.OURS] < bench.WRONG and row["host_us"] > 0
        assert row["results"][bench.OURS]["tflops"] > 0 and row["results"][bench.OURS]["ratio"] == 1
    assert "TFLOP/s" in capsys.readouterr().out
