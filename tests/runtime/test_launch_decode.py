"""What reaches the decode kernel, and which one it is. On the fake CUDA of conftest.py."""

import pytest

from fa3_cute.contract.formats import UNBOUNDED_WINDOW
from fa3_cute.planning.config import SMEM_BYTES_PER_CTA
from fa3_cute.planning.tables import decode_config

CFG = decode_config("bf16", 128, False)
WORKSPACE = 0x7F3300000010

# `sent` is what the launch was: (grid, block, cluster, shared memory), and of the numbers those that follow the plan.
# With lengths on the device it is the kernel of ragged batches.
SENT = """
from fa3_cute.planning.tables import KeySource
RAGGED_CFG = decode_config("bf16", 128, False, source=KeySource(True))
places = kernel_parameters(DECODE_CFG)
def sent(stream=STREAM[0], **changes):
    forward(decode_params(**changes), stream).check()
    return [list(last.grid), list(last.block), list(last.cluster), last.smem]
"""


@pytest.fixture
def told(run):
    """told(script): `run` it behind SENT."""
    return lambda script, **changes: run("from fa3_cute import forward\n" + SENT + script, **changes)


def launched(items, num_splits, cluster_size, smem_bytes=SMEM_BYTES_PER_CTA):
    """What `sent` returns of such a launch."""
    return [[items * num_splits, 1, 1], [160, 1, 1], [cluster_size, 1, 1], smem_bytes]


def test_grids_follow_the_plan(told):
    """Two batches with two KV heads of eight query heads each are four items."""
    found = told("""
tell(sent=[sent(num_splits=n) for n in (1, 2, 7, 11, 16, 48, 256)], early=last.may_start_early,
     unpacked=sent(num_splits=3, pack_gqa=False), rows=sent(num_splits=1, seqlen_q=17, mode=0, pack_gqa=True),
     many=sent(num_splits=3, batch_size=50), stream=last.stream, device=last.device)
""")
    assert found["sent"] == [
        launched(4, 1, 1),
        launched(4, 2, 2),
        launched(4, 7, 7),
        launched(4, 11, 1),
        launched(4, 16, 16),
        launched(4, 48, 16, CFG.smem_bytes),
        launched(4, 256, 16, CFG.smem_bytes),
    ]
    assert found["early"] == 1, "must be allowed to start while the kernel before it ends"
    assert found["unpacked"] == launched(32, 3, 3)
    assert found["rows"] == launched(12, 1, 1)  # 17 queries of 8 heads: three tiles of 64 rows
    assert found["many"] == launched(100, 3, 3, CFG.smem_bytes)
    assert (found["stream"], found["device"]) == ((1 << 32) + 0x7770, 0)


def test_the_prefill_kernel_has_no_clusters(told):
    """So that `sent` tells the kernels apart; the one after it does not start early either."""
    found = told("""
cfg = forward_config("bf16", 128, "full", True, False)
number("num_parameters", 0)
tell(decode=sent(num_splits=1), early=[last.may_start_early, sent(mode=0, seqlen_q=9, pack_gqa=None),
                                       last.may_start_early], back=sent(num_splits=1), threads=cfg.num_threads)
""")
    early, prefill, late = found["early"]
    assert found["decode"] == found["back"] == launched(4, 1, 1)
    assert prefill[1] == [found["threads"], 1, 1] and prefill[2] in ([0, 0, 0], [1, 1, 1])
    assert (early, late) == (1, 0)


