"""The decode kernel in CUDA graphs on the GPU."""

from dataclasses import replace

import pytest
from cases import DECODE, Case
from check import assert_same_bits, check, make_problem, params_of, poison_of, results, run
from images import POISON
from workspaces import ALTERNATING, SEVERAL_CLUSTERS, SOME, Workspace

from fa3_cute import forward, warmup, workspace_size

pytestmark = pytest.mark.gpu


def captured(stream, *calls):
    """`forward` of these params as a graph."""
    builder = stream.create_graph_builder().begin_building()
    for params in calls:
        forward(params, builder).check()
    return builder.end_building().complete()


def give_lengths(problem, inputs, lengths) -> None:
    """Other used lengths of K and V; the rows past them are NaN."""
    problem.lengths["seqused_k"].array[...] = lengths
    for array, original in zip(problem.inputs, inputs, strict=True):
        array[...] = original
    unused = ~problem.is_used("k")
    for array in (problem.k.array, problem.v.array):
        array[unused] = poison_of(array.dtype)
    problem.upload()


REPLAYED = ((700, 700, 700), (1, 64, 65), (0, 699, 0), (300, 128, 641), (0, 0, 0))


@pytest.mark.parametrize("splits", [0, 1, 3, 128])
@pytest.mark.parametrize("mask", [{}, {"seqlen_q": 3, "is_causal": True}], ids=["one query", "causal"])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_graph_replay_with_other_used_lengths(family, mask, splits, device):
    """Captured once, replayed for the caches as they grow and shrink; on another stream as well."""
    stream, other = device.create_stream(), device.create_stream()
    problem = make_problem(replace(family, batch=3, seqlen_k=700, **mask), lengths={"seqused_k": (700,) * 3})
    inputs = [array.copy() for array in problem.inputs]
    params = params_of(problem, num_splits=splits)
    warmup(params, stream).check()
    graph = captured(stream, params)
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream), "the capture launched something"
    for index, lengths in enumerate(REPLAYED):
        give_lengths(problem, inputs, lengths)
        own = (stream, other)[index % 2]
        graph.launch(own)
        check(problem, *results(problem, own))


def test_replays_agree_bit_for_bit(device):
    """40 replays in a row, of several launches each: every one leaves the arrival counts at 0."""
    stream = device.create_stream()
    calls = [(make_problem(case), splits) for case, splits in ALTERNATING[:5]]
    params = [params_of(problem, num_splits=splits) for problem, splits in calls]
    for one in params:
        warmup(one, stream).check()
    expected = [run(problem, stream, num_splits=splits) for problem, splits in calls]
    graph = captured(stream, *params, *params)
    for _ in range(40):
        for problem, _ in calls:
            problem.poison_outputs(stream)
        graph.launch(stream)
    for (problem, _), pair in zip(calls, expected, strict=True):
        assert_same_bits(results(problem, stream), pair)
        check(problem, *pair)


def test_a_call_in_a_graph_reads_what_the_one_before_wrote(device):
    stream = device.create_stream()
    case = Case("bf16", 128, False, 16, 2, 1, 3000)
    first, second = make_problem(case), make_problem(case)
    params = [
        params_of(first, num_splits=SEVERAL_CLUSTERS),
        params_of(second, num_splits=SEVERAL_CLUSTERS, q=first.out.address),
    ]
    warmup(params[0], stream).check()
    captured(stream, *params).launch(stream)
    out, lse = results(first, stream)
    check(first, out, lse)
    second.q.array[...] = out
    check(second, *results(second, stream))


@pytest.mark.parametrize("family", SOME, ids=str)
def test_warmup_leaves_a_workspace_for_the_stream_that_captures(family, device):
    """Warmed up without a stream, captured on one that was never used."""
    problem = make_problem(replace(family, seqlen_k=900))
    params = params_of(problem, num_splits=128)
    warmup(params).check()
    stream = device.create_stream()
    captured(stream, params).launch(stream)
    check(problem, *results(problem, stream))


def test_capture_with_the_workspace_of_the_caller(device, stream):
    """Needs no warmup beyond the kernel's."""
    problem = make_problem(replace(DECODE[7], seqlen_k=900))
    warmup(params_of(problem, num_splits=1), stream).check()
    workspace = Workspace(workspace_size(params_of(problem, num_splits=128)))
    own = device.create_stream()
    captured(own, params_of(problem, num_splits=128, **workspace.fields)).launch(own)
    check(problem, *results(problem, own))
    assert (workspace.parts(own)[0] == POISON).all()


def test_capture_that_needs_a_larger_workspace_makes_it(device):
    """The kernel is loaded and no stream has as much memory; the capture launches nothing."""
    stream = device.create_stream()
    problem = make_problem(Case("bf16", 256, False, 64, 1, 1, 100, batch=16))
    params = params_of(problem, num_splits=251)
    assert workspace_size(params) > 200 << 20
    warmup(params_of(problem, num_splits=1), stream).check()
    graph = captured(stream, params)
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)
    graph.launch(stream)
    check(problem, *results(problem, stream))


@pytest.mark.parametrize("family", SOME, ids=str)
def test_eager_calls_between_replays(family, device):
    """On the same stream: they share its workspace, one after the other."""
    stream = device.create_stream()
    problem, eager = make_problem(replace(family, seqlen_k=900)), make_problem(replace(family, seqlen_k=500, batch=4))
    params = params_of(problem, num_splits=128)
    warmup(params, stream).check()
    graph = captured(stream, params)
    for _ in range(10):
        graph.launch(stream)
        forward(params_of(eager, num_splits=255), stream).check()
    check(problem, *results(problem, stream))
    check(eager, *results(eager, stream))
