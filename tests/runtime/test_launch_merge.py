"""What reaches the merge kernel, and what a repeated call costs. On the fake CUDA of conftest.py."""

import math

import pytest

# `send` launches a good call, some of its fields changed; `floats` are the kernel's numbers of four bytes.
SENT = """
from fa3_cute import MergeParams, last_error, merge_attention, warmup
from fa3_cute.planning.merge import merge_config
ADDRESSES = dict(out_a=0x7F1234567000, lse_a=0x7F2200000014, out_b=0x7E0000000010, lse_b=0x7F3300000018,
                 out=0x7F4400000020, lse=0x7F5500000024)
CALL = dict(batch_size=3, seqlen_q=1000, num_heads=24, head_dim=128, dtype=DataType.BF16)
FIELDS = ADDRESSES | CALL
def send(stream=STREAM[0], **changes):
    return int(merge_attention(MergeParams(**FIELDS | changes), stream))
def floats(places):
    numbers = [struct.unpack(f"<{len(p) // 4}f", p) for p in recorded(places) if len(p) % 4 == 0]
    return [number for each in numbers for number in each]
places = kernel_parameters(merge_config("bf16", "bf16"))
"""


@pytest.fixture
def told(run):
    """told(script): `run` it behind SENT."""
    return lambda script, **changes: run(SENT + script, **changes)


