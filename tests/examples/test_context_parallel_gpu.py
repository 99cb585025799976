"""Context parallelism on one GPU, which is all ranks in turn: within what rounding explains, by check.py's rule."""

import pytest
from parallel.check import MODES, errors, gradient_errors
from parallel.comm import SimulatedComm
from parallel.plan import Problem

pytestmark = pytest.mark.gpu
CAUSAL = {name: MODES[name] for name in ("causal", "packed")}


@pytest.mark.parametrize("check", [errors, gradient_errors])
@pytest.mark.parametrize("ranks", [1, 2, 8])  # the example itself has 4
def test_within_rounding(device, ranks, check):
    from parallel.gpu import GpuEngine

    heads = max(4, ranks)
    problem = Problem((256,), ranks, 2 * heads, heads, 128)
    engine = GpuEngine(problem)
    for scheme, mode, error, allowed in check(SimulatedComm(engine, ranks), engine, problem, MODES):
        assert error <= allowed, (scheme, mode)


def test_fp8(device):
    from parallel.gpu import GpuEngine

    problem = Problem((256,), 2, 8, 4, 128, dtype="fp8_e4m3")
    engine = GpuEngine(problem)
    for scheme, mode, error, allowed in errors(SimulatedComm(engine, 2), engine, problem, CAUSAL):
        assert error <= allowed, (scheme, mode)
