"""Context parallelism, its ranks simulated in NumPy: exact to rounding, whatever the scheme and the number of ranks."""

import numpy as np
import pytest

from fa3_cute.contract.backward_reference import backward_reference
from fa3_cute.contract.reference import attention_reference

from parallel.check import gradients_of, options_of, rows_first, shares_of
from parallel.comm import SimulatedComm
from parallel.host import HostEngine
from parallel.plan import Problem, gathered_calls
from parallel.schemes import SCHEMES, AllGather, Ring, Ulysses
from parallel.shares import whole_of

MODES = {
    "causal": {"is_causal": True},
    "full": {"is_causal": False},
    "window": {"window": 21},
    "packed": {"seqlens": (48, 16, 96)},
    "packed_full": {"seqlens": (48, 16, 96), "is_causal": False},
    "packed_window": {"seqlens": (48, 16, 96), "window": 21},
}
HEADS, HEADS_K, HEAD_DIM = 16, 8, 4


def problem_of(mode: str, ranks: int) -> Problem:
    fields = {"seqlens": (96,), **MODES[mode]}
    return Problem(num_ranks=ranks, num_heads=HEADS, num_heads_k=HEADS_K, head_dim=HEAD_DIM, **fields)


def inputs(problem: Problem) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    heads = {"q": HEADS, "k": HEADS_K, "v": HEADS_K, "dout": HEADS}
    return {name: rng.standard_normal((count, problem.total, HEAD_DIM)) for name, count in heads.items()}


def run(scheme, problem: Problem, **options) -> np.ndarray:
    engine = HostEngine(problem)
    comm = SimulatedComm(engine, problem.num_ranks)
    shares = shares_of(engine, problem, inputs(problem), comm.ranks)
    scheme(comm, engine, problem, **options).forward(shares)
    return whole_of(problem, {rank: share.out for rank, share in shares.items()})


# A ring has no windows: test_ring_has_no_windows.
CASES = [(scheme, mode) for scheme in SCHEMES for mode in MODES if scheme != "ring" or "window" not in mode]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("scheme", "mode"), CASES)
def test_result_is_that_of_one_rank(scheme, mode, ranks):
    problem = problem_of(mode, ranks)
    expected, _ = attention_reference(*rows_first(inputs(problem), "qkv"), **options_of(problem))
    np.testing.assert_allclose(run(SCHEMES[scheme], problem), expected.swapaxes(0, 1), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("groups", [2, 8])
def test_gathering_by_groups_of_heads_changes_nothing(groups):
    problem = problem_of("packed", 4)
    np.testing.assert_array_equal(run(AllGather, problem, groups=groups), run(AllGather, problem))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", [AllGather, Ulysses])
def test_gradients_are_those_of_one_rank(scheme, mode, ranks):
    problem, arrays = problem_of(mode, ranks), inputs(problem_of(mode, ranks))
    engine = HostEngine(problem)
    gradients = gradients_of(SimulatedComm(engine, ranks), engine, problem, arrays, scheme)
    expected = backward_reference(*rows_first(arrays, ("q", "k", "v", "dout")), **options_of(problem))
    for name in ("dq", "dk", "dv"):
        found = whole_of(problem, {rank: getattr(gradient, name) for rank, gradient in gradients.items()})
        exact = getattr(expected, name).swapaxes(0, 1)
        np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("mode", "calls"), [("causal", 1), ("full", 1), ("window", 1), ("packed", 2)])
def test_calls_of_a_layer(mode, calls):
    assert len(gathered_calls(problem_of(mode, 4), 1)) == calls


def test_every_rank_has_as_much_to_do():
    """Of a causal mask's triangle: a rank's keys, summed over its chunks, are the same."""
    problem = problem_of("causal", 8)
    (calls,) = {len(gathered_calls(problem, rank)) for rank in range(8)}
    assert calls == 1
    assert len({sum(gathered_calls(problem, rank)[0].lengths["seqused_k"]) for rank in range(8)}) == 1


def test_ring_has_no_windows():
    problem = problem_of("window", 2)
    with pytest.raises(ValueError, match="window: must be None for a ring"):
        Ring(SimulatedComm(HostEngine(problem), 2), HostEngine(problem), problem)


def test_what_cannot_be_divided():
    with pytest.raises(ValueError, match=r"seqlens=\(96, 20\): must be multiples of 2 \* num_ranks = 8"):
        Problem((96, 20), 4, HEADS, HEADS_K, HEAD_DIM)
    problem = Problem((96,), 16 // 4, HEADS, 2, HEAD_DIM)
    with pytest.raises(ValueError, match="num_heads_k=2: must be a multiple of the 4 ranks"):
        Ulysses(SimulatedComm(HostEngine(problem), 4), HostEngine(problem), problem)
    with pytest.raises(ValueError, match="groups=3: must divide num_heads_k=2"):
        AllGather(SimulatedComm(HostEngine(problem), 4), HostEngine(problem), problem, groups=3)