def test_what_reaches_the_kernel(told):
    strides = {"out_a_batch_stride": 2**33 + 1024, "out_b_row_stride": 2**34, "out_head_stride": 2**35 + 64}
    lse_strides = {"lse_a_batch_stride": 2**33 + 3, "lse_b_head_stride": 2**36 + 5, "lse_row_stride": 2**37 + 7}
    found = told(f"""
strides = {strides | lse_strides}
ok = send(**strides)
facts = ADDRESSES | strides
given = reached(places, **facts)
grid, block, early, stream = list(last.grid), list(last.block), last.may_start_early, last.stream
without = send(lse=None), reached(places, **ADDRESSES)
tell(given=given, grid=grid, block=block, early=early, stream=stream, without=without, ok=ok,
     memory=[number("num_allocations"), scratch(places)], base=floats(places))
""")
    assert found["ok"] == 0 and all(found["given"].values())
    # A row of 128 BF16 elements is the work of 8 threads, a CTA of 256 has 32 rows of the 3 * 1000 * 24.
    assert (found["grid"], found["block"]) == ([72000 // 32, 1, 1], [256, 1, 1])
    assert found["early"] == 1, "must be allowed to start while the kernel before it ends"
    assert found["stream"] == (1 << 32) + 0x7770
    assert found["without"] == [0, dict.fromkeys(found["without"][1], True) | {"lse": False}]
    assert found["memory"][1] == [], "no scratch memory"
    log2_e = math.log2(math.e)
    assert any(abs(value - log2_e) < 1e-6 for value in found["base"])
    assert any(abs(value - 1 / log2_e) < 1e-6 for value in found["base"])


def test_every_shape_has_rows_enough(told):
    """Grids of head dims whose rows do not divide a CTA, of few rows, of FP32. The logarithm of base 2 is 1."""
    found = told("""
fp32 = kernel_parameters(merge_config("fp32", "fp16"))
def grid(**changes):
    assert send(**changes) == 0
    return last.grid[0]
types = dict(dtype=DataType.FP32, out_dtype=DataType.FP16)
grids = [grid(head_dim=96), grid(head_dim=8), grid(head_dim=512), grid(head_dim=40), grid(batch_size=1, seqlen_q=1)]
grids += [grid(**types), grid(**types, head_dim=512), grid(**types, lse_base=2)]
tell(grids=grids, ones=floats(fp32).count(1.0))
""")
    rows = 3 * 1000 * 24
    # Threads of a row: half of its chunks of 16 bytes, rounded up.
    threads = [6, 1, 32, 3]
    assert found["grids"][:4] == [-(-rows // (256 // each)) for each in threads]
    assert found["grids"][4] == 1  # 24 rows
    assert found["grids"][5:] == [-(-rows // 16), -(-rows // 4), -(-rows // 16)]
    assert found["ones"] >= 2  # log2(2) and its inverse


def test_repeated_calls(told):
    """A shape that has come before is neither planned nor checked anew; what changed is seen."""
    found = told("""
from fa3_cute.planning import merge as planning
from fa3_cute.runtime import merge as merging
made, checked = [], []
def counted(*arguments, launch=merging.launch):
    made.append(1)
    return launch(*arguments)
def plain(*arguments, of=planning.plain_merge):
    checked.append(1)
    return of(*arguments)
merging.launch, planning.plain_merge = counted, plain
steps, other = [], 0x7F6600000040
def step(stream=STREAM[0], **changes):
    ok = send(stream, **changes)
    steps.append([ok, len(made), len(checked), last.stream, *reached(places, **ADDRESSES, other=other).values()])
step()
step()
step(out_a=other)
step(lse=None)
step(STREAM[0] + 8, lse=0)
step(STREAM[1], lse=None)
step(batch_size=4)
step()
step(out=FIELDS["out_a"], lse=FIELDS["lse_b"])
step(out_a=other + 8)
apart = send(out_batch_stride=1 << 30)
count = last.count
refused = send(out=FIELDS["out_a"], out_batch_stride=1 << 30), send(out_b=0), send(lse_a=3), send(out=1 << 64)
tell(steps=steps, apart=apart, refused=refused, launched=last.count - count)
""")
    steps = found["steps"]
    assert [step[0] for step in steps] == [0] * 9 + [-9]
    assert [step[1] for step in steps] == [1] * 6 + [2] * 4
    assert [step[2] for step in steps] == [1] * 6 + [2, 2, 2, 3]
    assert [step[3] - ((1 << 32) + 0x7770) for step in steps[:7]] == [0, 0, 0, 0, 8, 1 << 32, 0]
    there = [dict(zip(("out_a", "lse_a", "out_b", "lse_b", "out", "lse", "other"), s[4:], strict=True)) for s in steps]
    everything = dict.fromkeys(there[0], True) | {"other": False}
    assert there[0] == there[1] == there[6] == there[7] == everything
    assert there[2] == everything | {"out_a": False, "other": True}
    assert there[3] == there[4] == there[5] == everything | {"lse": False}
    assert there[8] == everything | {"out": False, "lse": False}
    assert found["apart"] == 0  # as long as it is not in place
    assert found["refused"] == [-9, -1, -9, -9] and found["launched"] == 0


def test_a_capture_needs_a_warm_kernel(told):
    found = told("""
cold = dict(dtype=DataType.FP16)
number("capture_state", 1)
refused = send(**cold), last_error().detail
number("capture_state", 0)
count = last.count
warm = int(warmup(MergeParams(**FIELDS | cold), STREAM[0]))
number("capture_state", 1)
launched = last.count - count
tell(refused=refused, warm=warm, launched=launched, captured=send(**cold), broken=number("num_broken"))
""")
    status, detail = found["refused"]
    assert status == -103 and "merge_fp16_fp16" in detail and "warmup()" in detail
    assert (found["warm"], found["launched"], found["captured"], found["broken"]) == (0, 0, 0, 0)


def test_failures_leave_the_next_call_alone(told):
    found = told("""
first = send()
number("launch_result", 700)
failed = [send(), send(out_a=0x7F6600000040)]
number("launch_result", 0)
again, count = send(), last.count
tell(first=first, failed=failed, again=again, empty=[send(batch_size=0), send(seqlen_q=0, out=None)],
     launched=last.count - count)
""")
    assert found["first"] == found["again"] == 0 and found["failed"] == [-100, -100]
    assert found["empty"] == [0, 0] and found["launched"] == 0, "without a row nothing is launched"
