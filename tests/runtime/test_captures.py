"""What launches get that go into a CUDA graph, and that nothing ends a capture. On the fake CUDA of conftest.py."""

import pytest

DECODE = "from fake_decode import *\n"
GIVEN = "workspace=0x7F3300000010, workspace_bytes=1 << 20"


def test_after_any_eager_call_a_capture_on_a_new_stream_works(run):
    """PyTorch's recipe: some calls on a side stream, then a capture on a stream of its own; and the next one, too."""
    told = run(
        DECODE
        + """
eager = [memory(STREAM[0] + 8) for _ in range(3)]
captured, cleared = [], []
for stream in (STREAM[0] + 16, STREAM[0] + 24, STREAM[0] + 32):
    capturing(stream)
    made = len(allocations())
    captured.append([memory(stream), memory(stream), memory(stream, batch_size=16)])
    cleared += [row[2] for row in allocations()[made:]]
    capturing(None)
tell(eager=eager, captured=captured, cleared=cleared, broken=number("num_broken"), after=memory(STREAM[0] + 16))
"""
    )
    assert told["broken"] == 0
    assert told["cleared"] == [0] * 6, "a capture allocates and does no more"
    # A captured launch's arrival counts are among the counters, which were made first: they lie below its (O, LSE).
    partials = {told["eager"][0][0], *(first[1] for first, _, _ in told["captured"])}
    assert len(partials) == 4
    assert all(first[1:] == second[1:] and third[1] not in partials for first, second, third in told["captured"])
    arrivals = [addresses[0] for capture in told["captured"] for addresses in capture]
    assert len(set(arrivals)) == len(arrivals) == 9
    assert told["after"][0] == told["captured"][0][2][1], "the stream's own, grown by the capture"


def test_a_captured_launch_keeps_its_streams_workspace(run):
    told = run(
        DECODE
        + """
used = STREAM[0] + 24
eager = memory(used)
made = len(allocations())
capturing(used)
captured = [memory(used), memory(used), memory(used, q=0x7F5500000000)]
unneeded = status(STREAM[0] + 8, num_splits=16)
capturing(None)
tell(eager=eager, captured=captured, unneeded=unneeded, made=len(allocations()) - made, after=memory(used))
"""
    )
    eager, captured = told["eager"], told["captured"]
    assert all(partials == eager[:2] for _, *partials in captured)
    assert len({eager[2], *(arrivals for arrivals, *_ in captured)}) == 4, "arrival counts of its own"
    assert told["unneeded"] == told["made"] == 0 and told["after"] == eager


@pytest.mark.parametrize("stream", ["STREAM[0] + 8", "2"], ids=["own", "per thread"])
def test_a_warm_stream_captures(run, stream):
    """Nothing ran on it before, and the first launch of the process may be a captured one: it allocates nothing."""
    told = run(
        DECODE
        + f"""
warm({stream}, batch_size=4)
made = len(allocations())
capturing({stream})
captured = [memory({stream}, batch_size=batch) for batch in (1, 2, 4)]
tell(captured=captured, made=len(allocations()) - made, count=last.count)
"""
    )
    assert told["made"] == 0 and told["count"] == 3
    assert len({addresses[1] for addresses in told["captured"]}) == 1
    assert len({addresses[0] for addresses in told["captured"]}) == 3


def test_the_callers_workspace_in_a_capture(run):
    """Only arrival counts are the library's, and these no two captured launches share."""
    told = run(
        DECODE
        + f"""
warm({GIVEN})
made = len(allocations())
capturing(STREAM[0] + 8)
steps = []
for changes in (dict(), dict(q=0x7F5500000000), dict(batch_size=3)):
    arrivals = memory(STREAM[0] + 8, {GIVEN}, **changes)
    steps.append([arrivals, reached(places, mine=0x7F3300000010)["mine"]])
made = len(allocations()) - made
capturing(None)
eager = memory(STREAM[0] + 8, {GIVEN})
again = memory(STREAM[0] + 8, {GIVEN}, q=0x7F5500000000)
capturing(STREAM[0] + 8)
late = memory(STREAM[0] + 8, {GIVEN}, q=0x7F5500000010)
tell(steps=steps, made=made, eager=eager, again=again, late=late)
"""
    )
    assert all(there and len(arrivals) == 1 for arrivals, there in told["steps"]) and told["made"] == 0
    everyone = [*(arrivals[0] for arrivals, _ in told["steps"]), told["eager"][0], told["late"][0]]
    assert len(set(everyone)) == 5 and told["again"] == told["eager"]


