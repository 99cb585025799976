"""The benchmark of gradients: its cases are good calls, every gradient is checked, FlashAttention-4 and cuDNN are
called as they expect, what the run concludes."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
from fake_backward import (
    BACKWARD_MS,
    DETERMINISTIC_MS,
    FakeFa4,
    FakeGraph,
    FakeTensor,
    cudnn_frontend,
    install_backward,
)

from fa3_cute.cli import bench, gradients, main, peers
from fa3_cute.cli.case import Case
from fa3_cute.cli.passes import BACKWARD, BOTH, DETERMINISTIC, FORWARD
from fa3_cute.cli.suites import backward, prefill, varlen
from fa3_cute.contract.backward_rules import contract_problems
from fa3_cute.planning.operations import problems

ARGV = ["bench", "--suite", "backward", "--rounds", "2", "--batch-ms", "2"]
DENSE = Case("bf16", 64, True, 96, 96, 2, 4, 2, passes=BACKWARD)
FULL = replace(DENSE, is_causal=False)
PACKED = Case("bf16", 64, True, 80, 80, 3, 4, 2, lengths=(3, 80, 17), label="3+80+17", passes=BACKWARD)


def parsed(*argv: str):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(argv)


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_case_is_a_good_call(dtype):
    cases = backward.cases(parsed("--dtype", dtype))
    assert len({case.name for case in cases}) == len(cases) > 50
    names = ("q", "k", "v", "out", "softmax_lse", "dout", "dq", "dk", "dv")
    places = {name: (1 + place) << 36 for place, name in enumerate(names)}
    tensors = SimpleNamespace(
        pointers=lambda case: places | dict.fromkeys(case.index_shapes(), 1 << 35),
    )
    for case in cases:
        params = gradients.GradientTensors.without_workspace(tensors, case)
        assert contract_problems(params) == [], case.name
        assert params.deterministic == (case.passes == DETERMINISTIC)
        assert problems(gradients.GradientTensors.forward_params(tensors, case)) == []


def test_what_is_timed_together():
    """A pass with the same bits every time, and the forward with it, beside the backward pass; shared heads beside
    their own."""
    cases = backward.cases(parsed())
    groups = [list(found) for name, found in groupby(cases, lambda case: case.group) if name]
    assert len({found[0].group for found in groups}) == len(groups) == 5 * 2 * 4 + 1
    passes = {found[0].seqlen_q: [case.passes for case in found] for found in groups[:-1]}
    assert passes == {
        512: [BACKWARD],
        2048: [BACKWARD, DETERMINISTIC],
        4096: [BACKWARD, BOTH],
        16384: [BACKWARD, DETERMINISTIC, BOTH],
    }
    assert [case.heads for case in groups[-1]] == ["64", "64:8"]
    packed = [case for case in cases if case.lengths]
    assert {case.lengths for case in packed} == set(varlen.LAYOUTS.values()) and all(
        case.passes == BACKWARD for case in packed
    )


def test_the_command_line_narrows_the_cases():
    assert {case.head_dim for case in backward.cases(parsed("--head-dim", "64"))} == {64}
    assert {case.is_causal for case in backward.cases(parsed("--full"))} == {False}
    only = backward.cases(parsed("--seqlen", "2048", "--causal", "--head-dim", "128"))
    assert [case.name for case in only] == [
        f"bf16 d128 causal h16 8x2048 {passes}" for passes in (BACKWARD, DETERMINISTIC)
    ]


def test_nominal_flops():
    by_passes = {passes: replace(DENSE, passes=passes).flops for passes in (FORWARD, BACKWARD, DETERMINISTIC, BOTH)}
    forward = by_passes.pop(FORWARD)
    assert {passes: flops / forward for passes, flops in by_passes.items()} == {
        BACKWARD: 2.5,
        DETERMINISTIC: 2.5,
        BOTH: 3.5,
    }


def test_what_has_no_gradients_is_refused(capsys):
    assert main([*ARGV, "--dtype", "fp8_e4m3"]) == 2
    assert capsys.readouterr().err.startswith("there are no kernels for ")


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Small problems."""
    monkeypatch.setattr(prefill, "TOKENS", 128)
    monkeypatch.setattr(backward, "SEQLENS", (64,))
    monkeypatch.setattr(backward, "BESIDE", {64: (DETERMINISTIC, BOTH)})
    monkeypatch.setattr(backward, "SHARED", (64, 64, 4, (4, 2)))
    monkeypatch.setattr(varlen, "LAYOUTS", {"3+80+17": (3, 80, 17)})
    monkeypatch.setattr(varlen, "NUM_HEADS", 2)
    monkeypatch.setattr(prefill, "HIDDEN", 128)
    return install_backward(monkeypatch)


