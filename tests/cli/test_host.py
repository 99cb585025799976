"""bench --suite host: which calls it times, what it prints and writes. No test looks at a time."""

import json
from dataclasses import astuple
from types import SimpleNamespace

import pytest
from fake_gpu import FakeStream

from fa3_cute.arrays.memory import hopper_device_problem
from fa3_cute.cli import host, main
from fa3_cute.cli.case import Case, Tensors
from fa3_cute.contract.params import FlashAttentionParams
from fa3_cute.contract.plain import plain
from fa3_cute.contract.status import FlashAttentionError, Status
from fa3_cute.planning.operations import operation_of
from fa3_cute.planning.problem import ProblemShape

PARAMS = FlashAttentionParams(q=1, seqlen_q=128, seqlen_k=300)


@pytest.fixture
def called(monkeypatch):
    """The params of every forward()."""
    seen = []
    monkeypatch.setattr(host, "forward", lambda params, handle: seen.append(params) or Status.OK)
    return seen


@pytest.mark.parametrize("kind, shapes", [(0, 1), (1, 2), (2, None)])
def test_shapes_change_as_the_name_says(kind, shapes, called):
    rows = host.calls(host.changing(PARAMS), 1, lambda: None, rounds=2)
    for _ in range(kind):
        next(rows)
    called.clear()
    name, value, unit = next(rows)
    assert name == ("the same call", "two shapes in turn", "a new shape each call")[kind]
    assert unit == "us" and value >= 0
    batches = 1 + 2 * host.BATCHES_PER_ROUND
    assert len(called) == batches * (host.CALLS + 1)  # and one whose status is looked at
    timed = [astuple(params) for number, params in enumerate(called) if (number + 1) % (host.CALLS + 1)]
    assert len(set(timed)) == (shapes or len(timed))
    assert all(a != b for a, b in zip(timed, timed[1:], strict=False)) or kind == 0
    assert all(0 < params.seqlen_q <= 128 and 0 < params.seqlen_k <= 300 for params in called)


def test_a_refused_call_is_no_time(monkeypatch):
    monkeypatch.setattr(host, "forward", lambda params, handle: Status.INVALID_SHAPE)
    with pytest.raises(FlashAttentionError):
        next(host.calls(host.changing(PARAMS), 1, lambda: None, rounds=1))


def test_cold_starts_have_an_empty_folder_and_warm_ones_the_same(monkeypatch):
    folders = []
    monkeypatch.setattr(host, "start", lambda folder: folders.append(folder) or len(folders))
    assert list(host.starts(3)) == [("cold start", 3, "s"), ("warm start", 4, "s")]
    assert folders[::2] == folders[1::2] and len(set(folders)) == 3


def test_a_start_is_a_process_with_that_folder_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("FA3_CUTE_DISABLE_JIT", "1")
    script = "import os; print(len(os.environ['FA3_CUTE_CACHE_DIR']) + ('FA3_CUTE_DISABLE_JIT' in os.environ))"
    monkeypatch.setattr(host, "FIRST_RESULT", script)
    assert host.start(str(tmp_path)) == len(str(tmp_path))


def test_host_suite_prints_and_writes(monkeypatch, tmp_path, capsys, called):
    device = SimpleNamespace(create_stream=FakeStream)
    for name, fake in {
        "hopper_device_problem": lambda: None,
        "open_device": lambda: device,
        "Monitor": lambda device: None,
        "Tensors": lambda cases, stream: SimpleNamespace(params=lambda case: PARAMS),
        "starts": lambda rounds: [("cold start", 3.25, "s")],
    }.items():
        monkeypatch.setattr(host, name, fake)
    monkeypatch.setattr(host.environment, "describe", lambda *args: {"suite": "host"})
    monkeypatch.setattr(host.environment, "sentence", lambda known: "a GPU")
    file = tmp_path / "host.json"
    assert main(["bench", "--suite", "host", "--rounds", "1", "--json", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "a GPU" and len(said) == 8 and said[-1].split() == ["cold", "start", "3.25", "s"]
    written = json.loads(file.read_text())
    assert [row["unit"] for row in written["host"]] == ["us", "us", "us", "us", "us", "s"]
    assert main(["report", str(file)]) == 2
    assert "the host suite has no tables" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seqlen=512", "--causal", "--dtype=fp16", "--plot=a.png"])
def test_host_suite_has_its_own_problem(option, capsys):
    assert main(["bench", "--suite", "host", option]) == 2
    assert "the host suite has its own" in capsys.readouterr().err


def test_host_suite_needs_a_gpu(capsys):
    if hopper_device_problem() is None:
        pytest.skip("this machine has a Hopper GPU")
    assert main(["bench", "--suite", "host"]) == 2
    assert capsys.readouterr().err.startswith("bench needs a Hopper GPU: ")


def test_calls_over_pages_are_one_launch_and_two():
    assert [set(case.lengths) for case in host.PAGED.values()] == [{1}, {1, 128}]
    for case, launches in zip(host.PAGED.values(), (1, 2), strict=True):
        tensors = SimpleNamespace(
            pointers=lambda case, kv_set: dict.fromkeys(("q", "k", "v", "out", *case.index_shapes()), 1 << 20)
        )
        params = Tensors.params(tensors, case)
        assert params.page_table and params.page_size == 16
        assert len(operation_of(ProblemShape.of(plain(params))).launches) == launches


def test_the_first_result_is_of_a_short_problem():
    assert host.CASE.shortened(128) == Case("bf16", 128, True, 128, 128, 1, 16, 16)


@pytest.mark.gpu
def test_host_suite_on_the_gpu(capsys):
    assert main(["bench", "--suite", "host", "--rounds", "1"]) == 0
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [unit for _, _, unit in rows] == ["us", "us", "us", "us", "us", "s", "s"]
    assert all(float(value) > 0 for _, value, _ in rows)
