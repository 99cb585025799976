"""Backward on the GPU of what changes scores: cases of every feature, bits that repeat, graphs."""

from dataclasses import fields, replace

import numpy as np
import pytest
from backward_cases import FEATURES, MASKED, NAMES, BackwardCase, feature_cases, inputs_of
from backward_problems import BackwardProblem
from cases import Case

from fa3_cute import backward, backward_workspace_size, warmup
from fa3_cute.contract.formats import HEAD_DIMS

pytestmark = pytest.mark.gpu

REPEATS = 20
# Of a Case, with their defaults: what changes its scores.
SCORES = (
    "softcap",
    "sinks",
    "sink_dtype",
    "alibi",
    "attn_mask",
    "mask_dims",
    "mask_gap",
    "attention_chunk",
    "p_dropout",
)
OFF = {item.name: item.default for item in fields(Case) if item.name in SCORES}
# {head_dim: (name in FEATURES or MASKED, mask, lengths)}, None: of all of them that feature_cases has. They cover what
# features do in either kind of kernel, with few kernels: those of sinks are other tests', and those of chunks are those
# of windows, whatever the mask.
SINKS = ("sinks", None, None)
CHOSEN = {
    64: (
        *(SINKS, ("sinks that take all", "full", "")),
        *((name, "full", "") for name in ("alibi", "alibi of sequences", "boolean", "boolean of keys")),
        *((name, None, "") for name in ("chunks", "whole chunks")),
        ("all but masks", None, "gaps"),
    ),
    96: (("sinks", "full", ""),),
    128: (
        *(("sinks", "causal", ""), ("sinks", None, "used"), ("sinks that take all", None, "gaps")),
        *((name, "causal", "") for name in ("softcap", "flat softcap")),
        *((name, "causal", "") for name in ("bias", "bias of heads", "bias of scores", "bias of keys")),
        *((name, None, lengths) for name, lengths in (("alibi", "used"), ("chunks", "gaps"))),
    ),
    192: (),
    256: (("all but masks", None, "gaps"),),
}


def scores_of(case: BackwardCase) -> dict:
    """What changes the case's scores, by field."""
    return {name: getattr(case.forward, name) for name in SCORES}


def place_of(case: BackwardCase) -> tuple[str, str]:
    """(mask, lengths) as CHOSEN has them."""
    forward = case.forward
    mask = "causal" if forward.is_causal else "window" if max(forward.window) >= 0 else "full"
    return mask, case.layout or "used" * bool(case.used)


def in_bf16(case: BackwardCase) -> BackwardCase:
    """In BF16, numbers that are added too."""
    changes = {"attn_mask": "bf16"} if case.forward.attn_mask not in ("", "bool") else {}
    return replace(case, forward=replace(case.forward, dtype="bf16", **changes))


def chosen(head_dim: int) -> list[BackwardCase]:
    """Those of CHOSEN."""
    plain = [case for case in feature_cases(head_dim) if not case.accumulates and case.grad_dtype is None]
    return [
        in_bf16(case)
        for name, *wanted in CHOSEN[head_dim]
        for case in plain
        if scores_of(case) == OFF | (FEATURES | MASKED)[name]
        and all(want in (None, own) for want, own in zip(wanted, place_of(case), strict=True))
    ]


CASES = [case for head_dim in HEAD_DIMS for case in chosen(head_dim)]
# Of each head_dim and set of features one.
ONE_OF_EACH = list(
    {(case.forward.head_dim, *map(bool, scores_of(case).values())): case for case in reversed(CASES)}.values()
)


def run(problem: BackwardProblem, stream, **overrides):
    """(dq, dk, dv), gradients of what scores are changed with; asserts that nothing around the workspace is written."""
    given, memory = problem.workspace(backward_workspace_size(problem.params(**overrides)))
    found = problem.run(stream, **given, **overrides)
    memory.read(stream)
    return found, problem.score_results(stream)


def bits(gradients: dict) -> dict:
    """The gradients as integers."""
    return {name: array.view(f"u{array.itemsize}") for name, array in gradients.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, stream):
    problem = BackwardProblem(case)
    found, of_scores = run(problem, stream)
    problem.check(*found, **of_scores)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_bits_repeat(case, stream):
    """All of them but dq, without deterministic, and a d_bias that is a sum."""
    problem, first = BackwardProblem(case), {}
    for _ in range(REPEATS):
        found, of_scores = run(problem, stream)
        again = bits(dict(zip(NAMES, found, strict=True)) | of_scores)
        first = first or again
        for name, expected in first.items():
            is_sum = name == "dq" or name == "d_bias" and case.forward.mask_dims != "bhqk"
            assert is_sum or np.array_equal(again[name], expected), name


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


def test_scores_without_a_gradient_of_their_own(stream):
    """d_s_aux and d_bias that are not wanted are not written, nor missed."""
    case = next(case for case in CASES if case.forward.attn_mask == "bf16")
    problem = BackwardProblem(case)
    found, _ = run(problem, stream, d_bias=None)
    problem.check(*found)
    assert problem.score_gradients["d_bias"].is_untouched(stream)
