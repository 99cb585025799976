"""The engine of a GPU where there is none (host_gpu.py): its addresses, strides, lengths and choices are right."""

from types import SimpleNamespace

import host_gpu
import pytest
from parallel import bench, gpu
from parallel.check import MODES, errors, gradient_errors
from parallel.comm import SimulatedComm
from parallel.plan import Problem
from parallel.schemes import Ring


@pytest.fixture
def kernels(monkeypatch) -> host_gpu.Kernels:
    return host_gpu.install(monkeypatch)


@pytest.mark.parametrize("check", [errors, gradient_errors])
@pytest.mark.parametrize("ranks", [1, 2])
def test_within_rounding(kernels, ranks, check):
    """As on a GPU, of what is computed from the params alone: addresses, strides, lengths."""
    problem = Problem((96,), ranks, 4, 2, 64)
    engine = gpu.GpuEngine(problem)
    for scheme, mode, error, allowed in check(SimulatedComm(engine, ranks), engine, problem, MODES):
        assert error <= allowed, (scheme, mode)


def test_margins_reach_the_calls(kernels):
    problem = Problem((256,), 2, 2, 2, 64, dtype="fp8_e4m3")
    engine = gpu.GpuEngine(problem)
    engine.sm_margin = 8
    share = {rank: bench.Share(*(engine.random((2, 128, 64)) for _ in range(4))) for rank in (0, 1)}
    for one in share.values():
        one.out = engine.empty((2, 128, 64), "output")
    Ring(SimulatedComm(engine, 2), engine, problem).forward(share)
    margins = {call.sm_margin for call in kernels.calls if hasattr(call, "sm_margin")}
    assert margins == {8}


def test_bench_prints_every_scheme(kernels, monkeypatch):
    """Of one rank, as the kernels' time is made up: rates and shares of it."""
    monkeypatch.setattr(bench, "ROUND_MS", 1.0)
    problem = Problem((), 1, 4, 2, 64)
    engine, said = gpu.GpuEngine(problem), []
    meeting = SimpleNamespace(tell=lambda value=None: [value])
    timing = bench.Bench(SimulatedComm(engine, 1), engine, meeting, (0, 8), said.append)
    timing.run(problem, [256], ["bf16"], is_backward=True)
    names = [line[:36].strip() for line in said[1:]]
    assert names == [
        "one GPU, all rows",
        "one GPU, a rank's rows, no exchange",
        "all-gather, 1 group",
        *["all-gather, 2 groups"] * 2,
        *["ring"] * 2,
        "ulysses",
        "backward: one GPU, all rows",
        "backward: all-gather",
    ]
