"""Backward on the GPU of what changes scores: cases of every feature against the reference, bits that repeat, graphs.

Of the cases of a head_dim, which are too many, those that cover each feature with the ways in which they may differ.
"""

from dataclasses import replace

import numpy as np
import pytest
from backward_cases import NAMES, BackwardCase, feature_cases, inputs_of
from backward_problems import BackwardProblem

from fa3_cute import backward, backward_workspace_size, warmup
from fa3_cute.contract.backward_rules import REFUSED, SERVED_HEAD_DIMS

pytestmark = pytest.mark.gpu

ALIGNMENT = 16
REPEATS = 20
# Fields of a case that ask for what a call may be refused for.
ASKED = {"softcap": "softcap", "sinks": "s_aux", "alibi": "alibi_slopes", "attn_mask": "attn_mask"}
ASKED |= {"attention_chunk": "attention_chunk", "p_dropout": "p_dropout"}


def features_of(case: BackwardCase) -> frozenset[str]:
    """The fields of what changes the case's scores."""
    return frozenset(field for field in ASKED if getattr(case.forward, field))


def is_served(case: BackwardCase) -> bool:
    names = {ASKED[field] for field in features_of(case)}
    names |= {"d_bias"} if case.forward.attn_mask not in ("", "bool") else set()
    names |= {"accumulate_dkv"} if case.accumulates else set()
    return bool(features_of(case)) and not names & set(REFUSED) and case.grad_dtype is None


def bf16(case: BackwardCase) -> BackwardCase:
    return replace(case, forward=replace(case.forward, dtype="bf16"))


def covering(head_dim: int) -> list[BackwardCase]:
    """Of a head_dim's cases: each feature once, and each kind of mask and of lengths."""
    chosen: dict[tuple, BackwardCase] = {}
    for case in filter(is_served, feature_cases(head_dim)):
        forward = case.forward
        mask = "causal" if forward.is_causal else forward.window
        values = tuple(getattr(forward, field) for field in ASKED)
        lengths = case.layout or ("used" if case.used else "")
        if values not in {known[0] for known in chosen} or (mask, lengths) not in {known[1] for known in chosen}:
            chosen[values, (mask, lengths)] = bf16(case)
    return list(chosen.values())


CASES = [case for head_dim in SERVED_HEAD_DIMS for case in covering(head_dim)]
# Of each feature one case of many tiles, dense, with the other features off.
ONE_OF_EACH = list({features_of(case): case for case in CASES if not case.lengths}.values())


def run(problem: BackwardProblem, stream, **overrides):
    """(dq, dk, dv), gradients of what scores are changed with; asserts that nothing around the workspace is written."""
    nbytes = backward_workspace_size(problem.params(**overrides))
    given, memory = problem.workspace(nbytes)
    found = problem.run(stream, **given, **overrides)
    memory.read(stream)
    return found, problem.score_results(stream)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, stream):
    problem = BackwardProblem(case)
    found, of_scores = run(problem, stream)
    problem.check(*found, **of_scores)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_bits_repeat(case, stream):
    """Those of d_s_aux, dk and dv in every call."""
    problem = BackwardProblem(case)
    (_, *first), of_scores = run(problem, stream)
    for _ in range(REPEATS - 1):
        (_, *found), again = run(problem, stream)
        for name, got, wanted in zip(NAMES[1:], found, first, strict=True):
            assert np.array_equal(got.view(np.uint16), wanted.view(np.uint16)), name
        if "d_s_aux" in again:
            assert np.array_equal(again["d_s_aux"].view(np.uint32), of_scores["d_s_aux"].view(np.uint32))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_captured_call_is_replayed(case, device):
    """With other values each time."""
    stream = device.create_stream()
    problem = BackwardProblem(case)
    given, _ = problem.workspace(backward_workspace_size(problem.params()))
    params = problem.params(**given)
    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    backward(params, builder).check()
    graph = builder.end_building().complete()
    for scale_of_q in (1.0, 2.0):
        problem.fill(inputs_of(case, scale_of_q))
        graph.launch(stream)
        problem.check(*problem.results(stream), **problem.score_results(stream))


def test_without_queries_d_s_aux_is_0(stream):
    """Packed tensors without a row of q: every head of d_s_aux is written."""
    case = next(case for case in CASES if case.forward.sinks and case.layout)
    problem = BackwardProblem(case)
    problem.lengths["cu_seqlens_q"].array[...] = 0
    problem.lengths["cu_seqlens_q"].image.upload()
    absent = dict.fromkeys(("q", "out", "dout", "softmax_lse", "dlse", "dq"))
    problem.run(stream, total_q=0, **absent)
    assert not problem.score_results(stream)["d_s_aux"].any()
