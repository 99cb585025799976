"""Shape and addresses -> packed argument buffer -> launch. The only file that uses private names of the DSL.

The compiled host code takes one array of addresses: of each argument's storage, and of an int32 for its cudaError_t.
Each thread keeps one such buffer per kernel and rewrites it in place, what changed and no more, because the DSL's own
argument objects cost 20 to 40 us of host time per launch against 1. The buffer may be reused at once: a launch copies
its arguments. Where the DSL lacks one of its private names, the kernel does not load (CompileError).
"""

import ctypes
import threading
from typing import Any

from cuda.bindings.driver import CUstream

from ..contract.params import FlashAttentionParams
from ..contract.plain import plain
from ..planning.operations import Config, Launch, launch_of
from ..planning.problem import ProblemShape
from ..planning.splits import SplitPlan
from .arguments import addresses_of, layout_of
from .compiler import CompileError, dsl_version, get_kernel
from .cuda_driver import (
    CudaFailure,
    NotWarmedUp,
    UnsupportedDevice,
    capture_rules_relaxed,
    check_runtime_error,
    context_id,
    current_device,
    device_made_current,
    initialise_driver,
    is_capturing,
    is_current,
    num_sms,
    resolve_stream,
    shared_context,
    stream_id,
)
from .scratch import Memory, Workspace, contexts

__all__ = [
    "Call",
    "CudaFailure",
    "NotWarmedUp",
    "UnsupportedDevice",
    "addresses_of",
    "ensure_loaded",
    "launch",
    "launch_all",
    "launch_through",
    "prepare_workspace",
    "require_loaded",
    "resolve_stream",
]

NO_CONTEXT = NO_STREAM = -1
PRIVATE_NAMES = ("_get_cuda_init_and_load", "capi_func")

_kernels: dict[Config, "Kernel"] = {}


def launch(step: Launch, shape: ProblemShape, addresses: tuple[int, ...], stream=None) -> "Call":
    """Enqueue one launch on a stream; allocates no device memory, waits for nothing.

    addresses   as `addresses_of` has them; stream is what `resolve_stream` takes
    The stream's device is made current for the launch if it is not. The first use of a config on a device compiles and
    loads its kernel. Returns what can repeat the launch. Raises CudaFailure, UnsupportedDevice, NotWarmedUp,
    compiler.CompileError.
    """
    handle = resolve_stream(stream)
    buffers = _thread.with_optionals if shape.optionals else _thread.buffers
    call = Call(buffers.get(step.config) or _new_buffer(step.config, handle, buffers), step, shape)
    call.launch(addresses, handle)
    return call


def launch_all(steps: tuple[Launch, ...], shape: ProblemShape, addresses: tuple[int, ...], stream=None):
    """`launch` of one after the other; returns what can repeat them all."""
    if len(steps) > 1:
        require_loaded(steps, stream)
    calls = tuple([launch(step, shape, addresses, stream) for step in steps])
    return calls[0] if len(calls) == 1 else Calls(calls)


def launch_through(params: FlashAttentionParams, cfg: Config, stream=None) -> "Call":
    """`launch` of valid params through a config of one's choice."""
    p = plain(params)
    shape = ProblemShape.of(p)
    return launch(launch_of(cfg, shape), shape, addresses_of(p), stream)


def ensure_loaded(cfg: Config, stream=None) -> None:
    """Compile and load a kernel where this stream's work runs, so that no launch there has to.

    Raises what `launch` raises, except NotWarmedUp.
    """
    initialise_driver()
    with device_made_current(resolve_stream(stream)) as device:
        _kernel(cfg).load(device)


def require_loaded(steps, stream=None) -> None:
    """Load the kernels of launches that belong together, so that none of them is enqueued if one cannot be.

    Raises what `launch` raises.
    """
    initialise_driver()
    handle = resolve_stream(stream)
    with device_made_current(handle) as device:
        for step in steps:
            _kernel(step.config).load(device, handle)


def prepare_workspace(step: Launch, shape: ProblemShape, stream=None) -> None:
    """Make the scratch memory that `launch` would need on this stream, which `ensure_loaded` knows."""
    if step.scratch in ("splits", "append") and not shape.workspace:
        handle = resolve_stream(stream)
        with device_made_current(handle):
            identity = 0 if is_capturing(handle) else stream_id(handle)
            contexts.memory().workspace(handle, step.plan.partial_bytes, step.plan.num_arrivals, identity)


