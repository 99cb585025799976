"""Launch marshalling with no GPU: the compiled host code runs against a CUDA driver and runtime that only record.

fake_cuda.c stands in for libcuda and for the DSL's runtime library in a process of its own, where fake_cuda.py reads
what it records: what the kernel would have been given, TMA descriptors included.
"""

import ctypes

import pytest

from fa3_cute.planning.tables import forward_config
from fa3_cute.contract.status import Status


def test_what_reaches_the_kernel(run):
    told = run("""
places = kernel_parameters()
strides = dict(q_batch_stride=2**33 + 1024, q_row_stride=4096, q_head_stride=256, out_batch_stride=2**34)
launch(params(softmax_scale=0.3, **strides), CFG, STREAM[0])
given = recorded(places)
tell(descriptors=[list(struct.unpack("<32I", p)) for p in given if len(p) == 128],
     floats=[struct.unpack("<f", p)[0] for p in given if len(p) == 4],
     lse=any(POINTERS["softmax_lse"].to_bytes(8, "little") in p for p in given),
     grid=list(last.grid), block=list(last.block), smem=last.smem, stream=last.stream, device=last.device)
""")
    cfg = forward_config("bf16", 128, "causal", True, False)
    assert told["grid"] == [min(132, -(-1000 // cfg.tile_m) * 8 * 2), 1, 1]
    assert told["block"] == [cfg.num_threads, 1, 1] and 0 < told["smem"] <= cfg.smem_bytes
    assert (told["stream"], told["device"]) == ((1 << 32) + 0x7770, 0)
    # A descriptor holds its address in words 0-1, (strides / 16 bytes) from word 3 and (sizes - 1) from word 8.
    address = {words[0] | words[1] << 32: words for words in told["descriptors"]}
    assert sorted(address) == sorted((0x7F1234567000, 0x7E0000000000, 0xFFFF80000000, 0x100000010))
    units = {pointer: set(words[3:7]) - {0} for pointer, words in address.items()}
    sixteen_bytes = 8
    assert {(2**33 + 1024) // sixteen_bytes, 4096 // sixteen_bytes, 256 // sixteen_bytes} <= units[0x7F1234567000]
    assert {1100 * 2 * 128 // sixteen_bytes, 2 * 128 // sixteen_bytes, 128 // sixteen_bytes} <= units[0x7E0000000000]
    assert {2**34 // sixteen_bytes, 8 * 128 // sixteen_bytes, 128 // sixteen_bytes} <= units[0x100000010]
    assert {999, 7, 1, 127} <= set(address[0x7F1234567000][8:13])
    assert {1099, 1, 127} <= set(address[0xFFFF80000000][8:13])
    assert any(abs(value - 0.3 * 1.4426950408889634) < 1e-6 for value in told["floats"])
    assert told["lse"]


def test_packed_sequences_reach_the_kernel(run):
    """Also as pointer objects; what was given reaches the kernel and nothing of the last call stays behind."""
    told = run("""
class Pointer:
    def __init__(self, at): self.at = at
    def __int__(self): return self.at
cfg = forward_config("bf16", 128, "local", True, True)
places = kernel_parameters(cfg)
arrays = {name: PACKED[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")}
facts = arrays | dict(batch_size=77, left=0x123456, right=0x6543)
def given(**changes):
    launch(params(**WINDOW | dict(is_causal=False) | changes), cfg, STREAM[0])
    return reached(places, **facts)
window = dict(window_size_left=0x123456, window_size_right=0x6543)
packed = given(**PACKED, **window)
sizes, grid = descriptors(places), last.grid[0]
objects = given(**PACKED | {name: Pointer(at) for name, at in arrays.items()} | window)
moving = Pointer(arrays["cu_seqlens_q"] + 64)
given(**PACKED | dict(cu_seqlens_q=moving))
moving.at = arrays["cu_seqlens_q"]
moved = given(**PACKED | dict(cu_seqlens_q=moving))
dense = given(seqused_k=arrays["seqused_k"], window_size_left=2**31 - 256, window_size_right=0x6543)
unbounded = reached(places, left=1 << 30)
used_sizes = descriptors(places)
few = given(**PACKED | dict(total_q=1, total_k=0, batch_size=1))
tell(packed=packed, objects=objects, moved=moved, dense=dense, unbounded=unbounded, grid=[grid, last.grid[0]],
     sizes=[[sorted(table[POINTERS[name]]) for name in ("q", "k", "v", "out")] for table in (sizes, used_sizes)])
""")
    everything = dict.fromkeys(told["packed"], True)
    assert told["packed"] == told["objects"] == everything
    assert told["moved"] == everything | {"left": False, "right": False}
    assert told["dense"] == dict.fromkeys(everything, False) | {"seqused_k": True, "right": True}
    assert told["unbounded"] == {"left": True}
    assert told["grid"] == [132, 8]
    packed, dense = told["sizes"]
    assert packed == [sorted((3210, 128, 8, 1, 1)), *[sorted((2345, 128, 2, 1, 1))] * 2, sorted((3210, 128, 8, 1, 1))]
    assert dense == [sorted((1000, 128, 8, 2, 1)), *[sorted((1100, 128, 2, 2, 1))] * 2, sorted((1000, 128, 8, 2, 1))]


def test_defaults_are_the_contiguous_tensor(run):
    told = run("""
places = kernel_parameters()
def given(**changes):
    launch(params(**changes), CFG, 0)
    return meaning(places)
row_q, row_k = 8 * 128, 2 * 128
written_out = dict(q_batch_stride=1000 * row_q, q_row_stride=row_q, q_head_stride=128, k_batch_stride=1100 * row_k,
                   k_row_stride=row_k, k_head_stride=128, v_batch_stride=1100 * row_k, v_row_stride=row_k,
                   v_head_stride=128, out_batch_stride=1000 * row_q, out_row_stride=row_q, out_head_stride=128)
default = given()
one = dict(batch_size=1, seqlen_q=1, num_heads_k=1)
nonsense = dict(q_batch_stride=3, q_row_stride=1, k_batch_stride=0, k_head_stride=7, v_head_stride=-5, out_row_stride=1)
tell(strides=given(**written_out) == default, scale=given(softmax_scale=128 ** -0.5) == default,
     size_one=given(**one, **nonsense) == given(**one), differs=given(**one) != default,
     again=given() == default)
""")
    assert all(told.values()), told


def test_kinds_of_streams_and_pointers(run):
    told = run("""
import numpy
from cuda.bindings.driver import CUdeviceptr, CUstream
class Protocol:
    def __cuda_stream__(self):
        return 0, STREAM[0]
class Pointer:
    def __int__(self):
        return POINTERS["q"]
def stream(value):
    launch(params(), CFG, value)
    return last.stream
places = kernel_parameters()
launch(params(), CFG)
plain = meaning(places)
same = []
for q in (Pointer(), CUdeviceptr(POINTERS["q"]), numpy.uint64(POINTERS["q"])):
    launch(params(q=q, batch_size=numpy.int64(2)), CFG)
    same.append(meaning(places) == plain)
launch(params(softmax_lse=None), CFG)
tell(streams=[stream(s) for s in (None, 0, STREAM[0], Protocol(), CUstream(STREAM[0]), numpy.int64(STREAM[0]))],
     refused=[raised(lambda: launch(params(), CFG, s))[:1] for s in ("0", 1.0, True, object())], same=same)
""")
    handle = (1 << 32) + 0x7770
    assert told["streams"] == [0, 0, handle, handle, handle, handle]
    assert told["refused"] == [["TypeError"]] * 4
    assert told["same"] == [True] * 3


def test_repeated_forwards(run):
    """forward's short cut for like calls: new addresses arrive, and a change of shape, device or kernel is seen."""
    told = run("""
from fa3_cute import DataType, FlashAttentionParams, forward
places = kernel_parameters()
steps = []
def call(stream, **changes):
    fields = POINTERS | SIZES | dict(is_causal=True, dtype=DataType.BF16) | changes
    return forward(FlashAttentionParams(**fields), stream)
def step(stream=STREAM[0], **changes):
    call(stream, **changes).check()
    addresses = [struct.unpack("<Q", p[:8])[0] for p in recorded(places) if len(p) == 128]
    steps.append([last.device, last.grid[0], sorted(addresses)[0], last.count])
step()
step(k=0x1000)                       # repeated
number("launch_result", 400)         # the second attempt looks at the stream anew, and tells
failed = [call(STREAM[0], k=0x1000), last.count]
number("launch_result", 0)
step(k=0x1000, seqlen_q=200)         # another shape
step(k=0x1000)                       # and back
step(stream=STREAM[1], k=0x2000)     # another device
step(k=0x3000)
other = params(k=0x4000, seqlen_q=100)
launch(other, CFG, STREAM[0])        # behind forward's back
step(k=0x5000)
tell(steps=steps, failed=failed)
""")
    heads_and_batches, tile_m = 8 * 2, forward_config("bf16", 128, "causal", True, False).tile_m
    whole, short = (heads_and_batches * -(-rows // tile_m) for rows in (1000, 200))
    assert told["steps"] == [
        [0, min(whole, 132), 0x100000010, 1],
        [0, min(whole, 132), 0x1000, 2],
        [0, min(short, 132), 0x1000, 5],
        [0, min(whole, 132), 0x1000, 6],
        [1, min(whole, 114), 0x2000, 7],
        [0, min(whole, 132), 0x3000, 8],
        [0, min(whole, 132), 0x5000, 10],
    ]
    assert told["failed"] == [Status.CUDA_ERROR, 4]


def test_repeated_packed_forwards(run):
    """The layers of a model share their lengths and are repeated; the next batch brings others and is not."""
    told = run("""
from fa3_cute import AttentionMode, DataType, FlashAttentionParams, forward
places = kernel_parameters(forward_config("bf16", 128, "causal", True, True))
fields = POINTERS | SIZES | PACKED | dict(dtype=DataType.BF16, mode=AttentionMode.VARLEN_PREFILL, is_causal=True,
                                          seqlen_q=0, seqlen_k=0)
checked, steps = [], []
def counted(*arguments, launch=module.launch):
    checked.append(1)
    return launch(*arguments)
module.launch = counted
def step(**changes):
    forward(FlashAttentionParams(**fields | changes), STREAM[0]).check()
    there = reached(places, cu_seqlens_q=PACKED["cu_seqlens_q"], seqused_k=PACKED["seqused_k"])
    steps.append([POINTERS["q"] in descriptors(places), *there.values(), len(checked), last.count])
step()
step(q=0x5000)                            # another layer
step(cu_seqlens_q=0x7f0000000004)         # another batch
step(seqused_k=None)
step(total_q=0)                           # nothing to do
step()
tell(steps=steps)
""")
    assert told["steps"] == [
        [True, True, True, 1, 1],
        [False, True, True, 1, 2],
        [True, False, True, 2, 3],
        [True, True, False, 3, 4],
        [True, True, False, 3, 4],
        [True, True, True, 4, 5],  # it came before: kept from now on
    ]


def test_the_device_is_the_streams(run):
    told = run("""
steps = []
def step(stream):
    launch(params(seqlen_q=40000), CFG, stream)
    steps.append([last.device, fake.current_device(), last.grid[0]])
step(0)                        # no context is current: device 0's becomes it, and stays
step(STREAM[1])
step(STREAM[0])
step(STREAM[1])
fake.cuCtxSetCurrent(ctypes.c_void_p(None))
step(STREAM[1])
step(0)
loaded = numbers("loaded_on")
before = last.count
refused = raised(lambda: launch(params(), CFG, STREAM[2]))
tell(steps=steps, loaded=loaded, libraries=number("num_libraries"), refused=refused,
     after=[last.count - before, fake.current_device()])
""")
    assert told["steps"] == [[0, 0, 132], [1, 0, 114], [0, 0, 132], [1, 0, 114], [1, 1, 114], [1, 1, 114]]
    assert all(told["loaded"][:2]) and told["loaded"][2] == 0 and told["libraries"] == 1
    assert told["refused"][:2] == ["UnsupportedDevice", "device 2 is of compute capability 8.0, not 9.0 (Hopper)"]
    assert told["after"] == [0, 1]


def test_capturing_needs_a_warm_up(run):
    told = run("""
number("capture_state", 1)
cold = raised(lambda: launch(params(), CFG, STREAM[0]))
number("capture_state", 0); number("capture_result", 906)
implicit = raised(lambda: launch(params(), CFG, 0))
untouched = [len(compiler._kernels), number("num_libraries"), last.count]
number("capture_result", 0)
module.ensure_loaded(CFG)
number("capture_state", 1)
launch(params(), CFG, STREAM[0])
warm = last.count
other_device = raised(lambda: launch(params(), CFG, STREAM[1]))
module.ensure_loaded(CFG, STREAM[1])
launch(params(), CFG, STREAM[1])
tell(cold=cold, implicit=implicit[0], untouched=untouched, warm=warm, other_device=other_device, count=last.count)
""")
    assert told["cold"][0] == told["implicit"] == told["other_device"][0] == "NotWarmedUp"
    assert "warmup()" in told["cold"][1] and "device 1" in told["other_device"][1]
    assert told["untouched"] == [0, 0, 0] and told["warm"] == 1 and told["count"] == 2


def test_failures_carry_their_code(run):
    told = run("""
number("load_result", 209)
load = raised(lambda: launch(params(), CFG, 0))
number("load_result", 0)
launch(params(), CFG, 0)
number("launch_result", 700)
failed = raised(lambda: launch(params(), CFG, 0))
number("launch_result", 0)
launch(params(), CFG, 0)
tell(load=load, launch=failed, count=last.count)
""")
    assert told["load"][0] == told["launch"][0] == "CudaFailure"
    assert told["load"][2] == 209 and "cudaErrorNoKernelImageForDevice" in told["load"][1]
    assert told["launch"][2] == 700 and "cudaErrorIllegalAddress (700): an illegal memory access" in told["launch"][1]
    assert told["count"] == 3


def test_no_device(run):
    told = run("""
number("init_result", 100)
tell(launch=raised(lambda: launch(params(), CFG, 0)), load=raised(lambda: module.ensure_loaded(CFG)),
     compiled=len(compiler._kernels))
""")
    assert {error[0] for error in (told["launch"], told["load"])} == {"UnsupportedDevice"}
    assert "a fake error" in told["launch"][1] and told["compiled"] == 0


def test_threads_have_buffers_of_their_own(run):
    told = run("""
calls, errors = [], []
def work(i):
    try:
        for _ in range(300):
            launch(params(q=POINTERS["q"] + 16 * i), CFG, STREAM[i % 2])
        calls.append(module._thread.buffers[CFG])
    except Exception as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
tell(buffers=len({call.argument for call in calls}), errors=errors, count=last.count, libraries=number("num_libraries"))
""")
    assert told == {"buffers": 6, "errors": [], "count": 1800, "libraries": 1}


def test_kernels_are_told_apart(run):
    told = run("""
seen = []
for lse in (True, False, True):
    cfg = forward_config("bf16", 128, "causal", lse, False)
    launch(params(), cfg, 0)
    seen.append(last.kernel)
tell(seen=seen)
""")
    assert told["seen"][0] == told["seen"][2] != told["seen"][1]


def test_without_a_private_name(run):
    """There is no other way to launch: the status and the sentence that name it."""
    told = run("""
from fa3_cute import forward, last_error
module.PRIVATE_NAMES = ("capi_func", "renamed_in_a_later_release")
tell(status=forward(prefill_params(), STREAM[0]), said=last_error().detail, count=last.count)
""")
    assert (told["status"], told["count"]) == (Status.COMPILE_ERROR, 0)
    assert "renamed_in_a_later_release" in told["said"] and "capi_func" not in told["said"]


def test_no_driver():
    """The reason is the loader's own; where there is a driver, this has nothing to say."""
    from fa3_cute.runtime.cuda_driver import UnsupportedDevice, initialise_driver

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(UnsupportedDevice, match="no CUDA driver: "):
            initialise_driver()
