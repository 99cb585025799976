"""The command dev: a config of one's choice, checked, timed, and again at every save."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fa3_cute.planning import tables
from fa3_cute.runtime import launch
from fa3_cute.cli import dev, main, trial
from fa3_cute.cli.trial import Question, label
from fa3_cute.planning.config import DecodeConfig

ROW = tables.forward_config("bf16", 128, "causal", False, False)


# ---- the config of one's choice --------------------------------------------------------------------------------------


def test_no_change_is_the_row():
    assert Question("bf16", 128, "causal").config() == ROW
    assert isinstance(Question("bf16", 128, is_decode=True).config(), DecodeConfig)


def test_fp8():
    row = tables.forward_config("fp8_e4m3", 128, "causal", False, False, "bf16")
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
        (["--set", "tilen=64"], "tilen: not one of kv_dtype, num_wide_slots, has_leftpad, "),
        (["--set", "head_dim=64"], "head_dim: not one of "),
        (["--set", "head_dim_v=64"], "head_dim_v: not one of "),
        (["--set", "is_padded=1"], "is_padded: not one of "),
        (["--set", "has_softcap=1"], "has_softcap: not one of "),
        (["--set", "tile_n"], "tile_n='': must be an integer"),
        (["--set", "use_pingpong=2"], "use_pingpong='2': must be 0 or 1"),
        (["--decode", "--set", "num_kv_stages=9"], "bytes of shared memory: "),
        (["--decode", "--local"], "--decode times a query that sees every key"),
        (["--dtype", "fp8_e4m3", "--set", "tile_n=112"], "tile_n=112: must be a multiple of 32"),
        (["--out-dtype", "fp16"], "out_dtype=fp16: O is bf16, as Q, K and V are"),
        (["--dtype", "fp8_e4m3", "--set", "out_dtype=fp16"], "out_dtype: not one of kv_dtype, num_wide_slots, "),
    ],
)
def test_dev_refuses(options, said, capsys):
    assert main(["dev", "--once", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_problems():
    assert [case.name for case in Question("bf16", 128, "local").cases()] == ["bf16 d128 window(1024,0) h16 4x4096"]
    (case,) = Question("fp16", 96, is_decode=True, seqlens=(4096,)).cases()
    assert case.is_decode and case.l2 == "cold" and case.seqlen_k == 4096
    assert trial.rate(case, 0.05) == f"50.0 us, {case.nbytes / 5e4:.0f} GB/s"
    assert Question("bf16", 64, "causal").small_case().visible_bounds == (-1, 0)


# ---- check and time --------------------------------------------------------------------------------------------------


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
