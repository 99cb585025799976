"""Counters and workspaces: which launches share them, what a capture does, and that they reach the kernel.

scratch.py by itself over memory that only counts; then whole calls on the fake CUDA of conftest.py.
"""

import pytest

from fa3_cute.runtime import scratch as module
from fa3_cute.runtime.cuda_driver import NotWarmedUp
from fa3_cute.runtime.scratch import Counters, Workspaces


@pytest.fixture
def memory(monkeypatch):
    """{address: bytes} of all that was allocated."""
    made = {}

    def allocate(nbytes, what):
        assert nbytes > 0
        address = 0x1000 + sum(-(-size // 256) * 256 for size in made.values())
        made[address] = nbytes
        return address

    monkeypatch.setattr(module, "allocate", allocate)
    return made


@pytest.fixture
def capturing(monkeypatch):
    """Handles of the streams that capture."""
    handles = set()
    monkeypatch.setattr(module, "is_capturing", lambda stream: stream in handles)
    return handles


# ---- Counters --------------------------------------------------------------------------------------------------------


def test_taken_counters_are_apart(memory):
    """So many int32 in a row, in memory sectors that hold nobody else's."""
    counters = Counters()
    ((base, size),) = memory.items()
    wanted = [1, 1, 2, 7, 8, 9, 16, 17, 264, 1000, 1]
    spans = [(counters.take(count), 4 * count) for count in wanted]
    assert all(at % module.SPACING == 0 and base <= at and at + nbytes <= base + size for at, nbytes in spans)
    sectors = [{*range(at // module.SPACING, (at + nbytes - 1) // module.SPACING + 1)} for at, nbytes in spans]
    assert len(set().union(*sectors)) == sum(map(len, sectors))


def test_no_counters_are_left(memory):
    """All of them can be had, and not one more; what was given out stays good."""
    counters = Counters()
    of_stream = counters.of_stream(5)
    last = counters.take((module.NUM_COUNTERS - 1) * module.INTS_PER_COUNTER)
    assert last == of_stream + module.SPACING
    for count in (1, 9):
        with pytest.raises(NotWarmedUp, match=str(module.NUM_COUNTERS)):
            counters.take(count)
    with pytest.raises(NotWarmedUp):
        counters.of_stream(6)
    assert counters.of_stream(5) == of_stream


def test_a_request_that_is_too_large_takes_nothing(memory):
    counters = Counters()
    first = counters.take()
    with pytest.raises(NotWarmedUp):
        counters.take(module.NUM_COUNTERS * module.INTS_PER_COUNTER)
    assert counters.take() == first + module.SPACING


# ---- Workspaces ------------------------------------------------------------------------------------------------------


def spans_of(workspace):
    """(address, bytes) of its two parts."""
    return {(workspace.partials, workspace.partial_bytes), (workspace.arrivals, 4 * workspace.num_arrivals)}


def test_workspaces_grow_and_do_not_shrink(memory, capturing):
    workspaces = Workspaces()
    first = workspaces.of_stream(1, 1, 1000, 8)
    assert first.is_enough_for(1000, 8) and spans_of(first) == {*memory.items()}
    assert workspaces.of_stream(1, 1, 1000, 8) is workspaces.of_stream(1, 1, 1, 1) is first
    larger = workspaces.of_stream(1, 1, 1001, 1)
    assert larger.is_enough_for(2000, 16), "twice as much: few are ever made"
    assert not spans_of(first) & spans_of(larger), "a graph may hold the old one"
    assert workspaces.of_stream(1, 1, 2000, 16) is workspaces.of_stream(1, 1, 5, 5) is larger
    most = workspaces.of_stream(1, 1, 5, 1000)
    assert most.is_enough_for(4000, 1000) and workspaces.of_stream(1, 1, 4000, 1000) is most
    assert len(memory) == 6


def test_arrivals_alone(memory, capturing):
    """What a launch needs whose partial results lie in the caller's workspace."""
    workspaces = Workspaces()
    mine = workspaces.of_stream(1, 1, 0, 8)
    assert mine.num_arrivals >= 8 and workspaces.of_stream(1, 1, 0, 8) is mine


def test_streams_have_workspaces_of_their_own(memory, capturing):
    workspaces = Workspaces()
    found = [workspaces.of_stream(stream, stream, 1000, 8) for stream in range(5)]
    assert len(set().union(*map(spans_of, found))) == 10
    assert [workspaces.of_stream(stream, stream, 1000, 8) for stream in range(5)] == found


def test_a_capture_allocates_nothing(memory, capturing):
    workspaces = Workspaces()
    mine = workspaces.of_stream(1, 1, 1000, 8)
    capturing |= {1, 2}
    assert workspaces.of_stream(1, 1, 1000, 8) is mine
    for stream, nbytes in ((1, 1001), (2, 1)):
        with pytest.raises(NotWarmedUp, match=rf"{nbytes} bytes: call warmup\(\)"):
            workspaces.of_stream(stream, stream, nbytes, 8)
    assert len(memory) == 2
    assert workspaces.of_stream(1, 1, 1000, 8) is mine, "the refusal leaves it"


def test_the_spare_workspace(memory, capturing):
    """One capture may take it, if it is large enough; from then on it is the stream's. Preparing makes the next."""
    workspaces = Workspaces()
    workspaces.prepare(0, 0, 1000, 8)
    mine, spare = workspaces.of_stream(0, 0, 1000, 8), workspaces.spare
    assert not spans_of(mine) & spans_of(spare)
    workspaces.prepare(0, 0, 500, 4)
    assert workspaces.spare is spare and len(memory) == 4, "is enough"
    capturing |= {1, 2}
    with pytest.raises(NotWarmedUp):
        workspaces.of_stream(1, 1, 1001, 8)
    assert workspaces.of_stream(1, 1, 1000, 8) is workspaces.of_stream(1, 1, 10, 8) is spare
    with pytest.raises(NotWarmedUp):
        workspaces.of_stream(2, 2, 1, 1)
    workspaces.prepare(0, 0, 1000, 8)
    assert workspaces.spare not in (None, spare) and workspaces.of_stream(0, 0, 1000, 8) is mine
    assert workspaces.of_stream(2, 2, 1000, 8) not in (spare, mine)


def test_the_spare_workspace_grows(memory, capturing):
    workspaces = Workspaces()
    workspaces.prepare(0, 0, 1000, 8)
    workspaces.prepare(0, 0, 5000, 8)
    assert workspaces.spare.is_enough_for(5000, 8)
    capturing.add(1)
    assert not spans_of(workspaces.of_stream(1, 1, 5000, 8)) & spans_of(workspaces.of_stream(0, 0, 5000, 8))


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
threads = []
def on_thread():
    threads.append(after(2))       # the per-thread default stream: one handle, a stream for each thread
for _ in range(2):
    t = threading.Thread(target=on_thread); t.start(); t.join()
tell(eager=eager, captured=captured, again=again, threads=threads)
""")
    first, repeated, second, elsewhere, last = told["eager"]
    assert first == repeated == last == told["again"] and len({first, second, elsewhere}) == 3
    assert elsewhere - first >= 1 << 31  # the other device's memory
    assert len({first, second, *told["captured"], *told["threads"]}) == 7


SPLIT = """
from fa3_cute import forward, warmup
places = kernel_parameters(DECODE_CFG)
def status(stream=STREAM[0], **changes):
    return int(forward(decode_params(**dict(num_splits=48) | changes), stream))
def memory(stream=STREAM[0], **changes):        # (O, LSE, arrivals) in the order of their addresses, or what is wrong
    return status(stream, **changes) or scratch(places)
def last_context(): return next(reversed(module._memory))
def capturing(on): number("capture_state", int(on))
def warm(stream=None, **changes): warmup(decode_params(**dict(num_splits=48) | changes), stream).check()
"""
GIVEN = "workspace=0x7F3300000010, workspace_bytes=1 << 20"


def test_each_stream_and_thread_has_its_workspace(run):
    """Threads have default streams of their own behind one handle; on any other stream they meet."""
    told = run(
        SPLIT
        + """
found = {f"{i}": memory(STREAM[0] + 8 * i) for i in range(3)}
found |= {"device 1": memory(STREAM[1]), "legacy": memory(0), "per thread": memory(2)}
threads, shared = [], []
def work():
    threads.append(memory(2)); threads.append(memory(2, q=0x7F5500000000)); shared.append(memory(STREAM[0]))
for _ in range(2):
    t = threading.Thread(target=work); t.start(); t.join()
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


def test_captures_need_a_workspace(run):
    """The stream's own, from a call or a warm-up; to grow it within the capture is refused, and nothing is launched."""
    told = run(
        SPLIT
        + """
fresh, warmed, used = STREAM[0] + 8, STREAM[0] + 16, STREAM[0] + 24
eager = memory(used)
warm(warmed)
module._memory[last_context()].workspaces.spare = None
made = len(allocations())
capturing(True)
launched = last.count
refused = [status(fresh), status(used, batch_size=16), status(warmed, num_splits=256), last.count - launched]
captured = [memory(used), memory(used), memory(used, q=0x7F5500000000), memory(warmed)]
unneeded = status(fresh, num_splits=16)
grown = len(allocations()) - made
capturing(False)
tell(eager=eager, refused=refused, captured=captured, unneeded=unneeded, grown=grown, after=memory(used),
     fresh=status(fresh))
"""
    )
    eager, captured = told["eager"], told["captured"]
    assert told["refused"] == [-103, -103, -103, 0]
    # A captured launch's arrival counts are among the counters, which were made first: they lie below its (O, LSE).
    assert all(partials == eager[:2] for _, *partials in captured[:3]) and captured[3][1] != eager[0]
    assert len({eager[2], *(arrivals for arrivals, *_ in captured)}) == 5, "arrival counts of its own"
    assert told["unneeded"] == told["grown"] == told["fresh"] == 0 and told["after"] == eager


def test_the_first_capture_takes_the_spare_workspace(run):
    """That of a framework which makes a stream for the capture; the next such stream needs another warm-up."""
    told = run(
        SPLIT
        + """
fresh, second = STREAM[0] + 8, STREAM[0] + 16
warm()
made = len(allocations())
default = memory(0)
capturing(True)
first = [memory(fresh), memory(fresh)]
refused = [status(second), status(second)]
capturing(False)
warm()
capturing(True)
third = memory(second)
capturing(False)
tell(default=default, first=first, refused=refused, third=third, eager=memory(fresh), made=len(allocations()) - made)
"""
    )
    first, second = told["first"]
    assert first[1:] == second[1:] and first[0] != second[0]
    assert told["refused"] == [-103, -103]
    partials = {told["default"][0], first[1], told["third"][1]}
    assert len(partials) == 3 and told["eager"][0] == first[1]
    assert told["made"] == 2, "the second spare: partial results and arrival counts"


@pytest.mark.parametrize("stream", ["STREAM[0] + 8", "2"], ids=["own", "per thread"])
def test_a_warm_stream_captures(run, stream):
    """Nothing ran on it before, and the first launch of the process may be a captured one."""
    told = run(
        SPLIT
        + f"""
warm({stream}, batch_size=4)
made = len(allocations())
capturing(True)
captured = [memory({stream}, batch_size=batch) for batch in (1, 2, 4)]
capturing(False)
tell(captured=captured, made=len(allocations()) - made, count=last.count)
"""
    )
    assert told["made"] == 0 and told["count"] == 3
    assert len({addresses[1] for addresses in told["captured"]}) == 1
    assert len({addresses[0] for addresses in told["captured"]}) == 3


def test_the_callers_workspace_needs_no_warm_stream(run):
    """In a capture only arrival counts are the library's, and these no two captured launches share."""
    told = run(
        SPLIT
        + f"""
warm({GIVEN})
capturing(True)
steps = []
for changes in (dict(), dict(q=0x7F5500000000), dict(batch_size=3)):
    arrivals = memory(STREAM[0] + 8, {GIVEN}, **changes)
    steps.append([arrivals, reached(places, mine=0x7F3300000010)["mine"]])
without = status(STREAM[0] + 8)
capturing(False)
eager = memory(STREAM[0] + 8, {GIVEN})
again = memory(STREAM[0] + 8, {GIVEN}, q=0x7F5500000000)
capturing(True)
late = memory(STREAM[0] + 8, {GIVEN}, q=0x7F5500000010)
tell(steps=steps, without=without, eager=eager, again=again, late=late)
"""
    )
    assert all(there and len(arrivals) == 1 for arrivals, there in told["steps"])
    everyone = [*(arrivals[0] for arrivals, _ in told["steps"]), told["eager"][0], told["late"][0]]
    assert len(set(everyone)) == 5 and told["again"] == told["eager"]
    assert told["without"] == -103


def test_many_captured_launches_run_out_of_counters(run):
    """Then a capture says so, and what does not go into a graph runs on."""
    told = run(
        SPLIT
        + """
warm(STREAM[0], batch_size=64, num_splits=32)
memory()
capturing(True)
steps = [status(batch_size=64, num_splits=32) for _ in range(2)]
module._memory[last_context()].counters.num_taken = (1 << 16) - 300
steps += [status(batch_size=64, num_splits=32) for _ in range(2)]
capturing(False)
tell(steps=steps, eager=status(batch_size=64, num_splits=32))
"""
    )
    assert told == {"steps": [0, 0, 0, -103], "eager": 0}
