"""Launch marshalling with no GPU: the compiled host code runs against a CUDA driver and runtime that only record.

fake_cuda.c stands in for libcuda and for the DSL's runtime library in a process of its own; what it records is what the
kernel would have been given, TMA descriptors included.
"""
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fa3_cute.config import FORWARD_ARGUMENTS
from fa3_cute.heuristics import forward_config
from fa3_cute.status import Status

TESTS = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

# What every script starts with: params, the recorded launch as a dict, and the bytes of the kernel's parameters.
PRELUDE = """
import ctypes, json, os, struct, sys, threading
from types import SimpleNamespace
sys.path.insert(0, os.environ["REPOSITORY"])
from fa3_cute import compiler, disk_cache, launch as module
from fa3_cute.cubin import read_cubin
from fa3_cute.heuristics import forward_config
from fa3_cute.launch import launch

fake = ctypes.CDLL("libcuda.so.1")
CFG = forward_config("bf16", 128, True, True)
STREAM = [(device + 1 << 32) + 0x7770 for device in range(3)]
POINTERS = dict(q=0x7f1234567000, k=0x7e0000000000, v=0xffff80000000, out=0x100000010, softmax_lse=0x7fff00000004)
SIZES = dict(batch_size=2, seqlen_q=1000, seqlen_k=1100, num_heads=8, num_heads_k=2, head_dim=128)
STRIDES = {f"{x}_{d}_stride": None for x in ("q", "k", "v", "out") for d in ("batch", "row", "head")}

class Last(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("smem", ctypes.c_uint64),
                ("stream", ctypes.c_uint64), ("count", ctypes.c_long), ("device", ctypes.c_int),
                ("kernel", ctypes.c_uint64)]
last = Last.in_dll(fake, "last")

def number(name, value=None):
    cell = ctypes.c_int.in_dll(fake, name)
    if value is not None:
        cell.value = value
    return cell.value

def numbers(name):
    return list((ctypes.c_int * 3).in_dll(fake, name))

def params(**changes):
    return SimpleNamespace(**POINTERS | SIZES | STRIDES | dict(softmax_scale=None) | changes)

def kernel_parameters(cfg=CFG):
    "Tell the fake where the kernel's parameters lie; return them as (offset, bytes)."
    module.ensure_loaded(cfg, 0)
    data = disk_cache.find(cfg.name, compiler.cache_key(cfg)).read_bytes()
    kernel, = read_cubin(data[data.index(b"\\x7fELF", 4):]).values()
    for i, place in enumerate(kernel.parameters):
        (ctypes.c_int * 64).in_dll(fake, "offsets")[i], (ctypes.c_int * 64).in_dll(fake, "sizes")[i] = place
    number("num_parameters", len(kernel.parameters))
    return kernel.parameters

def recorded(places):
    blob = bytes((ctypes.c_ubyte * 8192).in_dll(fake, "parameters"))
    return [blob[offset:offset + size] for offset, size in places]

def meaning(places):
    "The parameters without the bytes that nothing initialises: a descriptor's second half, padding in structs."
    return [p[:64].hex() for p in recorded(places) if len(p) in (4, 128)]

def raised(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "code", None)]

def tell(**facts):
    print("RESULT" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    """Folder of the fake driver and runtime, and of a disk cache that the processes share."""
    if COMPILER is None:
        pytest.skip("needs a C compiler for the fake CUDA driver")
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = folder / "libcute_dsl_runtime.so"
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", library, TESTS / "fake_cuda.c", "-ldl"], check=True)
    os.link(library, folder / "libcuda.so.1")     # one file under both names: one copy of its variables
    return folder


@pytest.fixture
def run(fake_cuda):
    """run(script) -> what it told, in a process whose CUDA is the fake."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FA3_CUTE", "CUTE_DSL"))}
    libraries = f"{fake_cuda}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = clean | {
        "LD_LIBRARY_PATH": libraries, "CUTE_DSL_LIBS": str(fake_cuda / "libcute_dsl_runtime.so"),
        "FA3_CUTE_CACHE_DIR": str(fake_cuda / "cache"), "REPOSITORY": str(TESTS.parent)}

    def run_script(script: str, **changes: str) -> dict:
        done = subprocess.run([sys.executable, "-c", PRELUDE + script], env=environment | changes, text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.split("RESULT")[1])

    return run_script


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
    cfg = forward_config("bf16", 128, True, True)
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
    heads_and_batches, tile_m = 8 * 2, forward_config("bf16", 128, True, True).tile_m
    whole, short = (heads_and_batches * -(-rows // tile_m) for rows in (1000, 200))
    assert told["steps"] == [
        [0, min(whole, 132), 0x100000010, 1], [0, min(whole, 132), 0x1000, 2], [0, min(short, 132), 0x1000, 5],
        [0, min(whole, 132), 0x1000, 6], [1, min(whole, 114), 0x2000, 7], [0, min(whole, 132), 0x3000, 8],
        [0, min(whole, 132), 0x5000, 10]]
    assert told["failed"] == [Status.CUDA_ERROR, 4]


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
     after=[last.count - before, fake.current_device()], device=module.device_of(STREAM[0]))
""")
    assert told["steps"] == [[0, 0, 132], [1, 0, 114], [0, 0, 132], [1, 0, 114], [1, 1, 114], [1, 1, 114]]
    assert all(told["loaded"][:2]) and told["loaded"][2] == 0 and told["libraries"] == 1
    assert told["refused"][:2] == ["UnsupportedDevice", "device 2 is of compute capability 8.0, not 9.0 (Hopper)"]
    assert told["after"] == [0, 1] and told["device"] == 0


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
module.ensure_loaded(CFG, 1)
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
     device=raised(module.device_of), compiled=len(compiler._kernels))
""")
    assert {error[0] for error in (told["launch"], told["load"], told["device"])} == {"UnsupportedDevice"}
    assert "a fake error" in told["launch"][1] and told["compiled"] == 0