def test_bench_from_end_to_end(gpu, tmp_path, monkeypatch, capsys):
    def make_peer(case, pointers):
        return lambda: setattr(gpu.stream, "now", gpu.stream.now + (36.0 if case.passes == DETERMINISTIC else 20.0))

    peer = SimpleNamespace(version="fa4 0", launch=make_peer, error=lambda case, pointers, launch: 1e-3)
    monkeypatch.setitem(peers.PEERS, "fa4", lambda: peer)
    monkeypatch.setattr(peers, "use_stream", lambda handle: None)
    file = tmp_path / "rows.json"
    assert main([*ARGV, "--head-dim", "64", "--causal", "--peers", "fa4", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    dense, shared = "bf16 d64 causal h2 2x64", "bf16 d64 causal h{} 2x64 backward"
    names = [
        *(f"{dense} {passes}" for passes in (BACKWARD, DETERMINISTIC, BOTH)),
        "bf16 d64 causal h2 3+80+17 backward",
    ]
    assert [row["name"] for row in written["rows"]] == [*names, shared.format("4"), shared.format("4:2")]
    times = [row["results"][bench.OURS]["ms"] for row in written["rows"]]
    both = BACKWARD_MS + gpu.milliseconds
    assert times == pytest.approx([BACKWARD_MS, DETERMINISTIC_MS, both, *[BACKWARD_MS] * 3])
    assert all(0 < row["errors"][bench.OURS] < 5e-3 for row in written["rows"])
    slower, mean, deterministic, of_heads = written["conclusions"]
    assert slower.startswith("slower than the better peer in 5 of 6 rows") and f"{dense} deterministic" not in slower
    mean_of_six = (1.2 * (20 / both) * 0.8**4) ** (1 / 6)
    assert mean == f"the better peer takes {mean_of_six:.3f}x our time, geometric mean of 6 rows"
    assert deterministic == f"{dense} deterministic: 1.200x, fa4 1.800x the time of {dense} backward"
    assert of_heads == f"{shared.format('4:2')}: 1.000x, fa4 1.000x the time of {shared.format('4')}"
    capsys.readouterr()
    assert main(["report", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        "| type | head_dim | heads | sequences | timed | us | TFLOP/s | of peak | FA4 TFLOP/s | FA4 time / ours |"
        in said
    )
    assert "\n| BF16 | 64 | 2 | 2x64 | forward + backward | 35000.0 |" in said


@pytest.mark.parametrize("case", [DENSE, FULL, PACKED, replace(DENSE, passes=BOTH), replace(DENSE, seqlen_q=40)])
@pytest.mark.parametrize("spoiled", ["", "dq", "dk", "dv"])
def test_every_gradient_is_checked(case, spoiled, gpu):
    """A row that a kernel leaves out is a wrong result."""
    tensors = gradients.GradientTensors([case], gpu.stream)
    tensors.poison_out()
    gpu.forward(tensors.forward_params(case), 1)
    gpu.spoiled = spoiled
    gpu.backward(tensors.params(case), 1)
    assert (tensors.error_of(case) < bench.limit("bf16", bench.OURS)) == (not spoiled)


def test_what_nobody_wrote_is_wrong(gpu):
    tensors = gradients.GradientTensors([DENSE], gpu.stream)
    tensors.poison_out()
    gpu.forward(tensors.forward_params(DENSE), 1)
    assert np.isnan(tensors.error_of(DENSE))


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(gpu, monkeypatch):
    """The tensors of a case, for the peers to see; our gradients have been computed."""

    def of(case):
        found = gradients.GradientTensors([case], gpu.stream)
        found.poison_out()
        gpu.forward(found.forward_params(case), 1)
        gpu.backward(found.params(case), 1)
        return found

    def view(pointer, shape, dtype):
        return FakeTensor(gpu.read(pointer, shape, {"bf16": np.uint16, "int32": np.int32, "fp32": np.float32}[dtype]))

    monkeypatch.setattr(peers, "view", view)
    return of


@pytest.fixture
def fa4(monkeypatch):
    interface = FakeFa4()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=interface))
    return interface


@pytest.fixture
def cudnn(monkeypatch):
    torch = SimpleNamespace(
        __version__="2",
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900)),
        cuda=SimpleNamespace(current_stream=lambda: SimpleNamespace(cuda_stream=7)),
    )
    modules = {"torch": torch, "torch.nn": SimpleNamespace(), "cudnn": cudnn_frontend()}
    modules["torch.nn.attention"] = SimpleNamespace(SDPBackend=None, sdpa_kernel=None)
    modules["torch.nn.functional"] = SimpleNamespace(scaled_dot_product_attention=None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return FakeGraph.made


@pytest.mark.parametrize("passes", [BACKWARD, DETERMINISTIC, BOTH])
@pytest.mark.parametrize("case", [DENSE, FULL, PACKED])
def test_fa4_is_called_as_it_expects(case, passes, tensors, fa4):
    case = replace(case, passes=passes)
    ours = tensors(case)
    peer = peers.load("fa4")
    launch = peer.launch(case, ours.pointers(case))
    assert peer.error(case, ours.pointers(case), launch) < 1e-2
    of_one = {BACKWARD: ["backward"], DETERMINISTIC: ["deterministic"], BOTH: ["forward", "backward"]}[passes]
    assert [name for name, _ in fa4.calls] == 2 * of_one
    launch()[1].array[...] = 0  # in place: the next call writes it anew
    assert peer.error(case, ours.pointers(case), launch) < 1e-2


@pytest.mark.parametrize("passes", [BACKWARD, DETERMINISTIC, BOTH])
@pytest.mark.parametrize("case", [DENSE, FULL])
def test_cudnn_is_called_as_it_expects(case, passes, tensors, cudnn):
    case = replace(case, passes=passes)
    ours = tensors(case)
    peer = peers.load("cudnn")
    assert peer.error(case, ours.pointers(case), peer.launch(case, ours.pointers(case))) < 1e-2
    assert [graph.runs for graph in cudnn] == [2] * (2 if passes == BOTH else 1)
    assert cudnn[-1].arguments["use_deterministic_algorithm"] == (passes == DETERMINISTIC)


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_a_gradient_of_ours_that_differs_from_a_peers_shows(name, gpu, tensors, fa4):
    ours = tensors(DENSE)
    peer = peers.load("fa4")
    launch = peer.launch(DENSE, ours.pointers(DENSE))
    gpu.write(ours.pointers(DENSE)[name], np.ones(64))
    assert peer.error(DENSE, ours.pointers(DENSE), launch) > 1e-2


@pytest.mark.parametrize(
    "name, case, said",
    [
        ("cudnn", PACKED, "cudnn is timed without packed sequences and windows"),
        ("cudnn", replace(DENSE, seqlen_q=40), "cudnn has no bottom-right aligned"),
        ("cudnn", FULL, "cudnn refuses bf16 d64 full h4:2 2x96 backward: no such head$"),
        ("fa4", replace(DENSE, passes=FORWARD), "fa4 is timed for gradients alone"),
    ],
)
def test_what_peers_refuse_is_one_line(name, case, said, tensors, fa4, cudnn, monkeypatch):
    monkeypatch.setattr(FakeGraph, "refusal", "no such head\nand where")
    with pytest.raises(peers.PeerMissing, match=said):
        peers.load(name).launch(case, tensors(case).pointers(case))


def test_peers_without_gradients_are_left_out():
    peer = peers.Peer("fa3", "0", ("bf16",), make_launch=lambda *args: None)
    with pytest.raises(peers.PeerMissing, match="fa3 is timed without gradients"):
        peer.launch(DENSE, {})


@pytest.mark.gpu
def test_bench_of_gradients_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(backward, "BESIDE", {512: (DETERMINISTIC, BOTH)})
    file = tmp_path / "rows.json"
    argv = [*ARGV, "--head-dim", "64", "--causal", "--seqlen", "512", "--dtype", "bf16", "--json", str(file)]
    assert main(argv) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"]["passes"] for row in rows] == [BACKWARD, DETERMINISTIC, BOTH]
    for row in rows:
        assert row["errors"][bench.OURS] < bench.limit("bf16", bench.OURS)
        assert row["results"][bench.OURS]["tflops"] > 0 and row["host_us"] > 0
