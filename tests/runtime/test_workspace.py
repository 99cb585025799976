"""Counters and workspaces: which launches share them, and that they reach the kernel.

scratch.py by itself over memory that only counts; then whole calls on the fake CUDA of conftest.py. What captures get
is in test_captures.py, what contexts and threads leave behind in test_contexts.py.
"""

import random
from contextlib import nullcontext

import pytest

from fa3_cute.runtime import scratch as module
from fa3_cute.runtime.cuda_driver import NotWarmedUp
from fa3_cute.runtime.scratch import Counters, Memory


@pytest.fixture
def allocated(monkeypatch):
    """{address: bytes} of all that was allocated; there is no CUDA to ask."""
    made = {}

    def allocate(nbytes, what):
        assert nbytes > 0
        address = 0x1000 + sum(-(-size // 256) * 256 for size in made.values())
        made[address] = nbytes
        return address

    monkeypatch.setattr(module, "allocate", allocate)
    monkeypatch.setattr(module, "allocate_zeros", allocate)
    monkeypatch.setattr(module, "capture_rules_relaxed", nullcontext)
    return made


# ---- Counters --------------------------------------------------------------------------------------------------------


def test_taken_counters_are_apart(allocated):
    """So many int32 in a row, in memory sectors that hold nobody else's."""
    counters = Counters()
    ((base, size),) = allocated.items()
    wanted = [1, 1, 2, 7, 8, 9, 16, 17, 264, 1000, 1]
    spans = [(counters.take(count), 4 * count) for count in wanted]
    assert all(at % module.SPACING == 0 and base <= at and at + nbytes <= base + size for at, nbytes in spans)
    sectors = [{*range(at // module.SPACING, (at + nbytes - 1) // module.SPACING + 1)} for at, nbytes in spans]
    assert len(set().union(*sectors)) == sum(map(len, sectors))


def test_no_counters_are_left(allocated):
    """All of them can be had, and not one more; what is too large takes nothing."""
    counters = Counters()
    first = counters.take()
    assert counters.take(module.NUM_COUNTERS * module.INTS_PER_COUNTER) == 0
    assert counters.take((module.NUM_COUNTERS - 1) * module.INTS_PER_COUNTER) == first + module.SPACING
    assert counters.take(1) == counters.take(9) == 0


@pytest.mark.parametrize("seed", range(5))
def test_counters_come_back(allocated, seed):
    """In any order, between those that are still taken; in the end the whole is one piece again."""
    counters, choose, taken = Counters(), random.Random(seed), {}
    for _ in range(400):
        if taken and choose.random() < 0.5:
            address = choose.choice([*taken])
            counters.give_back(address, taken.pop(address))
        else:
            count = choose.choice([1, 8, 9, 100, 5000])
            taken[counters.take(count)] = count
        spans = sorted((at, at + 4 * count) for at, count in taken.items())
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for address, count in taken.items():
        counters.give_back(address, count)
    assert counters.free == [(0, module.NUM_COUNTERS)]


def test_exhaustion_says_what_to_do(allocated):
    memory = Memory()
    mine = memory.tile_counter(5)
    memory.counters.free.clear()
    with pytest.raises(NotWarmedUp) as raised:
        memory.tile_counter(6)
    assert str(module.NUM_COUNTERS) in str(raised.value) and "give tile_counter" in str(raised.value)
    assert "warmup" not in str(raised.value)
    assert memory.tile_counter(5) == mine, "what was given out stays good"


def test_captures_leave_counters_to_streams(allocated):
    counters = Counters()
    while counters.take(8000, module.COUNTERS_OF_STREAMS):
        pass
    assert module.COUNTERS_OF_STREAMS <= sum(count for _, count in counters.free) < module.COUNTERS_OF_STREAMS + 1000
    assert counters.take(1)


# ---- workspaces ------------------------------------------------------------------------------------------------------


def spans_of(workspace):
    """(address, bytes) of its two parts."""
    return {(workspace.partials, workspace.partial_bytes), (workspace.arrivals, 4 * workspace.num_arrivals)}


def test_workspaces_grow_and_do_not_shrink(allocated):
    memory = Memory()
    counters = {*allocated.items()}
    first = memory.workspace(1, 1000, 8)
    assert spans_of(first) == {*allocated.items()} - counters == {(first.partials, 1000), (first.arrivals, 32)}
    assert memory.workspace(1, 1000, 8) is memory.workspace(1, 1, 1) is first
    larger = memory.workspace(1, 1001, 1)
    assert larger.partial_bytes >= 2000, "twice as much: few are ever made"
    assert not spans_of(first) & spans_of(larger), "a graph may hold the old one"
    assert memory.workspace(1, 2000, 1) is memory.workspace(1, 5, 0) is larger
    assert memory.workspace(1, 5, 1000) is larger and larger.num_arrivals >= 1000 and larger.partial_bytes >= 2000
    assert len(allocated) == 6


def test_arrivals_alone(allocated):
    """What a launch needs whose partial results lie in the caller's workspace."""
    memory = Memory()
    made = len(allocated)
    mine = memory.workspace(1, 0, 8)
    assert mine.num_arrivals >= 8 and memory.workspace(1, 0, 8) is mine and len(allocated) == made + 1


def test_partial_results_alone(allocated):
    """What a captured launch needs, whose arrival counts are among the counters."""
    memory = Memory()
    made = len(allocated)
    mine = memory.workspace(1, 1000, 0)
    assert mine.partial_bytes >= 1000 and len(allocated) == made + 1
    assert memory.workspace(1, 1000, 8) is mine and mine.num_arrivals >= 8


def test_streams_have_workspaces_of_their_own(allocated):
    memory = Memory()
    found = [memory.workspace(stream, 1000, 8) for stream in range(2, 7)]
    assert len(set().union(*map(spans_of, found))) == 10
    assert [memory.workspace(stream, 1000, 8) for stream in range(2, 7)] == found


def test_a_stream_that_is_new_has_nothing_of_the_one_whose_handle_it_has(allocated):
    """CUDA gives the handle out again while the device still does the old stream's work."""
    memory = Memory()
    counter, mine = memory.tile_counter(5, identity=70), memory.workspace(5, 1000, 8, identity=70)
    assert (memory.tile_counter(5, 70), memory.workspace(5, 1000, 8, 70)) == (counter, mine)
    assert memory.workspace(5, 10, 0) is mine, "in a capture the id is not asked for"
    other, its = memory.tile_counter(5, 71), memory.workspace(5, 1000, 8, 71)
    assert other != counter and not spans_of(its) & spans_of(mine)
    assert memory.tile_counter(5, 72) not in (counter, other)


def test_what_destroyed_streams_held_comes_back_in_the_end(allocated, monkeypatch):
    monkeypatch.setattr(module, "RESTING_BYTES", 5000)
    memory = Memory()
    made = len(allocated)
    found = [memory.workspace(5, 1000, 8, identity) for identity in range(1, 101)]
    assert all(found[i] is not found[j] for i in range(96) for j in range(i + 1, i + 5)), "the newest rest"
    assert len(allocated) - made < 20
    monkeypatch.setattr(module, "RESTING_STREAMS", 10)
    counters = [memory.tile_counter(6, identity) for identity in range(1, 101)]
    assert len(set(counters)) < 20 and all(len(set(counters[i : i + 10])) == 10 for i in range(90))


def test_a_graphs_workspace_stays_when_the_stream_is_destroyed(allocated, monkeypatch):
    monkeypatch.setattr(module, "RESTING_BYTES", 0)
    memory = Memory()
    mine = memory.workspace(5, 1000, 8, identity=1)
    mine.is_captured = True
    assert all(memory.workspace(5, 1000, 8, identity) is not mine for identity in range(2, 20))


def test_a_spare_workspace_is_used_before_another_is_made(allocated):
    """A smaller need takes it too; where it is too small, the next one is twice as large, so that few are left."""
    memory = Memory()
    memory.spare = [memory.workspace(1, 1000, 8)]
    memory.of_streams.clear()
    spare, made = memory.spare[0], len(allocated)
    assert memory.workspace(3, 500, 8) is spare and not memory.spare and len(allocated) == made
    memory.spare = [spare]
    larger = memory.workspace(4, 1001, 8)
    assert larger.partial_bytes >= 2000 and memory.spare == [spare]


# ---- whole calls -----------------------------------------------------------------------------------------------------


def test_tile_counters(run):
    """One per stream, of the stream's device; a captured launch gets one of its own, repeated or not."""
    told = run("""
from fa3_cute import DataType, FlashAttentionParams, forward
places = kernel_parameters()
call = FlashAttentionParams(**POINTERS | SIZES | dict(is_causal=True, dtype=DataType.BF16))
def counter():
    found = scratch(places)
    return found[0] if len(found) == 1 else found
def after(stream):
    forward(call, stream).check()
    return counter()
eager = [after(stream) for stream in (STREAM[0], STREAM[0], STREAM[0] + 1, STREAM[1], STREAM[0])]
number("capture_state", 1)
captured = [after(STREAM[0]) for _ in range(3)]
number("capture_state", 0)
again = after(STREAM[0])
threads, lock, both = [], threading.Lock(), threading.Barrier(2)
def on_thread():
    with lock: threads.append(after(2))     # the per-thread default stream: one handle, a stream for each thread
    both.wait()
workers = [threading.Thread(target=on_thread) for _ in range(2)]
[t.start() for t in workers]; [t.join() for t in workers]
tell(eager=eager, captured=captured, again=again, threads=threads)
""")
    first, repeated, second, elsewhere, last = told["eager"]
    assert first == repeated == last == told["again"] and len({first, second, elsewhere}) == 3
    assert elsewhere - first >= 1 << 31  # the other device's memory
    assert len({first, second, *told["captured"], *told["threads"]}) == 7


SPLIT = """
from fa3_cute import forward
places = kernel_parameters(DECODE_CFG)
def status(stream=STREAM[0], **changes):
    return int(forward(decode_params(**dict(num_splits=48) | changes), stream))
def memory(stream=STREAM[0], **changes):        # (O, LSE, arrivals) in the order of their addresses, or what is wrong
    return status(stream, **changes) or scratch(places)
"""


def test_each_stream_and_thread_has_its_workspace(run):
    """Threads have default streams of their own behind one handle; on any other stream they meet."""
    told = run(
        SPLIT
        + """
found = {f"{i}": memory(STREAM[0] + 8 * i) for i in range(3)}
found |= {"device 1": memory(STREAM[1]), "legacy": memory(0), "per thread": memory(2)}
threads, shared, lock, both = [], [], threading.Lock(), threading.Barrier(2)
def work():
    with lock:
        threads.append(memory(2)); threads.append(memory(2, q=0x7F5500000000)); shared.append(memory(STREAM[0]))
    both.wait()
workers = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in workers]; [t.join() for t in workers]
smaller = memory(num_splits=32)
larger = memory(batch_size=16)
tell(found=found, threads=threads, shared=shared, again=[memory(), memory(2)], smaller=smaller, larger=larger,
     freed=number("num_freed"))
"""
    )
    found, threads = told["found"], told["threads"]
    assert threads[0] == threads[1] and threads[2] == threads[3]
    apart = [*found.values(), threads[0], threads[2]]
    for part in (0, 2):
        assert len({addresses[part] for addresses in apart}) == len(apart)
    assert told["shared"] == [found["0"]] * 2
    assert [told["smaller"][part] for part in (0, 2)] == [found["0"][part] for part in (0, 2)]
    assert told["larger"][0] != found["0"][0] and told["freed"] == 0
    assert told["again"][0][0] == told["larger"][0] and told["again"][1] == found["per thread"]
