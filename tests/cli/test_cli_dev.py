"""What a kernel developer runs: `dev`, `tune` and the benchmark's pictures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fake_gpu import fake_stopwatch, install

from fa3_cute.planning import tables as heuristics
from fa3_cute.runtime import launch
from fa3_cute.cli import bench, dev, main, plot, trial, tune
from fa3_cute.cli.suites import prefill
from fa3_cute.cli.trial import Question, label
from fa3_cute.planning.config import DecodeConfig, FwdConfig

ROW = heuristics.forward_config("bf16", 128, "causal", False, False)


# ---- the config of one's choice --------------------------------------------------------------------------------------


def test_no_change_is_the_row():
    assert Question("bf16", 128, "causal").config() == ROW
    assert isinstance(Question("bf16", 128, is_decode=True).config(), DecodeConfig)


def test_fp8():
    row = heuristics.forward_config("fp8_e4m3", 128, "causal", False, False, "bf16")
    assert Question("fp8_e4m3", 128, "causal").config() == row
    assert label(row).startswith(f"{row.tile_m}x{row.tile_n} ")
    assert Question("fp8_e4m3", 64, is_decode=True, out_dtype="fp16").config().element_out == "fp16"
    for question in (Question("fp8_e4m3", 128, out_dtype="fp16"), Question("fp8_e4m3", 64, is_decode=True)):
        assert {case.element_out for case in [question.small_case(), *question.cases()]} == {
            question.config().element_out
        }


def test_changes_have_the_types_of_their_fields():
    changes = (("tile_n", "112"), ("num_q_stages", "1"), ("use_pingpong", "0"), ("rescale_before_pv", "True"))
    cfg = Question("bf16", 128, "causal", changes=changes).config()
    assert (cfg.tile_n, cfg.num_q_stages, cfg.use_pingpong, cfg.rescale_before_pv) == (112, 1, False, True)
    assert type(cfg.use_pingpong) is bool and cfg.is_causal
    assert label(cfg) == f"{cfg.tile_m}x112 q1 kv2 without ping-pong rescaling before PV"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--set", "tile_n=100"], "tile_n=100: must be a multiple of 16"),
        (["--set", "tile_n=256"], "bytes of shared memory: a CTA has"),
        (["--set", "tilen=64"], "tilen: not one of tile_m, tile_n, "),
        (["--set", "head_dim=64"], "head_dim: not one of "),
        (["--set", "tile_n"], "tile_n='': must be an integer"),
        (["--set", "use_pingpong=2"], "use_pingpong='2': must be 0 or 1"),
        (["--decode", "--set", "num_kv_stages=9"], "bytes of shared memory: "),
        (["--decode", "--local"], "--decode times a query that sees every key"),
        (["--dtype", "fp8_e4m3", "--set", "tile_n=112"], "tile_n=112: must be a multiple of 32"),
        (["--dtype", "fp8_e4m3", "--head-dim", "192"], "head_dim=192: fp8_e4m3 has 64, 96, 128"),
        (["--out-dtype", "fp16"], "out_dtype=fp16: O is bf16, as Q, K and V are"),
        (["--dtype", "fp8_e4m3", "--set", "out_dtype=fp16"], "out_dtype: not one of tile_m, tile_n, "),
    ],
)
def test_dev_refuses(options, said, capsys):
    assert main(["dev", "--once", *options]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line


def test_problems():
    assert [case.name for case in Question("bf16", 128, "local").cases()] == ["bf16 d128 window(1024,0) h16 4x4096"]
    (case,) = Question("fp16", 96, is_decode=True, seqlens=(4096,)).cases()
    assert case.is_decode and case.l2 == "cold" and case.seqlen_k == 4096
    assert trial.rate(case, 0.05) == f"50.0 us, {case.nbytes / 5e4:.0f} GB/s"
    assert Question("bf16", 64, "causal").small_case().visible_bounds == (-1, 0)


# ---- check and time --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU under the rig; its launches are right."""
    fake = install(monkeypatch)
    monkeypatch.setattr(prefill, "TOKENS", 512)
    monkeypatch.setattr(trial, "open_device", bench.open_device)
    monkeypatch.setattr(trial, "download", fake.download)
    monkeypatch.setattr(trial, "Stopwatch", lambda device, stream: fake_stopwatch(stream, monkeypatch))
    monkeypatch.setattr(launch, "launch_through", lambda params, cfg, stream: fake.forward(params, stream))
    return fake


