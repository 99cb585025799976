"""attention over arrays on a device, with stand-ins for the arrays, the driver and the launch. No GPU."""

import ctypes
import struct
from contextlib import contextmanager
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cuda.core.utils import StridedMemoryView

from fa3_cute import AttentionMode, DataType, FlashAttentionError, api, attention
from fa3_cute.arrays import dlpack
from fa3_cute.arrays.call import AttentionCall
from fa3_cute.arrays.memory import hopper_device_problem
from fa3_cute.runtime.launch import CudaFailure, NotWarmedUp, UnsupportedDevice

A = 0x7F00_0000_0000
# (DLDataTypeCode, bits)
CODES = {
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint64": (1, 64),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
    "float8_e4m3fnuz": (11, 8),
}
new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class DLArray:
    """An array with DLPack: what a library says of it; `asked` lists the streams that it was asked to order."""

    place, flags, lanes, version, offset, strides = (2, 0), 0, 1, (1, 0), 0, None

    def __init__(self, *shape, dtype="float16", address=A, **facts):
        self.shape, self.dtype, self.address, self.asked = shape, dtype, address, []
        vars(self).update(facts)

    def __dlpack_device__(self):
        return self.place

    def __dlpack__(self, *, stream, max_version):
        self.asked.append(stream)
        if self.dtype.startswith("float8") and max_version and max_version < (1, 1):
            raise BufferError("no name for FP8 before DLPack 1.1")
        ndim = len(self.shape)
        self.sizes = (ctypes.c_int64 * ndim)(*self.shape)
        self.steps = (ctypes.c_int64 * ndim)(*self.strides) if self.strides else None
        pointers = ctypes.addressof(self.sizes), ctypes.addressof(self.steps) if self.steps else 0
        tensor = struct.pack(
            "<QiiiBBHQQQ", self.address, *self.place, ndim, *CODES[self.dtype], self.lanes, *pointers, self.offset
        )
        head = struct.pack("<IIQQQ", *self.version, 0, 0, self.flags) if self.version else b""
        self.memory = ctypes.create_string_buffer(head + tensor)
        name = b"dltensor_versioned" if self.version else b"dltensor"
        return new_capsule(ctypes.addressof(self.memory), name, None)


class OldDLArray(DLArray):
    version = None

    def __dlpack__(self, stream=None):
        return super().__dlpack__(stream=stream, max_version=None)


class CAIArray:
    """An array with __cuda_array_interface__ only."""

    def __init__(self, *shape, typestr="<f2", address=A, **facts):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 3,
            **facts,
        }


