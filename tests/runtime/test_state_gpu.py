"""What launches keep from call to call, on the GPU: for contexts, threads, streams and graphs, and what comes back."""

import gc
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import DECODE, FAMILIES, Case
from check import check, make_problem, params_of, results, run
from cuda.bindings import driver

from fa3_cute import attention, forward, warmup, workspace_size
from fa3_cute.arrays import dlpack
from fa3_cute.arrays import memory as cuda
from fa3_cute.runtime import scratch
from fa3_cute.runtime.cuda_driver import checked, stream_id

pytestmark = pytest.mark.gpu

SUPPORT = Path(__file__).parents[1] / "support"
SPLIT = replace(DECODE[0], seqlen_k=900)
SPLITS = 128  # merge through scratch memory


@contextmanager
def capture_of(stream, mode="thread_local"):
    """Yields the builder of a graph, whose capture ends whatever happens: a stream that is left capturing would break
    the tests behind it.

    Garbage of other tests would free memory whenever it is found, which a capture of this thread may not see.
    "thread_local" forbids this thread as much as "global" does, which calls of other tests' threads would invalidate.
    """
    gc.collect()
    gc.disable()
    builder = stream.create_graph_builder().begin_building(mode)
    try:
        yield builder
    except BaseException:
        driver.cuStreamEndCapture(stream.handle)  # an error of its own, which nobody reads, where it has ended
        raise
    finally:
        gc.enable()


def captured(stream, *calls):
    """`forward` of these params as a graph."""
    with capture_of(stream) as builder:
        for params in calls:
            forward(params, builder).check()
        return builder.end_building().complete()


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["reset", "destroyed"])
def test_calls_after_their_context_has_ended(way, device):
    """In a process of its own: right results in the next context, which mostly has the handle of the last."""
    paths = [str(SUPPORT.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(SUPPORT / "lost_contexts.py"), way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["differing"] and max(answer["distances"]) < 0.01


# ---- threads and streams ---------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Bytes of each piece of device memory that the library allocates."""
    found = []
    allocate = scratch.allocate
    monkeypatch.setattr(scratch, "allocate", lambda nbytes, what: found.append(nbytes) or allocate(nbytes, what))
    return found


def test_ended_threads_hand_their_workspaces_on(device, made):
    """30 threads, one after the other, each with its own default stream: not 30 workspaces."""
    problem = make_problem(SPLIT)
    params = params_of(problem, num_splits=SPLITS)
    statuses = []

    def work():
        device.set_current()
        statuses.append(forward(params, scratch.PER_THREAD_STREAM))
        checked(driver.cuStreamSynchronize(scratch.PER_THREAD_STREAM), "waiting for the thread's stream")

    for _ in range(30):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert statuses == [0] * 30
    assert len(made) <= 8, "two pieces of memory each, for a few threads at most"
    check(problem, *results(problem, device.default_stream))


def test_destroyed_streams_hand_their_workspaces_on(device, made, monkeypatch):
    """100 streams, one after the other: not 100 workspaces, for the driver gives their handles out again."""
    problem = make_problem(SPLIT)
    monkeypatch.setattr(scratch, "RESTING_BYTES", 10 * workspace_size(params_of(problem, num_splits=SPLITS)))
    params = params_of(problem, num_splits=SPLITS)
    for _ in range(100):
        stream = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "creating a stream")
        forward(params, int(stream)).check()
        checked(driver.cuStreamSynchronize(stream), "waiting")
        checked(driver.cuStreamDestroy(stream), "destroying")
    assert len(made) <= 50, "two pieces of memory each"
    check(problem, *results(problem, device.default_stream))


def test_a_destroyed_stream_shares_nothing_with_the_next_one_of_its_handle(device):
    """The driver gives the handle out again at once, while the work of the destroyed stream is still pending."""
    size, memory = 4 << 30, scratch.contexts.memory()
    filled = cuda.allocate(size)

    def new_stream():
        return checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "creating a stream")

    def counter_of(stream):
        return memory.tile_counter(int(stream), stream_id(int(stream)))

    num_pending = 0
    for _ in range(4):
        stream, event = new_stream(), checked(driver.cuEventCreate(0), "creating an event")
        for _ in range(64):  # some hundred milliseconds
            checked(driver.cuMemsetD8Async(cuda.address(filled), 0, size, stream), "filling")
        checked(driver.cuEventRecord(event, stream), "recording")
        handle, counter = int(stream), counter_of(stream)
        checked(driver.cuStreamDestroy(stream), "destroying")
        others = [new_stream() for _ in range(16)]
        assert counter not in map(counter_of, others)
        is_pending = driver.cuEventQuery(event)[0] == driver.CUresult.CUDA_ERROR_NOT_READY
        num_pending += is_pending and handle in map(int, others)
        checked(driver.cuEventSynchronize(event), "waiting")
        for other in others:
            checked(driver.cuStreamDestroy(other), "destroying")
    assert num_pending, "no handle came back while work was pending: this shows nothing"