@pytest.mark.parametrize(
    "question",
    [
        Question("bf16", 64, "causal", seqlens=(256, 512)),
        Question("bf16", 64, "local", seqlens=(512,)),
        Question("bf16", 64, is_decode=True, seqlens=(512,)),
    ],
)
def test_a_right_config_is_timed(question, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path / "cache"))
    found = dev.measure_task(question)()
    assert 0 < found["worst_row"] < found["wrong"] == 1e-2
    assert [row["name"] for row in found["rows"]] == [case.name for case in question.cases()]
    assert dev.print_measured(found)
    assert "against" not in capsys.readouterr().out
    for row in found["rows"]:
        row["ms"] *= 0.8
    assert dev.print_measured(found)
    said = capsys.readouterr().out
    assert said.count(f", +25.0% against the last run ({found['label']})") == len(found["rows"])
    assert ("GB/s" if question.is_decode else "TFLOP/s") in said


def test_a_wrong_config_is_told(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "launch_through", lambda params, cfg, stream: None)
    rig = trial.Rig(Question("bf16", 64, seqlens=(512,)))
    error = rig.error(ROW)
    assert not error < rig.wrong
    assert not dev.print_measured(
        {
            "worst_row": error,
            "wrong": rig.wrong,
            "checked": "it",
            "gpu": "g",
            "label": "l",
            "rows": [{"name": "case", "rate": "fast", "ms": 1.0}],
        }
    )
    assert capsys.readouterr().out.startswith("WRONG: ")
    assert not dev.last_runs()


# ---- the loop --------------------------------------------------------------------------------------------------------


def dies(question):
    os._exit(3)


def raises(question):
    return lambda: [][0]


@pytest.mark.parametrize("task, said", [(dies, "exit status 3"), (raises, "IndexError")])
def test_a_worker_that_fails_says_so(task, said):
    worker = dev.Worker(task, Question("bf16", 128))
    worker.go()
    assert said in worker.result()["error"]
    worker.stop()


def test_dev_watches_and_outlives_errors(tmp_path):
    """In a copy of the package: a round, a syntax error, an error on import, the correction, Ctrl-C."""
    shutil.copytree(dev.PACKAGE, tmp_path / "fa3_cute", ignore=shutil.ignore_patterns("__pycache__"))
    watched, log = tmp_path / "fa3_cute/kernels/common/visibility.py", tmp_path / "log"
    text = watched.read_text()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "FA3_CUTE_CACHE_DIR": str(tmp_path / "cache")}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fa3_cute", "dev", "--head-dim", "64", "--dtype", "fp16"],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        assert "no spills" in after_rounds(log, 1, process)
        watched.write_text(text + "\ndef broken(:\n")
        assert "SyntaxError" in after_rounds(log, 2, process)
        watched.write_text(text + "\nraise RuntimeError('as it is imported')\n")
        said = after_rounds(log, 3, process)
        assert "RuntimeError: as it is imported\n" in said and "\n  at visibility.py:" in said
        watched.write_text(text)
        said = after_rounds(log, 4, process)
        assert " visibility.py\n" in said and "no spills" in said and " s from save to here" in said
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def after_rounds(log, count: int, process) -> str:
    """What a round printed, once so many have ended."""
    deadline = time.monotonic() + 120
    while (said := log.read_text()).count("watching;") < count:
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.1)
    return said.split("watching;")[count - 1]


