"""The decode kernel's scratch memory on the GPU: arrival counts, workspaces, streams."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cases import DECODE, Case
from check import Problem, assert_same_bits, check, make_problem, params_of, results, run
from images import POISON, Image
from workspaces import ALTERNATING, SEVERAL_CLUSTERS, SOME, Workspace

from fa3_cute import Status, forward, last_error, warmup, workspace_size
from fa3_cute.arrays import memory as cuda

pytestmark = pytest.mark.gpu


# ---- arrival counts ------------------------------------------------------------------------------------------------


def test_shapes_and_splits_alternate(stream):
    """Every call leaves the arrival counts at 0 for the next one, whatever that is."""
    problems = [make_problem(case) for case, _ in ALTERNATING]
    calls = [(problem, splits) for problem, (_, splits) in zip(problems, ALTERNATING, strict=True)]
    first = [run(problem, stream, num_splits=splits) for problem, splits in calls]
    for problem, pair in zip(problems, first, strict=True):
        check(problem, *pair)
    for _ in range(20):
        for problem, splits in calls:
            problem.poison_outputs(stream)
            forward(params_of(problem, num_splits=splits), stream).check()
        for problem, pair in zip(problems, first, strict=True):
            assert_same_bits(results(problem, stream), pair)


# ---- workspaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [SEVERAL_CLUSTERS, 128, 255])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_workspace_of_the_caller(family, splits, stream):
    """Of exactly the size asked for, and full of NaN: the bits that the library's own gives, nothing written around."""
    problem = make_problem(replace(family, seqlen_q=3, seqlen_k=900))
    params = params_of(problem, num_splits=splits)
    expected = run(problem, stream, num_splits=splits)
    workspace = Workspace(workspace_size(params))
    for _ in range(2):  # the second time over what the first one left
        problem.poison_outputs(stream)
        assert_same_bits(run(problem, stream, num_splits=splits, **workspace.fields), expected)
    around, own = workspace.parts(stream)
    assert (around == POISON).all() and (own != POISON).any()
    check(problem, *expected)


def test_one_workspace_for_many_calls(stream):
    """Large enough for the largest; each finds what another one left there."""
    calls = [(make_problem(case), splits) for case, splits in ALTERNATING]
    sizes = [workspace_size(params_of(problem, num_splits=splits)) for problem, splits in calls]
    workspace = Workspace(max(sizes))
    for _ in range(2):
        for problem, splits in calls:
            problem.poison_outputs(stream)
            forward(params_of(problem, num_splits=splits, **workspace.fields), stream).check()
    for problem, _ in calls:
        check(problem, *results(problem, stream))
    assert (workspace.parts(stream)[0] == POISON).all()


@pytest.mark.parametrize("missing", [1, 16, 4096])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_a_workspace_that_is_too_small_is_refused(family, missing, stream):
    problem = make_problem(family)
    needed = workspace_size(params_of(problem, num_splits=128))
    workspace = Workspace(needed - missing)
    params = params_of(problem, num_splits=128, **workspace.fields)
    assert forward(params, stream) == Status.INVALID_ARGUMENT and str(needed) in last_error().detail
    assert warmup(params, stream) == Status.INVALID_ARGUMENT
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)
    assert all((part == POISON).all() for part in workspace.parts(stream))


def test_a_misaligned_workspace_is_refused(stream):
    problem = make_problem(DECODE[0])
    fields = Workspace(workspace_size(params_of(problem, num_splits=128)) + 16).fields
    params = params_of(problem, num_splits=128, **{**fields, "workspace": fields["workspace"] + 8})
    assert forward(params, stream) == Status.INVALID_ARGUMENT
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_a_workspace_without_need_is_left_alone(splits, stream):
    """One cluster merges in shared memory: any size will do."""
    problem = make_problem(DECODE[2])
    assert workspace_size(params_of(problem, num_splits=splits)) == 0
    workspace = Workspace(16)
    check(problem, *run(problem, stream, num_splits=splits, **workspace.fields))
    assert all((part == POISON).all() for part in workspace.parts(stream))


# ---- streams -------------------------------------------------------------------------------------------------------

NUM_LAUNCHES = 60
# Some ten microseconds each, on less than half of the SMs: launches on two streams run at the same time.
STREAMED = [
    (Case("bf16", 128, False, 16, 2, 1, 20_000), SEVERAL_CLUSTERS),
    (Case("bf16", 128, False, 8, 1, 2, 30_000), 48),
    (Case("fp16", 64, False, 16, 2, 1, 25_000), 32),
]