class Kernel:
    """One kernel, and where it is loaded; shared by all threads.

    num_sms    {id of a context that it can be launched in: number of SMs there}
    devices    of these contexts
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.lock = threading.Lock()
        self.num_sms: dict[int, int] = {}
        self.devices: set[int] = set()
        self.compiled: Any = None
        self.library: ctypes.c_void_p | None = None
        self.num_gone = 0  # contexts, when the library was loaded

    def load(self, device: int, stream: int | None = None) -> int:
        """Load for the current context, which is the device's, and return its number of SMs; with it comes the
        context's memory.

        NotWarmedUp if that is needed while `stream` is capturing.
        """
        context = context_id()
        if context not in self.num_sms:
            with self.lock:
                self._load(context, device, stream)
        return self.num_sms[context]

    def _load(self, context: int, device: int, stream: int | None) -> None:
        if context in self.num_sms:
            return
        sms = num_sms(device)  # before anything is compiled: raises if the kernels cannot run there
        if stream is not None and is_capturing(stream):
            raise NotWarmedUp(
                f"{self.cfg.name} is not loaded on device {device} and the stream is capturing a "
                "CUDA graph: call warmup() before the capture"
            )
        self.compiled = self.compiled or get_kernel(self.cfg)
        self.require_private_names()
        with capture_rules_relaxed():  # other threads may be capturing
            contexts.memory()
            self._load_code(device)
        self.num_sms[context] = sms

    def require_private_names(self) -> None:
        """CompileError if the DSL's compiled function lacks one."""
        missing = [name for name in PRIVATE_NAMES if not hasattr(self.compiled, name)]
        if missing:
            raise CompileError(
                f"{self.cfg.name} cannot be launched: what nvidia-cutlass-dsl {dsl_version()} compiles "
                f"has no {', '.join(missing)}"
            )

    def _load_code(self, device: int) -> None:
        # The DSL's own `to()` loads on every device of the machine, and fails if one of them is not a Hopper GPU.
        initialise, load = self.compiled._get_cuda_init_and_load()
        error = ctypes.c_int32()
        wanted = {device} - self.devices
        if self.library is None or self.num_gone != contexts.num_gone:
            # A reset of a device takes its libraries along, and the compiled code knows one for all devices.
            library = ctypes.c_void_p()
            initialise(_addresses(ctypes.c_void_p(ctypes.addressof(library)), error))
            check_runtime_error(error.value, f"loading {self.cfg.name}")
            self.library, self.num_gone = library, contexts.num_gone
            wanted = {device} | self.devices
            self.devices = set()
        place = ctypes.c_void_p(ctypes.addressof(self.library))
        for each in wanted:
            load(_addresses(place, ctypes.c_int32(each), error))
            check_runtime_error(error.value, f"loading {self.cfg.name} on device {each}")
            self.devices.add(each)