def test_an_error_says_which_lines_led_to_it(monkeypatch):
    """What the compiler says of an error in traced code may lack the place: the chain of causes has it."""
    from fa3_cute.kernels.forward import kernel

    monkeypatch.delattr(kernel, "FwdParams")
    said = trial.compiled(ROW)["error"]
    assert "CompileError: fwd_bf16_d128_causal" in said and "\n  at kernel.py:" in said


def test_once_fails_on_a_spill(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "FA3_CUTE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fa3_cute", "dev", "--once", "--head-dim", "64", "--full", "--set", "tile_n=160"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "spills: " in done.stdout, done


# ---- tune ------------------------------------------------------------------------------------------------------------


def test_candidates_are_legal_and_the_row_comes_first():
    found = tune.candidates(ROW, tune.TILE_MS, tune.TILE_NS)
    assert found[0] == ROW and len(set(found)) == len(found) > 50
    assert {cfg.tile_m for cfg in found} == set(tune.TILE_MS)
    assert all(
        (cfg.dtype, cfg.head_dim, cfg.mask) == ("bf16", 128, "causal") and cfg.first_problem() is None for cfg in found
    )
    assert not any(cfg.use_pingpong for cfg in found if cfg.tile_m == 64)
    assert tune.candidates(ROW, (64,), (64,))[0] == ROW


def test_candidates_of_fp8():
    row = heuristics.forward_config("fp8_e4m3", 128, "full", False, False, "bf16")
    found = tune.candidates(row, tune.TILE_MS, tune.TILE_NS)
    assert found[0] == row and {cfg.out_dtype for cfg in found} == {"bf16"}
    assert {cfg.tile_n % 32 for cfg in found} == {0}
    assert {cfg.num_kv_stages for cfg in found} == {2, 3}


def test_row_of_fp8():
    """The line to paste makes the config that won."""
    row = heuristics.forward_config("fp8_e4m3", 128, "full", False, False, "bf16")
    best = replace(row, num_kv_stages=3, tile_n=96)
    line = tune.heuristics_row([best, row], {best: [900.0], row: [800.0]}, "TFLOP/s")
    ((key, made),) = eval(f"{{{line}}}", {"Row": heuristics.Row}).items()
    assert key == (1, 128, "full") and (made.tile_n, made.num_kv_stages, made.use_pingpong) == (96, 3, False)


@pytest.mark.parametrize("argv", [["--dtype", "fp8_e4m3", "--head-dim", "256"], ["--out-dtype", "fp16"]])
def test_tune_refuses(argv, capsys):
    assert main(["tune", *argv]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


TUNE = ["tune", "--head-dim", "64", "--causal", "--limit", "4", "--jobs", "1", "--seqlen", "256,512", "--rounds", "2"]


def test_tune_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(tune, "hopper_device_problem", lambda: "none here")
    found = {"registers": 168, "smem_bytes": 9, "problems": []}
    answers = iter([{"error": "no"}, found | {"problems": ["spills"]}, found, found])
    monkeypatch.setattr(tune, "compiled", lambda cfg: next(answers))
    assert main(TUNE) == 0
    *_, summary, end = said = capsys.readouterr().out.splitlines()
    assert summary.startswith("2 of 4 survive")
    assert end == "no times: none here" and "4 are compiled" in said[0]
    monkeypatch.setattr(tune, "compiled", lambda cfg: {"error": "no"})
    assert main(TUNE) == 1


def test_tune_with_a_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(tune, "hopper_device_problem", lambda: None)
    monkeypatch.setattr(tune, "compiled", lambda cfg: {"registers": 168, "smem_bytes": 9, "problems": []})
    monkeypatch.setattr(tune, "get_kernel", lambda cfg: None)
    slow = heuristics.forward_config("bf16", 64, "causal", False, False)

    def run(params, cfg, stream):
        gpu.milliseconds = 2.0 if cfg == slow else 1.0
        gpu.forward(params, stream)

    monkeypatch.setattr(launch, "launch_through", run)
    assert main(TUNE) == 0
    table, row = capsys.readouterr().out.split("\n1.000 is ")
    assert table.splitlines()[-1].split()[-1] == "1.000" and "2.000" in table
    name, line = row.split("\n\n")
    assert "the row in force" in name and max(map(len, line.splitlines())) <= 120
    ((key, made),) = eval(f"{{{line}}}", {"Row": heuristics.Row}).items()
    assert key == (2, 64, "causal") and "TFLOP/s at 256 / 512 tokens, fake, 2" in made.reason
    FwdConfig(
        "bf16",
        64,
        True,
        False,
        made.tile_m,
        made.tile_n,
        made.num_q_stages,
        use_pingpong=made.use_pingpong,
        rescale_before_pv=made.rescale_before_pv,
    )


# ---- plot ------------------------------------------------------------------------------------------------------------


def results(suite: str, *cases: dict) -> dict:
    """A run of the benchmark with one peer, as JSON."""
    ours = {"tflops": 600.0, "peak": 0.75, "host_bound": False, "gbs": 3000.0, "of_copy": 0.75}
    rows = [
        {
            "case": {"dtype": "bf16", "head_dim": 128, "heads": "16:2", "layout": "2x512", "mask": "full"} | case,
            "results": {"fa3_cute": ours, "fa3": ours | {"tflops": 500.0, "gbs": 2000.0, "host_bound": True}},
        }
        for case in cases
    ]
    return {
        "environment": {
            "suite": suite,
            "gpu": "NVIDIA H200",
            "sms": 132,
            "clock_problem": "none",
            "dsl": "4.8.1",
            "dsl_cuda": "12.9",
            "peers": {"fa3": "fa3-fwd 0.0.3"},
            "date": "2026-11-22",
        },
        "rows": rows,
        "conclusions": [],
    }


def test_report_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for suite, cases in (("prefill", [{}, {"mask": "causal"}]), ("decode", [{"l2": "warm"}, {"l2": "cold"}])):
        files.append(tmp_path / f"{suite}.json")
        files[-1].write_text(json.dumps(results(suite, *cases)))
    picture = tmp_path / "out.png"
    assert main(["report", "--plot", str(picture), *map(str, files)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["report", "--plot", str(picture), "--head-dim", "64", *map(str, files)]) == 2
    assert "no results to draw" in capsys.readouterr().out


@pytest.mark.parametrize("is_memory, unit, height, roof", [(False, "TFLOP/s", 500, 800), (True, "GB/s", 2000, 4000)])
def test_bars_and_roofline(is_memory, unit, height, roof):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    plot.draw(panel, results("prefill", {}, {})["rows"], ["fa3_cute", "fa3"], is_memory)
    assert panel.get_ylabel() == unit
    _, theirs = panel.containers
    assert [bar.get_height() for bar in theirs] == [height] * 2
    (lines,) = [
        item
        for item in panel.collections
        if item.get_label() in [text.get_text() for text in panel.get_legend().get_texts()]
    ]
    assert [segment[0][1] for segment in lines.get_segments()] == [roof] * 2
    assert "*" in [text.get_text() for text in panel.texts]


def test_no_roofline_where_the_clock_is_unknown():
    assert plot.roof({"tflops": 600.0, "peak": None}, is_memory=False) is None


def test_long_panels_go_on_in_the_next():
    rows = results("prefill", *[{}] * (plot.MAX_CASES + 1))["rows"]
    assert [len(part) for part in plot.by_variant(rows).values()] == [plot.MAX_CASES, 1]


@pytest.mark.parametrize("argv", [["bench"], ["report", "no.json"]])
def test_without_matplotlib(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*argv, "--plot", "out.png"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--plot needs matplotlib") and "fa3_cute[plot]" in line


def test_bench_plots_what_it_measured(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    install(monkeypatch)
    picture = tmp_path / "out.png"
    assert (
        main(
            [
                "bench",
                "--head-dim",
                "64",
                "--seqlen",
                "96",
                "--batch-size",
                "1",
                "--num-heads",
                "2",
                "--rounds",
                "2",
                "--plot",
                str(picture),
            ]
        )
        == 0
    )
    assert picture.stat().st_size > 1000