def hold(*streams):
    """Keep streams busy for a millisecond or two: what is enqueued next runs at full speed. Keep what this returns."""
    delays = [cuda.allocate(1 << 30) for _ in streams]
    for _ in range(4):
        for delay, stream in zip(delays, streams, strict=True):
            cuda.fill(delay, 0, stream=stream)
    return delays


@dataclass
class Launches:
    """Many launches of one call, each into an output of its own; and the memory that they use."""

    problem: Problem
    workspace: Workspace | None
    expected: bytes
    outs: Image
    calls: list

    @staticmethod
    def create(case: Case, splits: int, stream, has_workspace: bool = False) -> "Launches":
        """With the bits that the call gives when nothing else runs, right within the tolerance."""
        problem = make_problem(case)
        out, lse = run(problem, stream, num_splits=splits)
        check(problem, out, lse)
        fields = {"num_splits": splits, "softmax_lse": None}
        workspace = Workspace(workspace_size(params_of(problem, **fields))) if has_workspace else None
        fields |= workspace.fields if workspace else {}
        outs = Image((NUM_LAUNCHES, out.size), case.dtype)
        outs.upload()
        calls = [
            params_of(problem, out=outs.tensor(outs.whole[index]).address, **fields) for index in range(NUM_LAUNCHES)
        ]
        return Launches(problem, workspace, out.tobytes(), outs, calls)

    def assert_right(self, stream) -> None:
        outs = self.outs.tensor(self.outs.whole).read(stream)
        wrong = [index for index in range(NUM_LAUNCHES) if outs[index].tobytes() != self.expected]
        assert not wrong, f"launches {wrong[:8]} of {NUM_LAUNCHES} differ"


@pytest.mark.parametrize("has_workspace", [False, True], ids=["library", "caller"])
@pytest.mark.parametrize("first, second", [(0, 0), (0, 1), (0, 2)])
def test_two_streams_at_once(first, second, has_workspace, device, stream):
    """Interleaved from one thread: each launch gives the bits that it gives alone, whosever the workspaces are."""
    streams = [device.create_stream() for _ in range(2)]
    works = [Launches.create(*STREAMED[index], stream, has_workspace) for index in (first, second)]
    for work, own in zip(works, streams, strict=True):
        warmup(work.calls[0], own).check()
    delays = hold(*streams)
    for calls in zip(*(work.calls for work in works), strict=True):
        for call, own in zip(calls, streams, strict=True):
            forward(call, own).check()
    for work, own in zip(works, streams, strict=True):
        work.assert_right(own)
    del delays


def test_two_threads_on_two_streams(device, stream):
    """The first use of both streams, too."""
    works = [Launches.create(case, splits, stream) for case, splits in STREAMED[:2]]
    start = threading.Barrier(len(works))

    def launch_all(work):
        device.set_current()
        own = device.create_stream()
        start.wait()
        for call in work.calls:
            forward(call, own).check()
        work.assert_right(own)

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(launch_all, work) for work in works]:
            future.result()


# The kinds of a chain's links: (queries, splits of the even calls, of the odd ones).
CHAINS = {"decode": (1, SEVERAL_CLUSTERS, 3), "without splits": (1, 1, 1), "decode and prefill": (100, 7, 1)}


@pytest.mark.parametrize("seqlen_q, even, odd", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("family", SOME, ids=str)
def test_a_call_reads_what_the_one_before_wrote(family, seqlen_q, even, odd, stream):
    """40 calls, to and fro between two tensors, enqueued at once and then one by one: the same bits.

    The large scale makes every result hang on the one before: a row picks a key or two, whose values are the next row.
    """
    problem = make_problem(replace(family, seqlen_q=seqlen_q, has_lse=False), softmax_scale=2.0)
    ends = [problem.q.address, problem.out.address]
    calls = [
        params_of(problem, q=ends[0], out=ends[1], num_splits=even),
        params_of(problem, q=ends[1], out=ends[0], num_splits=odd),
    ]
    for call in calls:
        warmup(call, stream).check()

    def chain(is_waiting: bool) -> np.ndarray:
        problem.upload()
        delays = [] if is_waiting else hold(stream)
        for index in range(40):
            forward(calls[index % 2], stream).check()
            if is_waiting:
                stream.sync()
        last = problem.q.image.download(stream)
        del delays
        return last

    at_once, one_by_one = chain(False), chain(True)
    assert np.array_equal(at_once, one_by_one)
