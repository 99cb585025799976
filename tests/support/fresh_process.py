"""What only a process that has loaded no kernel can show. test_streams_gpu.py runs it: VERB in, JSON out."""

import json
import sys
from time import perf_counter

from cases import Case
from check import check, make_problem, params_of, results

from fa3_cute.arrays import memory as cuda
from fa3_cute import forward, warmup

FIRST = Case("bf16", 128, True, 4, 2, 300, 400)
SECOND = Case("fp16", 64, False, 4, 2, 300, 400)


def launch_times() -> dict[str, float]:
    """Seconds from the call of `forward` to its result, for the process's first and second config; both checked."""
    stream = cuda.open_device().create_stream()
    seconds = {}
    for name, case in (("first", FIRST), ("second", SECOND)):
        problem = make_problem(case)
        params = params_of(problem)
        start = perf_counter()
        status = forward(params, stream)
        stream.sync()
        seconds[name] = perf_counter() - start
        status.check()
        check(problem, *results(problem, stream))
    return seconds


def cold_capture() -> dict[str, object]:
    """Capture a config that is not loaded, see the capture survive the refusal, then warm up and capture again.

    The first graph clears the output before the refused call: if the call had enqueued anything, the clearing would
    not be what a replay leaves behind.
    """
    stream = cuda.open_device().create_stream()
    problem = make_problem(FIRST)
    params = params_of(problem)
    builder = stream.create_graph_builder().begin_building()
    cuda.fill(problem.out.image.buffer, 0, stream=builder)
    cold_status = forward(params, builder)
    graph = builder.end_building().complete()
    graph.launch(stream)
    is_cleared = not problem.out.image.download(stream).any()

    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    warm_status = forward(params, builder)
    graph = builder.end_building().complete()
    problem.upload()
    graph.launch(stream)
    check(problem, *results(problem, stream))
    return {"cold": int(cold_status), "warm": int(warm_status), "is_cleared": is_cleared}


if __name__ == "__main__":
    print(json.dumps({"launch_times": launch_times, "cold_capture": cold_capture}[sys.argv[1]]()))
