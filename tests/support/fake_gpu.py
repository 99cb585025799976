"""A GPU for the benchmark's tests: buffers are NumPy bytes, the forward is the reference, time is what launches add."""

from math import prod
from types import SimpleNamespace

import numpy as np

from fa3_cute import AttentionMode, DataType
from fa3_cute.cli import bench, measure
from fa3_cute.cli import case as case_module
from fa3_cute.cli.measure import Stopwatch
from fa3_cute.contract.reference import attention_reference, to_bits
from fa3_cute.contract.status import Status

COPY_MS = 2.0
OFFSET_BITS = 32  # of an address; above them is the number of its buffer


class FakeStream:
    """A stream whose events read a clock that launches move: `now` in milliseconds."""

    handle = 1
    now = 0.0
    is_capturing = False

    def create_graph_builder(self):
        return FakeBuilder(self)

    def record(self, event):
        event.at = self.now

    def sync(self):
        pass


class FakeBuilder:
    """A graph whose every replay takes a millisecond."""

    def __init__(self, stream):
        self.stream = stream

    def begin_building(self):
        self.stream.is_capturing = True
        return self

    def end_building(self):
        self.stream.is_capturing = False

    def complete(self):
        return self

    def launch(self, stream):
        stream.now += 1.0


class FakeEvent:
    """An event that is always done and holds the time at which it was recorded."""

    is_done = True

    def __sub__(self, other):
        return self.at - other.at


class FakeBuffer:
    """Device memory; `handle` is its address. A window of it shares the bytes."""

    def __init__(self, stream, handle, memory):
        self.stream, self.handle, self.bytes = stream, handle, memory

    def copy_from(self, other, stream):
        self.bytes[:] = other.bytes
        self.stream.now += COPY_MS


class FakeGpu:
    """The device functions that the benchmark calls. A forward takes `milliseconds`; `captured_k` are the addresses of
    K of the calls that were captured into graphs."""

    def __init__(self):
        self.stream, self.buffers, self.milliseconds, self.captured_k = FakeStream(), [], 10, []

    def allocate(self, nbytes, stream=None):
        handle = len(self.buffers) << OFFSET_BITS
        self.buffers.append(FakeBuffer(self.stream, handle, np.zeros(nbytes, np.uint8)))
        return self.buffers[-1]

    def window_of(self, buffer, offset, nbytes):
        return FakeBuffer(self.stream, buffer.handle + offset, buffer.bytes[offset : offset + nbytes])

    def upload(self, array, target=None, stream=None):
        target = self.allocate(array.nbytes) if target is None else target
        target.bytes[:] = array.reshape(-1).view(np.uint8)
        return target

    def download(self, buffer, shape, dtype, stream=None):
        return buffer.bytes[: prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def read(self, pointer, shape, dtype=np.uint16):
        """The array at an address."""
        offset = pointer & (1 << OFFSET_BITS) - 1
        whole = self.buffers[pointer >> OFFSET_BITS]
        return self.download(self.window_of(whole, offset, whole.bytes.size - offset), shape, dtype)

    def packing_of(self, p):
        """Where the sequences of a call lie: options of the reference; the first dimensions of q, of k and v."""
        if p.mode != AttentionMode.VARLEN_PREFILL:
            return {}, ((p.batch_size, p.seqlen_q), (p.batch_size, p.seqlen_k))
        shapes = {"cu_seqlens_q": (p.batch_size + 1,), "cu_seqlens_k": (p.batch_size + 1,)}
        keys = (p.total_k,)
        if p.page_table:
            table = p.batch_size, p.seqlen_k // p.page_size
            shapes = {"cu_seqlens_q": (p.batch_size + 1,), "seqused_k": (p.batch_size,), "page_table": table}
            keys = p.num_pages, p.page_size
        return {name: self.read(getattr(p, name), shape, np.int32) for name, shape in shapes.items()}, (
            (p.total_q,),
            keys,
        )

    def options_of(self, p):
        """What else a call asks of the reference."""
        return {}

    def forward(self, p, stream):
        self.stream.now += self.milliseconds
        if self.stream.is_capturing:
            self.captured_k.append(p.k)
        out_bytes = self.buffers[p.out >> OFFSET_BITS].bytes
        if (out_bytes != 0xFF).any():  # not poisoned since the last call: computed already
            return Status.OK
        packing, rows = self.packing_of(p)
        q_shape, kv_shape = (*rows[0], p.num_heads, p.head_dim), (*rows[1], p.num_heads_k, p.head_dim)
        q = self.read(p.q, q_shape, stored(p.dtype))
        k, v = (self.read(pointer, kv_shape, stored(p.kv_dtype or p.dtype)) for pointer in (p.k, p.v))
        options = packing | {"causal": p.is_causal, "window_size": (p.window_size_left, p.window_size_right)}
        exact, _ = attention_reference(q, k, v, **options, **self.options_of(p))
        out = to_bits(exact, "bf16").reshape(-1)
        out_bytes[: out.nbytes] = out.view(np.uint8)
        return Status.OK


def stored(dtype: DataType) -> type:
    """What arrays hold of it: bits."""
    return np.uint8 if dtype is DataType.FP8_E4M3 else np.uint16


def install(monkeypatch) -> FakeGpu:
    """Makes the benchmark run on a new fake GPU."""
    gpu = FakeGpu()
    device = SimpleNamespace(
        name="fake",
        properties=SimpleNamespace(multiprocessor_count=132),
        pci_bus_id="",
        create_stream=lambda: gpu.stream,
        create_event=lambda options: FakeEvent(),
    )
    monkeypatch.setattr(bench, "hopper_device_problem", lambda: None)
    monkeypatch.setattr(bench, "open_device", lambda: device)
    monkeypatch.setattr(bench, "forward", lambda params, stream: gpu.forward(params, stream))
    monkeypatch.setattr(Stopwatch.host_microseconds, "__defaults__", (2, 1))
    fakes = {
        "address": lambda buffer, offset=0: buffer.handle + offset,
        "window_of": gpu.window_of,
        "allocate": gpu.allocate,
        "upload": gpu.upload,
        "download": gpu.download,
        "fill": lambda buffer, byte, stream: buffer.bytes.fill(byte),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(case_module, name, fake)
    return gpu


def fake_stopwatch(stream, monkeypatch) -> Stopwatch:
    """A stopwatch on that stream, with a clock of 1500 MHz."""
    monkeypatch.setattr(measure, "Monitor", lambda device: SimpleNamespace(problem=None, sample=lambda: (1500, 600.0)))
    return Stopwatch(SimpleNamespace(create_event=lambda options: FakeEvent()), stream)
