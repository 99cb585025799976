"""Order and concurrency on the GPU: streams, threads, graphs, repeated runs, fresh processes."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import FAMILIES, Case
from check import check, make_problem, params_of, results, run

from fa3_cute import Status, forward, warmup
from fa3_cute.arrays import memory as cuda
from fa3_cute.api import kernel_config
from fa3_cute.runtime import launch

pytestmark = pytest.mark.gpu

# More tiles than SMs, so that any race between tiles, stages or warpgroups has its chance.
BUSY = [
    Case(dtype, head_dim, is_causal, 8, 2, 900, 1100, batch=4)
    for dtype, head_dim in (("fp16", 64), ("bf16", 96), ("bf16", 128), ("fp16", 192), ("bf16", 256))
    for is_causal in (False, True)
]


@pytest.mark.parametrize("case", BUSY, ids=str)
def test_a_hundred_runs_agree_bit_for_bit(case, stream):
    problem = make_problem(case)
    check(problem, *run(problem, stream))
    images = [tensor.image.download(stream) for tensor in (problem.out, problem.lse)]
    for _ in range(99):
        problem.out.poison(stream)
        problem.lse.poison(stream)
        forward(params_of(problem), stream).check()
        for tensor, image in zip((problem.out, problem.lse), images, strict=True):
            assert np.array_equal(tensor.image.download(stream), image)


# ---- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["none", "zero", "handle", "object", "foreign object"])
def test_every_spelling_of_a_stream(spelling, device):
    class Foreign:
        def __cuda_stream__(self):
            return 0, int(own.handle)

    own = device.create_stream()
    stream = {"none": None, "zero": 0, "handle": int(own.handle), "object": own, "foreign object": Foreign()}[spelling]
    problem = make_problem(FAMILIES[0])
    forward(params_of(problem), stream).check()
    check(problem, *results(problem, device.default_stream if spelling in ("none", "zero") else own))


def test_the_launch_is_ordered_on_its_stream(device):
    """Q is overwritten with zeros on the stream, late; a launch on any other stream would read it before that."""
    stream = device.create_stream()
    problem = make_problem(FAMILIES[0])
    warmup(params_of(problem), stream).check()
    delay = cuda.allocate(4 << 30)
    for _ in range(8):  # some ten milliseconds of memory traffic
        cuda.fill(delay, 0, stream=stream)
    cuda.fill(problem.q.image.buffer, 0, stream=stream)
    forward(params_of(problem), stream).check()
    problem.q.array[...] = 0
    check(problem, *results(problem, stream))


@pytest.mark.parametrize("pair", [(BUSY[4], BUSY[4]), (BUSY[5], BUSY[0])], ids=["one config", "two configs"])
def test_two_threads_on_two_streams(pair, device, stream):
    """Calls from two threads at once give the bits that they give alone."""
    problems = [make_problem(case) for case in pair]
    alone = [run(problem, stream) for problem in problems]
    start = threading.Barrier(len(pair))

    def work(problem, expected):
        device.set_current()
        own = device.create_stream()
        start.wait()
        for _ in range(30):
            problem.out.poison(own)
            for _ in range(10):
                forward(params_of(problem), own).check()
            for got, wanted in zip(results(problem, own), expected, strict=True):
                assert got.tobytes() == wanted.tobytes()

    with ThreadPoolExecutor(len(pair)) as pool:
        for future in [pool.submit(work, *arguments) for arguments in zip(problems, alone, strict=True)]:
            future.result()


def test_many_launches_before_one_wait(stream):
    """Hundreds of queued launches, each with its own arguments: the argument buffer is free again at once."""
    problems = [make_problem(Case("bf16", 128, True, 4, 2, 100 + i, 200 - i)) for i in range(40)]
    for _ in range(10):
        for problem in problems:
            forward(params_of(problem), stream).check()
    for problem in problems:
        check(problem, *results(problem, stream))


# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_graph_replay(case, device):
    """Captured after warmup; replays read the tensors' contents of the time, and capture itself launches nothing."""
    stream = device.create_stream()
    problem = make_problem(case)
    params = params_of(problem)
    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    forward(params, builder).check()
    graph = builder.end_building().complete()
    assert problem.out.is_untouched(stream)
    for seed in range(2):
        problem.v.array[...] = np.random.default_rng(seed).permutation(problem.v.array, axis=1)
        problem.upload()
        graph.launch(stream)
        check(problem, *results(problem, stream))


def test_two_calls_in_one_graph(device):
    """The second call reads what the first one wrote."""
    stream = device.create_stream()
    case = Case("bf16", 128, False, 4, 4, 300, 300)
    first, second = make_problem(case), make_problem(case)
    second_params = params_of(second, q=first.out.address)
    warmup(second_params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    forward(params_of(first), builder).check()
    forward(second_params, builder).check()
    graph = builder.end_building().complete()
    graph.launch(stream)
    out, lse = results(first, stream)
    check(first, out, lse)
    second.q.array[...] = out
    check(second, *results(second, stream))


# ---- fresh processes -----------------------------------------------------------------------------------------------


def fresh_process(verb: str, cache_dir: Path) -> dict:
    """Run a verb of fresh_process.py with a kernel cache of its own; its JSON answer and the process's own seconds."""
    script = Path(__file__).parents[1] / "support" / "fresh_process.py"
    paths = [str(script.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "FA3_CUTE_CACHE_DIR": str(cache_dir), "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, script, verb], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - start}


def test_capture_of_a_cold_config_is_refused(device, tmp_path):
    answer = fresh_process("cold_capture", tmp_path)
    assert (answer["cold"], answer["warm"]) == (Status.NOT_WARMED_UP, Status.OK)
    assert answer["is_cleared"], "the refused call put work into the graph"


def test_cold_and_warm_start(device, tmp_path, timing):
    """Right results from kernels just compiled, then from the disk cache of another process; the seconds of both."""
    cold, warm = (fresh_process("launch_times", tmp_path) for _ in range(2))
    for name, answer in (("cold", cold), ("warm", warm)):
        timing(f"{name} start, first forward of a process, imports included", answer["first"])
        timing(f"{name} start, forward of a second config", answer["second"])
        timing(f"{name} start, whole process with two configs checked", answer["process"])


def test_lengths_need_no_new_kernel(stream, monkeypatch, timing):
    """After one warmup, forwards of any lengths and ratios of that config compile and load nothing."""
    problems = [
        make_problem(Case("fp16", 64, False, heads, 2, n, 2 * n, batch=b))
        for heads, n, b in ((2, 117, 1), (4, 130, 2), (8, 257, 3))
    ]
    assert len({kernel_config(params_of(problem)) for problem in problems}) == 1
    warmup(params_of(problems[0]), stream).check()
    monkeypatch.setattr(launch, "get_kernel", None)
    start = time.perf_counter()
    for problem in problems:
        forward(params_of(problem), stream).check()
    timing("forwards of three lengths of a loaded kernel", time.perf_counter() - start)
    for problem in problems:
        check(problem, *results(problem, stream))