def test_first_calls_leave_the_captures_of_others_alone(run):
    """Kernels are loaded, counters and workspaces made and taken back while another stream captures."""
    told = run("""
from fa3_cute import forward, warmup
number("capture_state", 1)
numbers64("capture_stream")[0] = STREAM[0] + 64
steps = [forward(prefill_params(), STREAM[0]), warmup(prefill_params(is_causal=False), STREAM[1])]
for batch in (1, 9):
    steps += [forward(decode_params(num_splits=48, batch_size=batch), stream) for stream in (STREAM[0], 2)]
def on_thread(): steps.append(forward(decode_params(num_splits=48), 2))
for _ in range(2):
    t = threading.Thread(target=on_thread); t.start(); t.join()
tell(steps=list(map(int, steps)), broken=number("num_broken"), made=len(allocations()))
""")
    assert told["steps"] == [0] * 8 and told["broken"] == 0 and told["made"] > 4


# ---- counters --------------------------------------------------------------------------------------------------------

FEW = """
from fa3_cute.runtime import scratch as memories
memories.NUM_COUNTERS, memories.COUNTERS_OF_STREAMS = 9, 1  # captures leave the last one to streams
"""


def test_counters_of_graphs_that_are_gone_come_back(run):
    """Those of a graph that is there do not, and then the sentence says what to do; what is not captured runs on."""
    told = run(
        FEW
        + """
from fa3_cute import forward, last_error, warmup
places = kernel_parameters()
stream = STREAM[0] + 8
eager = [int(forward(prefill_params(), stream))]
def capture(graph, launches=3):
    number("capture_id", graph); number("capture_state", 1)
    found = [int(forward(prefill_params(), stream)) or scratch(places)[0] for _ in range(launches)]
    number("capture_state", 0)
    return found
first = []
for graph in range(1, 40):
    first += capture(graph)
    fake.end_graph(graph)
kept, refused = capture(40), capture(41, 6)
said = last_error().detail
eager.append(int(forward(prefill_params(), stream)))
fake.end_graph(40)
again, other = capture(42), capture(41, 1)
eager.append(int(forward(prefill_params(), stream + 8)))
tell(first=min(first), kept=kept, refused=refused, said=said, eager=eager, again=again, other=other)
"""
    )
    assert told["first"] > 0 and told["eager"] == [0, 0, 0], "a new stream too"
    assert told["refused"][-2:] == [-103, -103] and min(told["refused"][:4]) > 0
    assert "give tile_counter" in told["said"] and "warmup" not in told["said"]
    assert set(told["again"]) == set(told["kept"]) and told["other"] == [-103]


def test_a_callers_tile_counter(run):
    """It reaches the kernel, captured or not, and takes nothing of the library's; another one is another call."""
    told = run("""
from fa3_cute import explain, forward
from fa3_cute.runtime import scratch as memories
MINE, OTHER = 0x7F3300000014, 0x7F3300000018
def steps(places, make):
    pool = lambda: [list(run) for memory in memories.contexts.memories.values() for run in memory.counters.free]
    before, made, found = pool(), len(allocations()), []
    for state in (0, 1):
        number("capture_state", state)
        for given in (MINE, MINE, OTHER):
            forward(make(tile_counter=given), STREAM[0]).check()
            found.append([*reached(places, mine=MINE, other=OTHER).values(), len(scratch(places))])
    number("capture_state", 0)
    return found, pool() == before, len(allocations()) - made
prefill = steps(kernel_parameters(), prefill_params)
split = dict(num_splits=48, workspace=0x7F5500000000, workspace_bytes=1 << 20)
decode = steps(kernel_parameters(DECODE_CFG), lambda **given: decode_params(**split | given))
wrong = [str(problem) for problem in explain(prefill_params(tile_counter=0x7F3300000012))]
tell(prefill=prefill, decode=decode, wrong=wrong)
""")
    steps = [[True, False, 0], [True, False, 0], [False, True, 0]] * 2
    assert told["prefill"] == told["decode"] == [steps, True, 0]
    assert len(told["wrong"]) == 1 and "tile_counter" in told["wrong"][0] and "4" in told["wrong"][0]