class Stubborn(DLArray):
    words = "Can't export tensors that require gradient"

    def __dlpack__(self, **options):
        raise BufferError(self.words)


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for the driver, the allocator and launch.py; `launches` are (params, stream), `orders` stream pairs."""
    seen = SimpleNamespace(launches=[], orders=[], allocated=[], device=0, is_capturing=False, is_relaxed=False)

    @contextmanager
    def device_made_current(stream):
        yield seen.device

    @contextmanager
    def capture_rules_relaxed():
        seen.is_relaxed = True
        try:
            yield
        finally:
            seen.is_relaxed = False

    def allocate(nbytes, stream, handle, device):
        assert seen.is_relaxed, "the capture of another thread would end"
        seen.allocated.append((nbytes, handle, device))
        return SimpleNamespace(handle=A + 0x1000 * len(seen.allocated))

    for name, stand_in in {
        "initialise_driver": lambda: None,
        "device_made_current": device_made_current,
        "capture_rules_relaxed": capture_rules_relaxed,
        "is_capturing": lambda stream: seen.is_capturing,
        "current_context": lambda: 7,
        "order": lambda before, after: seen.orders.append((before, after)),
        "_device_of": lambda name, address: 0,
        "_allocate": allocate,
    }.items():
        monkeypatch.setattr(dlpack, name, stand_in)
    launcher = SimpleNamespace(
        addresses_of=lambda params: params,
        launch_all=lambda steps, shape, params, stream: seen.launches.append((params, stream)),
        CudaFailure=CudaFailure,
        UnsupportedDevice=UnsupportedDevice,
        NotWarmedUp=NotWarmedUp,
    )
    monkeypatch.setattr(api, "_launcher", lambda: launcher)
    monkeypatch.setattr(api, "_thread", api._Thread())
    monkeypatch.setattr(api._Thread, "remember", lambda *_: None)  # each call comes with all of its params
    return seen


def dense(kind=DLArray, **facts):
    return kind(2, 5, 4, 64, **facts), kind(2, 9, 2, 64, **facts), kind(2, 9, 2, 64, **facts)


def packed(rows_q=7, rows_k=9, **facts):
    return DLArray(rows_q, 4, 64, **facts), DLArray(rows_k, 2, 64, **facts), DLArray(rows_k, 2, 64, **facts)


def lengths(n, **facts):
    return DLArray(n, **{"dtype": "int32", **facts})


OFFSETS = {"cu_seqlens_q": lengths(3), "cu_seqlens_k": lengths(3)}


# ---- the call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stream, asked, handle", [(None, 1, 0), (0, 1, 0), (1, 1, 1), (2, 2, 2), (0x5550, 0x5550, 0x5550)]
)
def test_arrays_become_params_and_libraries_are_told_the_stream(gpu, stream, asked, handle):
    q, k, v = DLArray(2, 5, 4, 64), DLArray(2, 9, 2, 64, address=2 * A), DLArray(2, 9, 2, 64, address=3 * A)
    out = DLArray(2, 5, 4, 64, address=4 * A)
    used = lengths(2, address=5 * A)
    assert (
        attention(q, k, v, out=out, stream=stream, window_size=(3, 1), softmax_scale=0.5, num_splits=2, seqused_k=used)
        is out
    )
    ((p, launched_on),) = gpu.launches
    assert launched_on == handle and [array.asked for array in (q, k, v, out, used)] == [[asked]] * 5
    assert (p.q, p.k, p.v, p.out, p.seqused_k) == (A, 2 * A, 3 * A, 4 * A, 5 * A)
    assert (p.batch_size, p.seqlen_q, p.seqlen_k, p.num_heads, p.num_heads_k, p.head_dim) == (2, 5, 9, 4, 2, 64)
    assert (p.window_size_left, p.window_size_right, p.softmax_scale, p.num_splits) == (3, 1, 0.5, 2)
    assert (p.dtype, p.mode, p.softmax_lse) == (DataType.FP16, AttentionMode.PREFILL, None)
    assert gpu.orders == gpu.allocated == []


def test_packed_sequences(gpu):
    attention(*packed(), causal=True, **OFFSETS)
    p, _ = gpu.launches[0]
    assert (p.mode, p.batch_size, p.total_q, p.total_k, p.is_causal) == (AttentionMode.VARLEN_PREFILL, 2, 7, 9, True)


@pytest.mark.parametrize("kind", [DLArray, OldDLArray, CAIArray])
def test_strides_are_those_of_the_array(gpu, kind):
    """A transposed, a broadcast and a sliced array; where the size is 1 a stride says nothing."""
    steps = {"q": (1280, 64, 320, 1), "k": (0, 128, 64, 1), "v": (2048, 256, 77, 1)}
    shapes = {"q": (2, 5, 4, 64), "k": (2, 9, 1, 64), "v": (2, 9, 1, 64)}
    scale = 2 if kind is CAIArray else 1
    arrays = {name: kind(*shapes[name], strides=tuple(scale * step for step in steps[name])) for name in "qkv"}
    attention(**arrays)
    p, _ = gpu.launches[0]
    assert (p.q_batch_stride, p.q_row_stride, p.q_head_stride) == (1280, 64, 320)
    assert (p.k_batch_stride, p.k_row_stride, p.k_head_stride) == (0, 128, None)
    assert (p.v_batch_stride, p.v_row_stride, p.v_head_stride) == (2048, 256, None)


def test_a_byte_offset_moves_the_address(gpu):
    attention(DLArray(2, 5, 4, 64, offset=64), *dense()[1:])
    assert gpu.launches[0][0].q == A + 64


def test_new_out_and_lse(gpu):
    out, lse = attention(*dense(dtype="bfloat16"), stream=0x5550, return_lse=True)
    assert gpu.allocated == [(2 * 5 * 4 * 64 * 2, 0x5550, 0), (2 * 4 * 5 * 4, 0x5550, 0)]
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 5, 4, 64), "bfloat16", (2, 4, 5), "float32")
    p, _ = gpu.launches[0]
    assert (p.out, p.softmax_lse, p.dtype) == (out.address, lse.address, DataType.BF16)
    assert attention(*packed(), **OFFSETS, return_lse=True)[1].shape == (4, 7)


def test_arrays_without_elements(gpu):
    """No queries: nothing to launch. No keys in packed sequences: whatever stands for their address is aligned."""
    assert attention(DLArray(2, 0, 4, 64, address=0), *dense()[1:]).shape == (2, 0, 4, 64)
    assert attention(DLArray(0, 4, 64, address=0), *packed()[1:], **OFFSETS).shape == (0, 4, 64)
    assert gpu.launches == []
    empty = DLArray(0, 2, 64, address=0)
    attention(packed()[0], empty, empty, **OFFSETS)
    p, _ = gpu.launches[0]
    assert (p.total_q, p.total_k, p.k) == (7, 0, A)


def test_a_producer_stream_is_ordered_before_ours(gpu):
    """By its library, asked through DLPack; here for __cuda_array_interface__, where it may be our stream already."""
    q, k, v = CAIArray(2, 5, 4, 64, stream=0x7770), CAIArray(2, 9, 2, 64, stream=1), CAIArray(2, 9, 2, 64, stream=None)
    attention(q, k, v)
    assert gpu.orders == [(0x7770, 0)]
    attention(q, k, v, stream=0x7770)
    assert gpu.orders[1:] == [(1, 0x7770)]


# ---- refusals --------------------------------------------------------------------------------------------------------

Q, K, V = dense()
NUMPY = np.zeros((2, 9, 2, 64), np.float16)
REFUSED = [
    (-9, (Q, NUMPY, V), {}, "k is a numpy.ndarray in host memory: must be on a CUDA device"),
    (-9, (Q, K, V), {"seqused_k": np.zeros(2, np.int32)}, "seqused_k is a numpy.ndarray in host memory"),
    (-9, dense(place=(3, 0)), {}, "q is a .*DLArray in host memory"),
    (-9, dense(place=(10, 0)), {}, "device type 10"),
    (-9, dense(place=(2, 1)), {}, "q is on device 1: must be on device 0"),
    (-9, (Stubborn(2, 5, 4, 64), K, V), {}, "q is a .*Stubborn that cannot be had through DLPack: Can't export"),
    (-9, (DLArray(2, 5, 4, 64, version=(2, 0)), K, V), {}, "DLPack 2.0: must be version 1"),
    (-9, (CAIArray(2, 5, 4, 64, mask=Q), K, V), {}, "with a mask"),
    (-9, (Q, DLArray(2, 9, 2, 64, dtype="bfloat16"), V), {}, "dtypes float16, bfloat16, float16 of q, k, v"),
    (-9, dense(dtype="float32"), {}, "arrays of float32: must be None with arrays of float16, bfloat16, float8_e4m3fn"),
    (-9, dense(lanes=2), {}, "arrays of a vector"),
    (-9, (Q, K, V), {"dtype": "bfloat16"}, "dtype='bfloat16' with arrays of float16"),
    (-9, (Q, K, V), {"out": DLArray(2, 5, 4, 64, dtype="bfloat16")}, "out is bfloat16: must be float16 or float32"),
    (-9, (Q, K, V), {"out": DLArray(2, 5, 4, 64, flags=1)}, "out is a DLArray, which is read-only: must be writable"),
    (-9, (Q, K, V), {"out": CAIArray(2, 5, 4, 64, data=(A, True))}, "out is a CAIArray, which is read-only"),
    (-9, packed(), {**OFFSETS, "cu_seqlens_k": lengths(3, dtype="int64")}, "cu_seqlens_k is int64: must be int32"),
    (-9, (Q, K, V), {"window_size": 3}, "window_size=3: must be a pair"),
    (-9, (DLArray(2, 5, 4, 64, address=A + 2), K, V), {}, "q=0x7f0000000002: must be a device address aligned to 16"),
    (-9, (Q, K, V), {"q_descale": DLArray(1, dtype="float32")}, "q_descale: must be None .*FP8_E4M3"),
    (-7, dense(strides=(5120, 512, 128, 2)), {}, r"q has the strides \(5120, 512, 128, 2\)"),
    (-7, (DLArray(5, 4, 64), K, V), {}, r"q.shape=\(5, 4, 64\): must be \[batch, seqlen, heads, head_dim\]"),
    (-7, (Q, K, DLArray(2, 8, 2, 64)), {}, r"v.shape=\(2, 8, 2, 64\): must be \(2, 9, 2, 64\)"),
    (-7, (Q, DLArray(3, 9, 2, 64), V), {}, r"k.shape=\(3, 9, 2, 64\): must be \(2, 9, 2, 64\)"),
    (-7, (Q, K, V), {"out": DLArray(2, 4, 5, 64)}, r"out.shape=\(2, 4, 5, 64\): must be \(2, 5, 4, 64\)"),
    (-7, (Q, K, V), {"seqused_k": lengths(3)}, r"seqused_k.shape=\(3,\): must be \(2,\)"),
    (-7, (Q, K, V), {"seqused_k": DLArray(2, 1, dtype="int32")}, r"seqused_k.shape=\(2, 1\): must have one dimension"),
    (-7, packed(), OFFSETS | {"cu_seqlens_q": DLArray(3, 1, dtype="int32")}, "cu_seqlens_q.shape=.*one dimension"),
    (-9, (Q, K, V), {"return_lse": np.zeros(2)}, "return_lse=array.*: must be True or False"),
    (-9, (Q, K, V), {"dtype": np.zeros(2)}, "dtype=array.* with arrays of float16"),
    (-7, packed(), {**OFFSETS, "cu_seqlens_k": lengths(4)}, r"cu_seqlens_k.shape=\(4,\): must be \(3,\)"),
    (-7, (Q, *[DLArray(2, 0, 2, 64, address=0)] * 2), {}, "k.shape=.*: must not be empty"),
    (-7, (Q, K, V), {"k_descale": DLArray(3, dtype="float32")}, r"k_descale.shape=\(3,\): must be \(\), \(2,\),"),
    (-7, (Q, K, V), {"out": DLArray(2, 5, 4, 64, strides=(0, 256, 64, 1))}, "out's batch stride=0"),
    (-6, packed(), {"cu_seqlens_q": lengths(3)}, "cu_seqlens_k=None"),
    (
        -5,
        (Q, K, V),
        {"causal": True, "window_size": (4, -1)},
        r"window_size\[0\]=4: must be negative .* with causal=True",
    ),
    (-4, (DLArray(2, 5, 3, 64), K, V), {}, "num_heads=3: must be a multiple of num_heads_k=2"),
    (-13, (Q, K, V), {"num_splits": 257}, "num_splits=257"),
]


@pytest.mark.parametrize("code, qkv, options, words", REFUSED)
def test_refusals_enqueue_and_allocate_nothing(gpu, code, qkv, options, words):
    with pytest.raises(FlashAttentionError, match=words) as caught:
        attention(*qkv, **options)
    assert caught.value.code == code
    assert gpu.launches == gpu.allocated == []


@pytest.mark.parametrize("qkv", [(Q.shape, K, V), (Q, None, V)])
def test_no_array(qkv):
    with pytest.raises(TypeError, match="must be an array with DLPack or __cuda_array_interface__, not"):
        attention(*qkv)


def test_a_jax_array_is_no_out(gpu):
    jax_array = type("ArrayImpl", (DLArray,), {"__module__": "jaxlib._jax"})
    attention(*[jax_array(*x.shape) for x in (Q, K, V)])
    with pytest.raises(FlashAttentionError, match="out is a ArrayImpl, which is read-only"):
        attention(Q, K, V, out=jax_array(*Q.shape))


@pytest.mark.parametrize("options", [{}, {"out": DLArray(2, 5, 4, 64), "return_lse": True}])
def test_nothing_is_allocated_within_a_capture(gpu, options):
    gpu.is_capturing = True
    with pytest.raises(FlashAttentionError, match="while the stream is capturing a CUDA graph"):
        attention(Q, K, V, **options)
    attention(Q, K, V, out=DLArray(2, 5, 4, 64))
    assert len(gpu.launches) == 1 and gpu.allocated == []


def test_failures_have_their_status(gpu, monkeypatch):
    def fail(*arguments):
        raise CudaFailure(2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory", "allocating")

    monkeypatch.setattr(dlpack, "_allocate", fail)
    with pytest.raises(FlashAttentionError, match="allocating 5120 bytes for out failed.*out of memory") as caught:
        attention(Q, K, V)
    assert caught.value.code == -100 and isinstance(caught.value.__cause__, CudaFailure)
    monkeypatch.setattr(dlpack, "is_capturing", fail)
    with pytest.raises(FlashAttentionError, match="out of memory") as caught:
        attention(Q, K, V)
    assert caught.value.code == -100


@pytest.mark.skipif(hopper_device_problem() is None, reason="this machine has a Hopper GPU")
def test_without_a_gpu():
    with pytest.raises(FlashAttentionError) as caught:
        attention(Q, K, V)
    assert caught.value.code == -101


# ---- arrays of ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, storage", [("float16", np.float16), ("bfloat16", np.uint16), ("float32", np.float32)])
@pytest.mark.parametrize("max_version", [None, (1, 0), (1, 1)])
def test_the_capsule_of_a_new_array(gpu, monkeypatch, dtype, storage, max_version):
    """cuda.core makes it, over host memory here; BF16 gets its own name."""
    memory = np.zeros((2, 3), storage)
    monkeypatch.setattr(
        dlpack, "_view_of", lambda buffer, shape, dtype: StridedMemoryView.from_any_interface(memory, stream_ptr=-1)
    )
    array = dlpack.DeviceArray((2, 3), dtype, SimpleNamespace(handle=A), 0, 0)
    tensor = dlpack._from_capsule(array, array.__dlpack__(stream=-1, max_version=max_version))
    assert (tensor.shape, tensor.strides, tensor.dtype) == ((2, 3), (3, 1), dtype)
    assert tensor.address == memory.ctypes.data and not tensor.is_readonly
    taken = StridedMemoryView.from_dlpack(
        SimpleNamespace(
            __dlpack_device__=lambda: (1, 0), __dlpack__=lambda **options: array.__dlpack__(max_version=max_version)
        ),
        -1,
    )
    assert taken.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else storage) and taken.ptr == memory.ctypes.data


def test_consumers_wait_for_our_stream(gpu, monkeypatch):
    monkeypatch.setattr(dlpack, "checked", lambda result, action: result)
    monkeypatch.setattr(
        dlpack,
        "driver",
        SimpleNamespace(
            cuCtxPushCurrent=lambda context: gpu.orders.append(context),
            cuCtxPopCurrent=lambda: gpu.orders.append("pop"),
        ),
    )
    monkeypatch.setattr(dlpack, "_view_of", lambda *facts: SimpleNamespace(__dlpack__=lambda **options: "capsule"))
    array = dlpack.DeviceArray((2, 3), "float16", SimpleNamespace(handle=A), 0x5550, 3)
    for stream in (-1, 0x5550):
        assert array.__dlpack__(stream=stream) == "capsule"
    assert gpu.orders == []
    assert array.__dlpack__(stream=2, dl_device=(2, 3)) == array.__dlpack__() == "capsule"
    assert gpu.orders == [7, (0x5550, 2), "pop", 7, (0x5550, 1), "pop"]
    with pytest.raises(BufferError, match="on CUDA device 3"):
        array.__dlpack__(dl_device=(1, 0))


def test_what_a_new_array_says_of_itself(gpu):
    array = dlpack.DeviceArray((2, 3, 4), "float32", SimpleNamespace(handle=A), 0, 1)
    assert array.__cuda_array_interface__ == {
        "version": 3,
        "shape": (2, 3, 4),
        "typestr": "<f4",
        "strides": None,
        "data": (A, False),
        "stream": 1,
    }
    assert (array.ndim, array.size, array.nbytes, array.strides) == (3, 24, 96, (12, 4, 1))
    assert array.__dlpack_device__() == (2, 1) and repr(array) == "DeviceArray(float32[2, 3, 4] on device 1)"
    assert not hasattr(
        dlpack.DeviceArray((2,), "bfloat16", SimpleNamespace(handle=A), 0, 0), "__cuda_array_interface__"
    )


def test_the_call_has_the_arguments_of_attention():
    import inspect

    fields = set(AttentionCall.__dataclass_fields__) - {"numbers"}
    assert set(inspect.signature(attention).parameters) == fields | {"softmax_scale", "softcap", "dropout_p"}
