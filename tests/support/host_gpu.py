"""A GPU of parallel/gpu.py where there is none: its memory is the host's, its kernels are the references over it."""

import ctypes
from types import SimpleNamespace

import numpy as np
from host_memory import NAMES, NUMPY, HostMemory, array

from fa3_cute.contract.merge import plain_merge, walk
from fa3_cute.contract.merge_reference import merge_reference
from fa3_cute.contract.reference import to_bits
from fa3_cute.contract.status import Status

ALIGNMENT = 256


class Memory:
    """Bytes of the host as a buffer; NaN in every format, as nothing has been written."""

    def __init__(self, nbytes: int):
        self.bytes = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)
        self.handle = self.bytes.ctypes.data + -self.bytes.ctypes.data % ALIGNMENT
        self.size = nbytes


class Window:
    """The bytes at an address, as Buffer.from_handle makes them."""

    def __init__(self, address: int, nbytes: int):
        self.handle, self.size = address, nbytes

    @staticmethod
    def from_handle(address: int, nbytes: int, owner) -> "Window":
        assert owner is not None
        return Window(address, nbytes)


def upload(array, target=None, *, stream):
    values = np.ascontiguousarray(array)
    target = Memory(values.nbytes) if target is None else target
    assert target.size == values.nbytes
    ctypes.memmove(target.handle, values.ctypes.data, values.nbytes)
    return target


def download(buffer, shape, dtype, *, stream) -> np.ndarray:
    array = np.empty(shape, dtype)
    assert array.nbytes <= buffer.size
    ctypes.memmove(array.ctypes.data, buffer.handle, array.nbytes)
    return array


def memset_32(address: int, value: int, count: int, stream):
    np.frombuffer((ctypes.c_uint32 * count).from_address(address), np.uint32)[:] = value
    return (0,)


DRIVER = SimpleNamespace(
    cuMemcpyDtoDAsync=lambda target, source, nbytes, stream: (0, ctypes.memmove(target, source, nbytes))[:1],
    cuMemsetD8Async=lambda address, value, count, stream: (0, ctypes.memset(address, value, count))[:1],
    cuMemsetD32Async=memset_32,
)


class Stream:
    """What is enqueued is done at once; a millisecond passes from one event to the next."""

    handle, now = 1, 0.0

    def wait(self, other): ...

    def sync(self): ...

    def record(self, event=None):
        Stream.now += 1
        if event is not None:
            event.at = Stream.now


class Event(SimpleNamespace):
    def __sub__(self, other) -> float:
        return self.at - other.at

    def sync(self): ...


DEVICE = SimpleNamespace(
    name="NVIDIA Nothing", create_stream=lambda options=None: Stream(), create_event=lambda options: Event()
)


class Kernels(HostMemory):
    """Whose forward leaves the LSE of rows that no sequence uses as it is, as the kernels do."""

    def forward(self, params, stream):
        lse = np.empty(0, np.float32)
        if params.softmax_lse:
            count = params.num_heads * (params.total_q or params.batch_size * params.seqlen_q)
            lse = np.frombuffer((ctypes.c_float * count).from_address(params.softmax_lse), np.float32)
        before = lse.copy()
        status = super().forward(params, stream)
        lse[np.isnan(lse)] = before[np.isnan(lse)]
        return status

    def merge_attention(self, params, stream):
        """With strides of what is written and its own type."""
        assert not list(walk(plain_merge(params)))
        p, rows = params, (params.seqlen_q, params.num_heads, params.head_dim)
        out_type = p.dtype if p.out_dtype is None else p.out_dtype

        def tensor(name: str, dtype) -> np.ndarray:
            strides = getattr(p, f"{name}_row_stride"), getattr(p, f"{name}_head_stride"), 1
            return array(getattr(p, name), rows, NUMPY[dtype], strides)

        def lse(name: str) -> np.ndarray:
            strides = getattr(p, f"{name}_head_stride"), getattr(p, f"{name}_row_stride")
            return array(getattr(p, name), rows[1::-1], np.float32, strides)

        parts = [(tensor(f"out_{x}", p.dtype).copy(), lse(f"lse_{x}").copy()) for x in "ab"]
        out, merged = merge_reference(*parts[0], *parts[1])
        tensor("out", out_type)[...] = to_bits(out, NAMES[out_type])
        if p.lse:
            lse("lse")[...] = merged
        return Status.OK


def install(monkeypatch) -> Kernels:
    """In parallel/gpu.py, until the test ends."""
    from parallel import gpu

    found = Kernels()
    doubles = {name: getattr(found, name) for name in ("forward", "backward", "merge_attention")}
    doubles |= {"open_device": lambda ordinal: DEVICE, "allocate": lambda nbytes, stream: Memory(nbytes)}
    doubles |= {"upload": upload, "download": download, "driver": DRIVER, "Buffer": Window}
    for name, double in doubles.items():
        monkeypatch.setattr(gpu, name, double)
    return found
