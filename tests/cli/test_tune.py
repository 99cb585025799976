"""The command tune: its candidates, what it prints of them, the row that it proposes."""

from dataclasses import replace

import pytest

from fa3_cute.planning import tables
from fa3_cute.runtime import launch
from fa3_cute.cli import main, tune
from fa3_cute.planning.config import FwdConfig

ROW = tables.forward_config("bf16", 128, "causal", False, False)


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
    row = tables.forward_config("fp8_e4m3", 128, "full", False, False, "bf16")
    found = tune.candidates(row, tune.TILE_MS, tune.TILE_NS)
    assert found[0] == row and {cfg.out_dtype for cfg in found} == {"bf16"}
    assert {cfg.tile_n % 32 for cfg in found} == {0}
    assert {cfg.num_kv_stages for cfg in found} == {2, 3}


def test_row_of_fp8():
    """The line to paste makes the config that won."""
    row = tables.forward_config("fp8_e4m3", 128, "full", False, False, "bf16")
    best = replace(row, num_kv_stages=3, tile_n=96)
    line = tune.table_row([best, row], {best: [900.0], row: [800.0]}, "TFLOP/s")
    ((key, made),) = eval(f"{{{line}}}", {"Row": tables.Row}).items()
    assert key == (1, 128, "full") and (made.tile_n, made.num_kv_stages, made.use_pingpong) == (96, 3, False)


def test_tune_refuses(capsys):
    assert main(["tune", "--out-dtype", "fp16"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


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


class InThisProcess:
    """A worker whose process is the test's, where the fake GPU is. `hangs` are configs that never answer."""

    hangs, started = (), 0

    def __init__(self, task, question):
        self.work = task(question)
        InThisProcess.started += 1

    def ask(self, configs, *request, seconds=None):
        return {"error": "given up"} if configs[0] in self.hangs else self.work(configs, *request)

    def stop(self):
        self.work = None


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(tune, "Worker", InThisProcess)
    monkeypatch.setattr(InThisProcess, "hangs", ())
    monkeypatch.setattr(InThisProcess, "started", 0)
    return InThisProcess


def test_tune_goes_on_after_a_config_that_hangs(gpu, worker, monkeypatch, capsys):
    monkeypatch.setattr(tune, "hopper_device_problem", lambda: None)
    monkeypatch.setattr(tune, "compiled", lambda cfg: {"registers": 168, "smem_bytes": 9, "problems": []})
    monkeypatch.setattr(tune, "get_kernel", lambda cfg: None)
    row = tables.forward_config("bf16", 64, "causal", False, False)
    worker.hangs = tune.candidates(row, tune.TILE_MS, tune.TILE_NS)[1:2]
    assert main(TUNE) == 1
    said = capsys.readouterr().out
    assert f"{tune.label(worker.hangs[0])}: given up\n" in said and worker.started == 2
    ranked = said.partition("relative\n")[2].partition("\n\n")[0].splitlines()
    assert len(ranked) == 3 and not any(line.startswith(tune.label(worker.hangs[0]) + " ") for line in ranked)


def test_tune_with_a_gpu(gpu, worker, monkeypatch, capsys):
    monkeypatch.setattr(tune, "hopper_device_problem", lambda: None)
    monkeypatch.setattr(tune, "compiled", lambda cfg: {"registers": 168, "smem_bytes": 9, "problems": []})
    monkeypatch.setattr(tune, "get_kernel", lambda cfg: None)
    slow = tables.forward_config("bf16", 64, "causal", False, False)

    def run(params, cfg, stream):
        gpu.milliseconds = 2.0 if cfg == slow else 1.0
        gpu.forward(params, stream)

    monkeypatch.setattr(launch, "launch_through", run)
    assert main(TUNE) == 0
    table, row = capsys.readouterr().out.split("\n1.000 is ")
    assert table.splitlines()[-1].split()[-1] == "1.000" and "2.000" in table
    name, line = row.split("\n\n")
    assert "the row in force" in name and max(map(len, line.splitlines())) <= 120
    ((key, made),) = eval(f"{{{line}}}", {"Row": tables.Row}).items()
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


@pytest.mark.gpu
def test_tune_on_the_gpu(capsys):
    """The row in force, checked and timed in the process that is watched."""
    options = ["--limit", "1", "--jobs", "1", "--seqlen", "512", "--rounds", "1", "--batch-ms", "2"]
    assert main(["tune", "--head-dim", "64", "--causal", *options]) == 0
    assert "1.000 is " in (said := capsys.readouterr().out) and '(2, 64, "causal"): Row(' in said
