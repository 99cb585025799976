"""What is kept for contexts, threads and kernels, and what comes back when they are gone. On the fake CUDA."""

import pytest

DECODE = "from fake_decode import *\n"


@pytest.mark.parametrize("changes", ["", "batch_size=3"], ids=["the same call", "another shape"])
def test_a_context_that_was_reset(run, changes):
    """It has its handle again and nothing else: its memory is made anew and kernels are loaded anew, once."""
    told = run(
        DECODE
        + f"""
from fa3_cute.runtime.scratch import contexts
before, other = memory(), memory(STREAM[1])
libraries, loaded, made = number("num_libraries"), numbers("loaded_on"), len(allocations())
numbers64("context_ids")[0] = 2001                          # device 0 is reset
after = memory({changes})
known = sorted(contexts.memories)
again, repeated = memory({changes}), memory({changes})
threads = []
t = threading.Thread(target=lambda: threads.append(memory({changes}))); t.start(); t.join()
tell(before=before, after=after, again=[again, repeated, *threads], known=known, made=len(allocations()) - made,
     libraries=number("num_libraries") - libraries, other=[other, memory(STREAM[1])],
     loaded=[now - then for now, then in zip(numbers("loaded_on"), loaded)])
"""
    )
    assert not set(told["before"]) & set(told["after"]) and told["again"] == [told["after"]] * 3
    assert told["known"] == [1002, 2001], "the memory of the old one is forgotten"
    assert told["made"] == 3 and told["libraries"] == 1
    assert told["other"][0] == told["other"][1] and told["loaded"][0] == told["loaded"][1] > 0 == told["loaded"][2]


def test_a_reset_context_captures_after_a_warm_up(run):
    told = run(
        DECODE
        + """
memory()
numbers64("context_ids")[0] = 2001
capturing(STREAM[0])
cold = status()
capturing(None)
warm(STREAM[0])
capturing(STREAM[0])
tell(cold=cold, warm=status())
"""
    )
    assert told == {"cold": -103, "warm": 0}


def test_other_kernels_are_loaded_anew_too(run):
    """Each once, when it is called, also those that were not the first to see the reset."""
    told = run("""
from fa3_cute import forward
calls = [prefill_params(), prefill_params(is_causal=False), decode_params()]
def libraries():
    for call in calls * 2: forward(call, STREAM[0]).check()
    return number("num_libraries")
first = libraries()
numbers64("context_ids")[0] = 2001
tell(first=first, second=libraries())
""")
    assert told == {"first": 3, "second": 6}


# ---- threads ---------------------------------------------------------------------------------------------------------

THREADS = (
    DECODE
    + """
from fa3_cute.runtime.scratch import contexts
def on_threads(count, **changes):                           # one after the other
    found = []
    for _ in range(count):
        t = threading.Thread(target=lambda: found.append(memory(2, **changes))); t.start(); t.join()
    return found
"""
)


def test_ended_threads_leave_their_memory_to_the_next(run):
    """What was made for one thread is enough for all, if none runs beside another."""
    told = run(
        THREADS
        + """
found = on_threads(150)
made = len(allocations())
prefill = kernel_parameters()
counters = set()
def on_thread(): forward(prefill_params(), 2).check(); counters.add(scratch(prefill)[0])
for _ in range(150):
    t = threading.Thread(target=on_thread); t.start(); t.join()
tell(found=found, made=made, counters=len(counters))
"""
    )
    assert len(told["found"]) == 150 and all(found == told["found"][0] for found in told["found"])
    assert told["made"] == 3 and told["counters"] <= 2


def test_ended_threads_keep_what_is_in_use(run):
    """As long as their work is not done, and for good what a graph holds."""
    told = run(
        THREADS
        + """
number("event_result", 600)                                 # not ready
running = on_threads(3)
number("event_result", 0)
done = on_threads(1)
number("capture_state", 1)
captured = on_threads(2)
number("capture_state", 0)
tell(running=running, done=done, captured=captured, eager=on_threads(1))
"""
    )
    assert len({found[0] for found in told["running"]}) == 3
    assert told["done"][0] in told["running"]
    held = {found[1] for found in told["captured"]}
    assert len(held) == 2 and told["eager"][0][0] not in held


def test_threads_that_need_more_each_time(run):
    """The memory of all is at most a few times that of the largest."""
    told = run(
        THREADS
        + """
sizes = []
for batch in range(1, 40): on_threads(1, batch_size=batch)
tell(sizes=[size for _, size, _ in allocations()[1:]])
"""
    )
    assert sum(told["sizes"]) <= 4 * max(told["sizes"])


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_a_compile_stops_nobody_else(run):
    """While a kernel compiles, loaded ones take new shapes and others are loaded."""
    told = run("""
from fa3_cute import forward
slow, compiles, release = forward_config("fp16", 64, "full", False, False), threading.Event(), threading.Event()
def get_kernel(cfg, real=module.get_kernel):
    if cfg == slow:
        compiles.set(); release.wait()
    return real(cfg)
module.get_kernel = get_kernel
forward(prefill_params(), STREAM[0]).check()
worker = threading.Thread(target=lambda: module.ensure_loaded(slow)); worker.start()
compiles.wait()
timer = threading.Timer(60, release.set); timer.start()     # a test that fails ends, too
forward(prefill_params(seqlen_q=77), STREAM[0]).check()
forward(prefill_params(), STREAM[1]).check()
forward(prefill_params(is_causal=False), STREAM[0]).check()
was_waiting = not release.is_set()
timer.cancel(); release.set(); worker.join()
tell(was_waiting=was_waiting, count=last.count)
""")
    assert told == {"was_waiting": True, "count": 4}