def test_addresses_and_tensors(told):
    """Of K and V TMA descriptors, of the rest addresses; a workspace that is given, else the library's, else none."""
    found = told(f"""
lengths = dict(seqused_q=0x7F0099AABBCC, seqused_k=0x7F00DDEEFF10)
facts = POINTERS | lengths | dict(workspace={WORKSPACE:#x}, lse={WORKSPACE:#x} + 4 * (2 * 2 * 3 * 64) * 128)
def given(**changes):
    global places
    places = kernel_parameters(RAGGED_CFG if "seqused_k" in changes else DECODE_CFG)
    sent(k_batch_stride=2**33 + 1024, k_row_stride=4096, v_head_stride=256, **changes)
    return reached(places, **facts), len(scratch(places))
mine = given(num_splits=48, workspace={WORKSPACE:#x}, workspace_bytes=1 << 20, **lengths)
tensors = [list(struct.unpack("<32I", p)) for p in recorded(places) if len(p) == 128]
theirs = given(num_splits=48, seqused_k=lengths["seqused_k"])
none = given(num_splits=16, workspace={WORKSPACE:#x}, workspace_bytes=1 << 20)
tell(mine=mine, theirs=theirs, none=none, tensors=tensors, sizes=[*descriptors(places).values()])
""")
    # A descriptor holds its address in words 0-1, (strides / 16 bytes) from word 3 and (sizes - 1) from word 8.
    units = {words[0] | words[1] << 32: {*words[3:7]} - {0} for words in found["tensors"]}
    assert sorted(units) == [0x7E0000000000, 0xFFFF80000000], "k and v, no more"
    assert {(2**33 + 1024) // 8, 4096 // 8, 128 // 8} <= units[0x7E0000000000]
    assert {8192 * 2 * 128 // 8, 2 * 128 // 8, 256 // 8} <= units[0xFFFF80000000]
    assert [sorted(sizes) for sizes in found["sizes"]] == [sorted((8192, 128, 2, 2, 1))] * 2
    everything = dict.fromkeys(found["mine"][0], True)
    # With a workspace the arrival counts are the library's still: they must be 0 before the first launch.
    assert found["mine"] == [everything, 1]
    assert found["theirs"] == [everything | {"workspace": False, "lse": False, "seqused_q": False}, 3]
    assert found["none"] == [everything | dict.fromkeys(("workspace", "lse", "seqused_q", "seqused_k"), False), 0]


def test_scratch_memory_is_large_enough(told):
    """The library's own: what workspace_size says, and an arrival count for every CTA of every item's cluster."""
    found = told("""
from fa3_cute import workspace_size
def memory(**changes):
    sent(**changes)
    O, lse, arrivals = scratch(places)
    sizes = {at: (size, cleared) for at, size, cleared in allocations()}
    return [sizes[O][0], workspace_size(decode_params(**changes)), lse - O, sizes[arrivals]]
tell(few=memory(num_splits=11), many=memory(num_splits=256, batch_size=64, num_heads_k=16), allocations=allocations(),
     again=memory(num_splits=256, batch_size=64, num_heads_k=16), freed=number("num_freed"))
""")
    few, many = 4 * 11 * 8, 64 * 16 * 16  # rows of partial results
    assert found["few"][:3] == [4 * few * 129, 4 * few * 129, 4 * few * 128]
    assert found["few"][3][0] >= 4 * 4
    assert found["many"][:3] == [4 * many * 129, 4 * many * 129, 4 * many * 128]
    assert found["many"][3][0] >= 4 * 64 * 16 * 16 and found["again"] == found["many"]
    counters, *_ = found["allocations"]
    assert all(cleared == size for size, cleared in (counters[1:], found["few"][3], found["many"][3]))
    assert found["freed"] == 0


def test_the_scale_reaches_the_kernel(told):
    found = told("""
def floats(**changes):
    sent(**changes)
    return [struct.unpack("<f", p)[0] for p in recorded(places) if len(p) == 4]
tell(scale=floats(softmax_scale=0.3), default=floats())
""")
    log2_e = 1.4426950408889634
    assert any(abs(value - 0.3 * log2_e) < 1e-6 for value in found["scale"])
    assert any(abs(value - 128**-0.5 * log2_e) < 1e-6 for value in found["default"])


def test_one_causal_query_is_a_full_one(told):
    """It sees all keys: the kernel without a mask. Two of them need the mask."""
    found = told("""
launched = []
def seen(**changes):
    sent(**changes)
    launched.append(last.kernel)
    return [cfg.name for cfg in module._kernels]
first = seen()
one = seen(is_causal=True)
right = seen(mode=0, window_size_right=0)
two = seen(is_causal=True, mode=0, seqlen_q=2)
local = kernel_parameters(decode_config("bf16", 128, True))
sent(is_causal=True, mode=0, seqlen_q=2, num_splits=2)
causal = reached(local, left=1 << 30)
sent(mode=0, seqlen_q=2, num_splits=2, window_size_left=0x123456, window_size_right=0x6543)
window = reached(local, left=0x123456, right=0x6543)
left = seen(window_size_left=100)
tell(names=[first, one, right, two, left], launched=launched, causal=causal, window=window)
""")
    full, local = (decode_config("bf16", 128, is_local).name for is_local in (False, True))
    assert found["names"] == [[full]] * 3 + [[full, local]] * 2
    first, one, right, two, left = found["launched"]
    assert first == one == right != two == left
    assert found["causal"] == {"left": True} and all(found["window"].values())
    assert UNBOUNDED_WINDOW == 1 << 30


def test_repeated_forwards(told):
    """forward's short cut for like calls: the layers of a model. Another plan, shape or workspace is seen."""
    found = told("""
checked, steps = [], []
def counted(*arguments, launch=module.launch):
    checked.append(1)
    return launch(*arguments)
module.launch = counted
facts = dict(q=POINTERS["q"], seqused_k=0x7F00DDEEFF10, mine=0x7F3300000010, other=0x7F4400000020)
def step(stream=STREAM[0], **changes):
    changes = dict(num_splits=48, seqused_k=0x7F00DDEEFF10) | changes
    places = kernel_parameters(RAGGED_CFG if changes["seqused_k"] else DECODE_CFG)
    what = sent(stream, **changes)
    steps.append([len(checked), what, *reached(places, **facts).values(), scratch(places)])
mine, other = ({"workspace": facts[name], "workspace_bytes": 1 << 20} for name in ("mine", "other"))
step()
step(q=0x7F5500000000)                      # another layer
step(num_splits=32, q=0x7F5500000000)
step(q=0x7F5500000000)
step(**mine)
step(**mine, q=0x7F5500000000)
step(**other)
step(num_splits=16)
step(num_splits=16, q=0x7F5500000000)
step(batch_size=3)
step(seqused_k=None)
step()
step(STREAM[0] + 8)
step(STREAM[1])
step()
tell(steps=steps)
""")
    steps = found["steps"]
    assert [step[0] for step in steps] == [1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 8, 8, 8]
    plain, of_32 = (launched(4, num_splits, 16, CFG.smem_bytes) for num_splits in (48, 32))
    of_16 = launched(4, 16, 16)  # 112 CTAs run at once, one per SM, and these are 64
    assert [step[1] for step in steps] == [
        plain,
        plain,
        of_32,
        *[plain] * 4,
        of_16,
        of_16,
        launched(6, 48, 16, CFG.smem_bytes),
        *[plain] * 5,
    ]
    q, used, mine, other = ([step[i] for step in steps] for i in (2, 3, 4, 5))
    assert [i for i, there in enumerate(q) if not there] == [1, 2, 3, 5, 8]
    assert [i for i, there in enumerate(used) if not there] == [10]
    assert [i for i, there in enumerate(mine) if there] == [4, 5]
    assert [i for i, there in enumerate(other) if there] == [6]
    check_repeated_scratch([step[6] for step in steps])


def check_repeated_scratch(scratch):
    """The library's memory in each of these steps: (O, LSE, arrivals), or the arrivals alone, or nothing."""
    assert [len(addresses) for addresses in scratch] == [3, 3, 3, 3, 1, 1, 1, 0, 0, 3, 3, 3, 3, 3, 3]
    out, arrivals = ({i: addresses[at] for i, addresses in enumerate(scratch) if addresses} for at in (0, -1))
    # A shape that is known keeps the workspace that it had, also after the stream has got a larger one.
    assert out[0] == out[1] == out[2] == out[3] == out[11] != out[9] == out[10] == out[14]
    assert len({out[11], out[12], out[13]}) == len({arrivals[11], arrivals[12], arrivals[13]}) == 3
    assert arrivals[4] == arrivals[5] == arrivals[6] == arrivals[0]


def test_failures_leave_the_next_call_alone(told):
    found = told("""
from fa3_cute.contract.status import Status
def status(**changes): return int(forward(decode_params(**changes), STREAM[0]))
good = sent(num_splits=48)
number("launch_result", 700)
failed = [status(num_splits=48), status(num_splits=48, q=0x7F5500000000)]
number("launch_result", 0)
count = last.count
refused = [status(num_splits=48, workspace=0x1000, workspace_bytes=16), status(num_splits=257), status(seqlen_q=2)]
tell(good=good, failed=failed, refused=refused, launched=last.count - count, again=sent(num_splits=48))
""")
    assert len(set(found["failed"])) == 1 and found["failed"][0] < 0
    assert found["refused"] == [-9, -13, -8] and found["launched"] == 0
    assert found["good"] == found["again"]


def test_a_refused_call_is_not_repeated(told):
    """forward's short cut takes nothing over from a call that failed: neither its stream nor its workspace."""
    found = told("""
def call(stream=STREAM[0], **changes):
    return int(forward(decode_params(**dict(num_splits=48) | changes), stream)) or scratch(places)
def with_workspace(): return reached(places, mine=0x7F3300000010)["mine"]
first = call()
number("memory_result", 2)
refused = [call(STREAM[0] + 8), call(STREAM[0] + 8)]
number("memory_result", 0)
elsewhere = call(STREAM[0] + 8)
call()
number("launch_result", 700)
failed = call(workspace=0x7F3300000010, workspace_bytes=1 << 20)
number("launch_result", 0)
again = call()
tell(first=first, refused=refused, elsewhere=elsewhere, failed=failed, again=again, mine=with_workspace())
""")
    assert found["refused"] == [-100, -100] and found["failed"] < 0
    assert not set(found["elsewhere"]) & set(found["first"])
    assert found["again"] == found["first"] and not found["mine"]
