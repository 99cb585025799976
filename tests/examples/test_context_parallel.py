"""Context parallelism, its ranks simulated in NumPy: exact to rounding, whatever the scheme and the number of ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fa3_cute.contract.backward_reference import backward_reference
from fa3_cute.contract.reference import attention_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from parallel.comm import SimulatedComm
from parallel.host import HostEngine
from parallel.plan import Problem, gathered_calls
from parallel.schemes import SCHEMES, AllGather, Gradients, Ring, Share, Ulysses
from parallel.shares import share_of, whole_of

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


def options_of(problem: Problem) -> dict:
    offsets = np.cumsum((0, *problem.seqlens))
    window = {"causal": problem.is_causal} if problem.window is None else {"window_size": (problem.window, 0)}
    return {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, **window}


def shares_of(problem: Problem, arrays: dict, ranks) -> dict[int, Share]:
    out = np.full(arrays["q"].shape, np.nan)
    return {
        rank: Share(*(share_of(problem, array, rank) for array in (*(arrays[x] for x in "qkv"), out))) for rank in ranks
    }


def rows_first(arrays: dict, names) -> list[np.ndarray]:
    return [arrays[name].swapaxes(0, 1) for name in names]


def run(scheme, problem: Problem, **options) -> np.ndarray:
    engine = HostEngine(problem)
    comm = SimulatedComm(engine, problem.num_ranks)
    shares = shares_of(problem, inputs(problem), comm.ranks)
    scheme(comm, engine, problem, **options).forward(shares)
    return whole_of(problem, {rank: share.out for rank, share in shares.items()})


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_result_is_that_of_one_rank(scheme, mode, ranks):
    problem = problem_of(mode, ranks)
    if scheme == "ring" and problem.window is not None:
        pytest.skip("test_ring_has_no_windows")
    expected, _ = attention_reference(*rows_first(inputs(problem), "qkv"), **options_of(problem))
    np.testing.assert_allclose(run(SCHEMES[scheme], problem), expected.swapaxes(0, 1), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("groups", [2, 8])
def test_gathering_by_groups_of_heads_changes_nothing(groups):
    problem = problem_of("packed", 4)
    np.testing.assert_array_equal(run(AllGather, problem, groups=groups), run(AllGather, problem))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_one_rank(mode, ranks):
    problem, arrays = problem_of(mode, ranks), inputs(problem_of(mode, ranks))
    engine = HostEngine(problem)
    comm = SimulatedComm(engine, ranks)
    shares = shares_of(problem, arrays, comm.ranks)
    gradients = {
        rank: Gradients(share_of(problem, arrays["dout"], rank), *(np.full(x.shape, np.nan) for x in (s.q, s.k, s.v)))
        for rank, s in shares.items()
    }
    scheme = AllGather(comm, engine, problem, keeps_lse=True)
    scheme.make_gradients()
    scheme.forward(shares)
    scheme.backward(shares, gradients)
    expected = backward_reference(*rows_first(arrays, ("q", "k", "v", "dout")), **options_of(problem))
    for name in ("dq", "dk", "dv"):
        found = whole_of(problem, {rank: getattr(gradient, name) for rank, gradient in gradients.items()})
        np.testing.assert_allclose(found, getattr(expected, name).swapaxes(0, 1), rtol=1e-10, atol=1e-12, err_msg=name)


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