def test_threads_have_buffers_of_their_own(run):
    told = run("""
calls, errors = [], []
def work(i):
    try:
        for _ in range(300):
            launch(params(q=POINTERS["q"] + 16 * i), CFG, STREAM[i % 2])
        calls.append(module._thread.calls[id(CFG)])
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
    cfg = forward_config("bf16", 128, True, lse)
    launch(params(), cfg, 0)
    seen.append(last.kernel)
tell(seen=seen)
""")
    assert told["seen"][0] == told["seen"][2] != told["seen"][1]


def test_without_the_private_names(run):
    told = run("""
places = kernel_parameters()
launch(params(q_row_stride=4096), CFG, STREAM[0])
packed, path = meaning(places), module.launch_path(CFG)
module.PRIVATE_NAMES = ("capi_func", "renamed_in_a_later_release")
module._kernels.clear(); module._thread.calls.clear()
type(compiler.get_kernel(CFG)).num_devices = 1      # the DSL would ask a CUDA runtime that has no fake
launch(params(q_row_stride=4096), CFG, STREAM[0])
number("launch_result", 700)
tell(same=meaning(places) == packed, paths=[path, module.launch_path(CFG)], count=last.count, stream=last.stream,
     failed=raised(lambda: launch(params(), CFG, 0)))
""")
    assert told["same"] and told["count"] == 2 and told["stream"] == (1 << 32) + 0x7770
    assert told["paths"] == ["packed", "objects: the DSL has no renamed_in_a_later_release"]
    assert told["failed"][0] == "CudaFailure" and told["failed"][2] == 700


def test_host_cost(run):
    """No promise about a machine that is busy, only that no launch builds argument objects (20 to 40 us)."""
    told = run("""
import time
p, best = params(), 1.0
for _ in range(20):
    start = time.perf_counter()
    for _ in range(500):
        launch(p, CFG, STREAM[0])
    best = min(best, (time.perf_counter() - start) / 500)
tell(microseconds=best * 1e6)
""")
    assert told["microseconds"] < 15


def test_no_driver():
    """The reason is the loader's own; where there is a driver, this has nothing to say."""
    from fa3_cute.cuda_driver import UnsupportedDevice, initialise_driver

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(UnsupportedDevice, match="no CUDA driver: "):
            initialise_driver()


def test_storage_is_aligned_and_apart():
    from fa3_cute import launch

    offsets = launch.storage_offsets()
    sizes = [4 if kind in ("int32", "float32") else 8 for _, kind in FORWARD_ARGUMENTS] + [4]
    assert all(offset % size == 0 for offset, size in zip(offsets, sizes, strict=True))
    spans = sorted(zip(offsets, sizes, strict=True))
    assert all(at + size <= following for (at, size), (following, _) in zip(spans, spans[1:], strict=False))
    assert set(launch.PER_CALL + launch.PER_SHAPE) == {name for name, _ in FORWARD_ARGUMENTS}


def test_shape_values():
    from fa3_cute.launch import NO_STRIDES, PER_SHAPE, resolve_shape

    values = dict(zip(PER_SHAPE, resolve_shape(132, *NO_STRIDES, 2, 5, 7, 8, 4, None, 64), strict=True))
    assert values["q_batch_stride"] == values["out_batch_stride"] == 5 * 8 * 64
    assert values["k_batch_stride"] == values["v_batch_stride"] == 7 * 4 * 64
    assert (values["q_row_stride"], values["k_row_stride"], values["v_head_stride"]) == (512, 256, 64)
    assert (values["num_sms"], values["softmax_scale"]) == (132, 0.125)
    given = dict(zip(PER_SHAPE, resolve_shape(132, *range(1000, 1012), 2, 5, 7, 8, 1, 0.5, 64), strict=True))
    strides = [given[name] for name in PER_SHAPE[:12]]       # one KV head: its stride says nothing
    assert strides == [1000, 1001, 1002, 1003, 1004, 64, 1006, 1007, 64, 1009, 1010, 1011]
    assert given["softmax_scale"] == 0.5