class Buffer:
    """One thread's argument buffer of one kernel; `filled_by` is the call whose shape lies in it."""

    def __init__(self, cfg: Config, kernel: Kernel, has_optionals: bool):
        self.cfg, self.kernel = cfg, kernel
        self.layout = layout_of(cfg.entry, cfg.has_descales, has_optionals)
        self.run = kernel.compiled.capi_func
        self.filled_by: Call | None = None
        offsets = self.layout.offsets
        self.memory = (ctypes.c_uint64 * (offsets[-1] // 8 + 1))()
        self.error = ctypes.c_int32.from_buffer(self.memory, offsets[-1])
        self.pack = self.layout.per_call_struct.pack_into
        start = self.layout.per_shape_offset
        self.per_shape = memoryview(self.memory).cast("B")[start : start + self.layout.per_shape_struct.size]
        base = ctypes.addressof(self.memory)
        self.addresses = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self.argument = ctypes.addressof(self.addresses)


class Call:
    """One thread's way to launch one kernel with one shape, again and again."""

    __slots__ = "buffer", "step", "shape", "packed", "context", "stream", "scratch"

    def __init__(self, buffer: Buffer, step: Launch, shape: ProblemShape):
        self.buffer, self.step, self.shape = buffer, step, shape
        self.packed = b""
        self.context, self.stream = NO_CONTEXT, NO_STREAM
        self.scratch: Any = None

    def launch(self, addresses: tuple[int, ...], handle: int) -> None:
        """Launch on a stream, wherever it is."""
        if shared_context(handle):
            self._launch(addresses, handle)
        else:
            with device_made_current(handle):
                self._launch(addresses, handle)

    def _launch(self, addresses: tuple[int, ...], handle: int) -> None:
        """The stream is one of the current context."""
        context = context_id()
        if context != self.context:
            kernel = self.buffer.kernel
            sms = kernel.num_sms.get(context) or kernel.load(current_device(), handle)
            self.packed = self.buffer.layout.pack(self.shape, self.step.counts(sms))
            self.buffer.filled_by = None
            self.context = context
        self.stream = NO_STREAM  # until this launch has gone well, there is nothing to repeat
        self.scratch = SCRATCH[self.step.scratch](contexts.memories[context], handle, self.step.plan, self.shape)
        self.enqueue((*addresses, *self.scratch.addresses(), handle))
        self.stream = handle

    def repeat(self, addresses: tuple[int, ...], handle: int) -> bool:
        """Launch again with other addresses; False, and nothing done, if in between another context became current, or
        the stream is another one."""
        if handle != self.stream or not is_current(self.context):
            return False
        try:
            self.enqueue((*addresses, *self.scratch.addresses(), handle))
        except CudaFailure:  # the handle may by now be that of a stream elsewhere: `launch` looks, and tells
            return False
        return True

    def enqueue(self, values: tuple) -> None:
        """Launch with the values of per_call."""
        buffer = self.buffer
        if buffer.filled_by is not self:
            buffer.per_shape[:] = self.packed
            buffer.filled_by = self
        buffer.pack(buffer.memory, 0, *values)
        buffer.run(buffer.argument)
        if buffer.error.value:
            check_runtime_error(buffer.error.value, f"launching {buffer.cfg.name}")


class Calls:
    """Several of them, one after the other."""

    __slots__ = ("calls",)

    def __init__(self, calls: tuple[Call, ...]):
        self.calls = calls

    def launch(self, addresses: tuple[int, ...], handle: int) -> None:
        """As Call.launch, all of them."""
        for call in self.calls:
            call.launch(addresses, handle)

    def repeat(self, addresses: tuple[int, ...], handle: int) -> bool:
        """As Call.repeat; once the first is launched, the others are."""
        first, *others = self.calls
        if not first.repeat(addresses, handle):
            return False
        for call in others:
            if not call.repeat(addresses, handle):
                call.launch(addresses, handle)
        return True


class Nothing:
    """Of a kernel whose entry takes none."""

    def __init__(self, *_):
        pass

    def addresses(self) -> tuple[()]:
        """None."""
        return ()


class NoScratch:
    """Of a launch that needs none, though the entry takes some."""

    def __init__(self, memory: Memory, stream: int, plan: SplitPlan, shape: ProblemShape):
        pass

    def addresses(self) -> tuple[int, int]:
        """partials, arrivals."""
        return 0, 0


class TileCounter:
    """The caller's, or the stream's tile counter; for a launch that goes into a CUDA graph one of its own."""

    def __init__(self, memory: Memory, stream: int, plan: None, shape: ProblemShape):
        self.memory, self.stream, self.handle = memory, stream, CUstream(stream)
        self.given, self.address, self.identity = shape.tile_counter, 0, NO_STREAM

    def addresses(self) -> tuple[int]:
        """tile_counter."""
        if self.given:
            return (self.given,)
        if is_capturing(self.handle):
            return (self.memory.captured(self.stream, 1),)
        identity = stream_id(self.stream, self.handle)
        if identity != self.identity:
            self.address, self.identity = self.memory.tile_counter(self.stream, identity), identity
        return (self.address,)


class SplitScratch:
    """The stream's workspace and arrival counts, or the caller's; a launch that goes into a CUDA graph gets arrival
    counts of its own."""

    def __init__(self, memory: Memory, stream: int, plan: SplitPlan, shape: ProblemShape):
        self.memory, self.stream, self.handle, self.plan = memory, stream, CUstream(stream), plan
        self.partials, self.arrivals = shape.workspace, shape.tile_counter
        self.own: Any = None  # what a launch needs of the stream's that is not captured
        self.identity = NO_STREAM

    def addresses(self) -> tuple[int, int]:
        """partials, arrivals."""
        if is_capturing(self.handle):
            return self.captured()
        identity = stream_id(self.stream, self.handle)
        if identity != self.identity:
            self.own = self.workspace(0 if self.arrivals else self.plan.num_arrivals, identity)
            self.identity = identity
        return self.partials or self.own.partials, self.arrivals or self.own.arrivals

    def captured(self) -> tuple[int, int]:
        """Those of a launch that goes into a graph."""
        partials = self.partials
        if not partials:
            workspace = self.workspace(0)
            workspace.is_captured = True
            partials = workspace.partials
        return partials, self.arrivals or self.memory.captured(self.stream, self.plan.num_arrivals)

    def workspace(self, num_arrivals: int, identity: int = 0) -> Workspace:
        """The library's of this stream."""
        nbytes = 0 if self.partials else self.plan.partial_bytes
        return self.memory.workspace(self.stream, nbytes, num_arrivals, identity)


# By Launch.scratch.
SCRATCH = {"nothing": Nothing, "none": NoScratch, "tile_counter": TileCounter, "splits": SplitScratch}


class _Thread(threading.local):
    def __init__(self):
        self.buffers: dict[Config, Buffer] = {}
        self.with_optionals: dict[Config, Buffer] = {}  # of calls that have pointers that few have


_thread = _Thread()


def _new_buffer(cfg: Config, stream: int, buffers: dict[Config, Buffer]) -> Buffer:
    initialise_driver()
    kernel = _kernel(cfg)
    with device_made_current(stream) as device:
        kernel.load(device, stream)
    buffer = buffers[cfg] = Buffer(cfg, kernel, buffers is _thread.with_optionals)
    return buffer


def _kernel(cfg: Config) -> Kernel:
    return _kernels.setdefault(cfg, Kernel(cfg))


def _addresses(*arguments) -> ctypes.Array:
    return (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
