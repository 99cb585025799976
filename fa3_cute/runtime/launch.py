"""params -> packed argument buffer -> launch. The only file that uses private names of the DSL.

The compiled host code takes one array of addresses: of each argument's storage, and of an int32 for its cudaError_t.
Each thread keeps one such buffer per kernel and rewrites it in place, what changed and no more, because the DSL's own
argument objects cost 20 to 40 us of host time per launch against 1. The buffer may be reused at once: a launch copies
its arguments. Where the DSL lacks a name of PRIVATE_NAMES, its objects must do (`launch_path`).
"""
import ctypes
import struct
import threading
from typing import Any

from .arguments import (
    layout_of,
    read_descale_strides,
    read_descales,
    read_params,
    resolve_decode,
    resolve_forward,
)
from .compiler import get_kernel, typed_arguments
from ..planning.config import DecodeConfig, FwdConfig
from .cuda_driver import (
    CudaFailure,
    NotWarmedUp,
    UnsupportedDevice,
    check_runtime_error,
    current_context,
    current_device,
    device_made_current,
    initialise_driver,
    is_capturing,
    is_current,
    num_sms,
    resolve_stream,
    shared_context,
)
from ..contract.params import address, are_constants
from ..planning.splits import SplitPlan
from .scratch import Memory, Workspace, stream_key

__all__ = ["CudaFailure", "NotWarmedUp", "UnsupportedDevice", "ensure_loaded", "launch", "launch_path",
           "prepare_workspace", "resolve_stream"]

Config = FwdConfig | DecodeConfig

NO_STREAM = -1
PRIVATE_NAMES = ("_get_cuda_init_and_load", "capi_func")

_lock = threading.Lock()                      # loading is not thread-safe
_kernels: dict[Config, "Kernel"] = {}
_memory: dict[int, Memory] = {}               # by context


def launch(params, cfg: Config, stream=None) -> "Call":
    """Enqueue one forward on a stream; allocates no device memory, waits for nothing.

    `params` has the attributes of FlashAttentionParams and is valid; `stream` is what `resolve_stream` takes. The
    stream's device is made current for the launch if it is not. The first use of a config on a device compiles and
    loads its kernel. Returns what can repeat the launch. Raises CudaFailure, UnsupportedDevice, NotWarmedUp,
    compiler.CompileError.
    """
    handle = stream if type(stream) is int else resolve_stream(stream)
    call = _thread.calls.get(id(cfg)) or _new_call(cfg, handle)
    if context := shared_context(handle):
        call.launch(params, handle, context)
    else:
        with device_made_current(handle):
            call.launch(params, handle, shared_context(handle))
    return call


def ensure_loaded(cfg: Config, stream=None) -> None:
    """Compile and load a kernel where this stream's work runs, so that no launch there has to.

    Raises what `launch` raises, except NotWarmedUp.
    """
    initialise_driver()
    with device_made_current(resolve_stream(stream)) as device:
        _kernel(cfg).load(device)


def prepare_workspace(params, cfg: DecodeConfig, stream=None) -> None:
    """Make the scratch memory that `launch` would need on this stream, which `ensure_loaded` knows, and a spare one."""
    _, _, _, _, _, *shape = read_params(params)
    _, plan = resolve_decode(cfg, *shape)
    if plan.partial_bytes and not address(params.workspace):
        handle = resolve_stream(stream)
        with device_made_current(handle):
            _memory[current_context()].workspaces.prepare(
                stream_key(handle), handle, plan.partial_bytes, plan.num_arrivals)


def launch_path(cfg: Config) -> str:
    """How launches of this config travel: "packed", or "objects" with the names that the DSL lacks."""
    missing = _missing_names(get_kernel(cfg))
    return f"objects: the DSL has no {', '.join(missing)}" if missing else "packed"