# ---- captures --------------------------------------------------------------------------------------------------------


def test_captures_on_new_streams_after_eager_calls(device):
    """PyTorch's recipe: some calls on a side stream, then a capture on a stream of its own; and another one."""
    problem = make_problem(SPLIT)
    params = params_of(problem, num_splits=SPLITS)
    side, *streams = (device.create_stream() for _ in range(4))
    for _ in range(3):
        forward(params, side).check()
    side.sync()
    graphs = [captured(stream, params) for stream in streams]
    for graph, stream in zip(graphs, streams, strict=True):
        problem.poison_outputs(stream)
        graph.launch(stream)
        check(problem, *results(problem, stream))
    forward(params, streams[0]).check()
    check(problem, *results(problem, streams[0]))


def test_calls_beside_the_capture_of_another_thread(device, stream):
    """First calls on a stream, which allocate, and attention() without out leave that capture alone."""
    case = Case("fp16", 128, True, 4, 2, 300, 400, has_lse=False)
    plain, split, recorded = make_problem(case), make_problem(SPLIT), make_problem(case)
    expected, _ = run(plain, stream)
    own, capturing = device.create_stream(), device.create_stream()
    arrays = []
    for tensor in (plain.q, plain.k, plain.v):
        array = dlpack.new_array("an input", tensor.array.shape, "float16", own, device.device_id)
        cuda.upload(tensor.array, array.buffer, stream=own)
        arrays.append(array)
    warmup(params_of(split, num_splits=1), own).check()

    def work():
        forward(params_of(split, num_splits=SPLITS), own).check()
        return attention(*arrays, causal=True, stream=own)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(device.set_current).result()
        with capture_of(capturing, "global") as builder:  # the mode that other threads can invalidate
            forward(params_of(recorded), builder).check()
            out = pool.submit(work).result()
            graph = builder.end_building().complete()
    graph.launch(capturing)
    check(recorded, *results(recorded, capturing))
    check(split, *results(split, own))
    assert cuda.download(out.buffer, out.shape, np.float16, stream=own).tobytes() == expected.tobytes()


# ---- counters --------------------------------------------------------------------------------------------------------


def test_counters_of_destroyed_graphs_come_back(device):
    """More captured launches than there are counters, some at a time."""
    stream, launches = device.create_stream(), 500
    problem = make_problem(FAMILIES[0])
    params = params_of(problem)
    warmup(params, stream).check()
    for _ in range(scratch.NUM_COUNTERS // launches + 20):
        graph = captured(stream, *[params] * launches)
        graph.close()
    graph = captured(stream, params)
    graph.launch(stream)
    check(problem, *results(problem, stream))


@pytest.mark.parametrize(
    "case, choices", [(FAMILIES[0], {}), (SPLIT, {"num_splits": SPLITS})], ids=["prefill", "split decode"]
)
def test_the_callers_counters(case, choices, device):
    """As many as the field asks for; eager, captured and replayed, they are 0 afterwards, and what lies behind is as it
    was."""
    stream, other = device.create_stream(), device.create_stream()
    problem = make_problem(case)
    params = params_of(problem, **choices)
    nbytes = max(4, -(-workspace_size(params) // 8))
    buffer = cuda.allocate(nbytes + 256)
    cuda.fill(buffer, 0xFF)
    cuda.fill(cuda.window(buffer, 0, nbytes), 0)
    params.tile_counter = cuda.address(buffer)
    forward(params, stream).check()
    check(problem, *results(problem, stream))
    graph = captured(stream, params)
    for _ in range(3):
        problem.poison_outputs(stream)
        forward(params, stream).check()
        problem.poison_outputs(stream)
        graph.launch(stream)
    check(problem, *results(problem, stream))
    graph.launch(other)
    other.sync()
    whole = cuda.download(buffer, (buffer.size,), np.uint8, stream=other)
    assert not whole[:nbytes].any() and (whole[nbytes:] == 0xFF).all()