class Kernel:
    """One kernel and the devices it is loaded on; shared by all threads.

    num_sms  {device: its number of SMs}, for the devices that the kernel is loaded on
    """

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.num_sms: dict[int, int] = {}
        self.compiled: Any = None
        self.library: ctypes.c_void_p | None = None

    def load(self, device: int, stream: int | None = None) -> int:
        """Load on a device, which is current, and return its number of SMs; with it comes the context's memory.

        NotWarmedUp if that is needed while `stream` is capturing.
        """
        with _lock:
            context = current_context()
            if device not in self.num_sms or context not in _memory:
                sms = num_sms(device)
                if stream is not None and is_capturing(stream):
                    raise NotWarmedUp(f"{self.cfg.name} is not loaded on device {device} and the stream is capturing a "
                                      "CUDA graph: call warmup() before the capture")
                self.compiled = self.compiled or get_kernel(self.cfg)
                if device not in self.num_sms and not _missing_names(self.compiled):
                    self._load_code(device)
                if context not in _memory:
                    _memory[context] = Memory()
                self.num_sms[device] = sms
            return self.num_sms[device]

    def _load_code(self, device: int) -> None:
        # The DSL's own `to()` loads on every device of the machine, and fails if one of them is not a Hopper GPU.
        initialise, load = self.compiled._get_cuda_init_and_load()
        library = self.library or ctypes.c_void_p()
        place, error = ctypes.c_void_p(ctypes.addressof(library)), ctypes.c_int32()
        if self.library is None:
            initialise(_addresses(place, error))
            check_runtime_error(error.value, f"loading {self.cfg.name}")
            self.library = library
        load(_addresses(place, ctypes.c_int32(device), error))
        check_runtime_error(error.value, f"loading {self.cfg.name} on device {device}")


class Call:
    """One thread's way to launch one kernel. It keeps `cfg` itself alive, whose id() finds it in the thread's table.

    Sizes, strides and scale seldom change from one call to the next: their defaults are resolved when they do.
    """

    def __init__(self, cfg: Config, kernel: Kernel):
        self.cfg, self.kernel, self.is_fp8 = cfg, kernel, cfg.is_fp8
        self.layout = layout_of(type(cfg), cfg.is_fp8)
        self.shape: list | None = None
        self.context, self.stream = 0, NO_STREAM
        self.scratch: Any = None

    def launch(self, params, stream: int, context: int) -> None:
        """Launch with the values of params; `context` is the current one and the stream's."""
        q, k, v, out, lse, *shape = read_params(params)
        descales = ()
        if self.is_fp8:
            descales = map(address, read_descales(params))
            shape += read_descale_strides(params)
        if shape != self.shape or context != self.context:
            self.set_shape(self.resolve(self.kernel.load(current_device(), stream), shape))
            self.shape, self.context = shape if are_constants(shape) else None, context
        self.stream = NO_STREAM       # until this launch has gone well, there is nothing to repeat
        self.scratch = self.new_scratch(_memory[context], stream, address(params.workspace))
        self.enqueue((q, k, v, out, lse or 0, *descales, *self.scratch.addresses(), stream))
        self.stream = stream

    def repeat(self, shape: list, pointers: tuple, stream) -> bool:
        """Launch again with other addresses (int, in the order of arguments.TENSORS; FP8: and DESCALE_POINTERS); False,
        and nothing done, if in between the shape has changed or another context became current, or the stream is
        another one."""
        handle = stream if type(stream) is int else resolve_stream(stream)
        if self.shape is not shape or handle != self.stream or not is_current(self.context):
            return False
        try:
            self.enqueue((*pointers, *self.scratch.addresses(), handle))
        except CudaFailure:     # the handle may by now be that of a stream elsewhere: `launch` looks, and tells
            return False
        return True

    def resolve(self, num_sms: int, shape: list) -> tuple:
        """The values of per_shape."""
        if isinstance(self.cfg, FwdConfig):
            return resolve_forward(num_sms, *shape)
        values, self.plan = resolve_decode(self.cfg, *shape)
        return values

    def new_scratch(self, memory: Memory, stream: int, workspace: int) -> "TileCounter | SplitScratch | NoScratch":
        """What the launches on a stream get of the context's memory, or of the caller's workspace."""
        if isinstance(self.cfg, FwdConfig):
            return TileCounter(memory, stream)
        return SplitScratch(memory, stream, self.plan, workspace) if self.plan.partial_bytes else NoScratch()


class NoScratch:
    """Of a launch that needs none."""

    def addresses(self) -> tuple[int, int]:
        """partials, arrivals."""
        return 0, 0


class TileCounter:
    """The stream's tile counter; for a launch that goes into a CUDA graph one of its own."""

    def __init__(self, memory: Memory, stream: int):
        self.counters, self.stream = memory.counters, stream
        self.address = memory.counters.of_stream(stream_key(stream))

    def addresses(self) -> tuple[int]:
        """tile_counter."""
        return (self.counters.take() if is_capturing(self.stream) else self.address,)


class SplitScratch:
    """The stream's workspace, or the caller's; a launch that goes into a CUDA graph gets arrival counts of its own."""

    def __init__(self, memory: Memory, stream: int, plan: SplitPlan, workspace: int):
        self.memory, self.stream, self.plan, self.given = memory, stream, plan, workspace
        self.own = None if workspace else self.own_workspace()

    def addresses(self) -> tuple[int, int]:
        """partials, arrivals."""
        if is_capturing(self.stream):
            arrivals = self.memory.counters.take(self.plan.num_arrivals)
        else:
            self.own = self.own or self.own_workspace()
            arrivals = self.own.arrivals
        return self.given or self.own.partials, arrivals

    def own_workspace(self) -> Workspace:
        """The library's of this stream."""
        return self.memory.workspaces.of_stream(stream_key(self.stream), self.stream,
                                                0 if self.given else self.plan.partial_bytes, self.plan.num_arrivals)


class PackedCall(Call):
    """Launches through an argument buffer."""

    def __init__(self, cfg: Config, kernel: Kernel):
        super().__init__(cfg, kernel)
        self.run = kernel.compiled.capi_func
        offsets = self.layout.offsets
        self.buffer = (ctypes.c_uint64 * (offsets[-1] // 8 + 1))()
        self.error = ctypes.c_int32.from_buffer(self.buffer, offsets[-1])
        self.pack = self.layout.per_call_struct.pack_into
        base = ctypes.addressof(self.buffer)
        self.addresses = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self.argument = ctypes.addressof(self.addresses)

    def set_shape(self, values) -> None:
        """Take the values of per_shape for this and the following calls."""
        self.layout.per_shape_struct.pack_into(self.buffer, self.layout.per_shape_offset, *values)

    def enqueue(self, values: tuple) -> None:
        """Launch with the values of per_call."""
        try:
            self.pack(self.buffer, 0, *values)
        except struct.error:                  # a pointer that has __int__ only
            self.pack(self.buffer, 0, *map(int, values))
        self.run(self.argument)
        if self.error.value:
            check_runtime_error(self.error.value, f"launching {self.cfg.name}")


class ObjectCall(Call):
    """Launches through the DSL's argument objects: slower, with public names only."""

    def set_shape(self, values) -> None:
        """Take the values of per_shape for this and the following calls."""
        self.values = dict.fromkeys(self.layout.absent, 0) | dict(zip(self.layout.per_shape, values, strict=True))

    def enqueue(self, values: tuple) -> None:
        """Launch with the values of per_call."""
        named = self.values | dict(zip(self.layout.per_call, map(int, values), strict=True))
        arguments = typed_arguments(self.cfg, [named[name] for name, _ in self.cfg.arguments])
        try:
            self.kernel.compiled(*arguments)
        except Exception as error:            # the DSL's own kind
            code = getattr(error, "_error_code", -1)
            raise CudaFailure(code, type(error).__name__, str(error), f"launching {self.cfg.name}") from error


class _Thread(threading.local):
    def __init__(self):
        self.calls: dict[int, Call] = {}      # by id(cfg): hashing a config costs as much as packing its arguments


_thread = _Thread()


def _new_call(cfg: Config, stream: int) -> Call:
    initialise_driver()
    kernel = _kernel(cfg)
    with device_made_current(stream) as device:
        kernel.load(device, stream)
    call = _thread.calls[id(cfg)] = (ObjectCall if _missing_names(kernel.compiled) else PackedCall)(cfg, kernel)
    return call


def _kernel(cfg: Config) -> Kernel:
    with _lock:
        return _kernels.setdefault(cfg, Kernel(cfg))


def _missing_names(compiled: Any) -> list[str]:
    return [name for name in PRIVATE_NAMES if not hasattr(compiled, name)]


def _addresses(*arguments) -> ctypes.Array:
    return (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
