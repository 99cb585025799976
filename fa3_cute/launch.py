"""params -> packed argument buffer -> launch. The only file that uses private names of the DSL.

The compiled host code takes one array of addresses: of each argument's storage, and of an int32 for its cudaError_t.
Each thread keeps one such buffer per kernel and rewrites it in place, what changed and no more, because the DSL's own
argument objects cost 20 to 40 us of host time per launch against 1. The buffer may be reused at once: a launch copies
its arguments. Where the DSL lacks a name of PRIVATE_NAMES, its objects must do (`launch_path`).
"""
import ctypes
import math
import struct
import threading
from operator import attrgetter
from typing import Any

from .compiler import get_kernel, typed_arguments
from .config import FORWARD_ARGUMENTS, UNBOUNDED_WINDOW, FwdConfig
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
from .params import address, are_constants
from .workspace import TileCounters

__all__ = ["CudaFailure", "NotWarmedUp", "UnsupportedDevice", "ensure_loaded", "launch", "launch_path",
           "resolve_stream"]

PRIVATE_NAMES = ("_get_cuda_init_and_load", "capi_func")

STRUCT_CODES = {"pointer": "Q", "int64": "q", "int32": "i", "float32": "f", "stream": "Q"}

# The order of the arguments in the buffer: those that change with every call, then those that change with the shape.
# The addresses of lengths count among these: all layers of a model share them.
PER_CALL = ["q", "k", "v", "out", "softmax_lse", "tile_counter", "stream"]
PER_SHAPE = [name for name, _ in FORWARD_ARGUMENTS if name not in PER_CALL]
CODES = {name: STRUCT_CODES[kind] for name, kind in FORWARD_ARGUMENTS}
PER_CALL_STRUCT = struct.Struct("".join(CODES[name] for name in PER_CALL))
PER_SHAPE_STRUCT = struct.Struct("".join(CODES[name] for name in PER_SHAPE))
PER_SHAPE_OFFSET = PER_CALL_STRUCT.size
ERROR_OFFSET = PER_SHAPE_OFFSET + -(-PER_SHAPE_STRUCT.size // 8) * 8

# What is read from params, in that order; num_sms is the device's, tile_counter the stream's, and of the last three
# come rows and defaults.
read_params = attrgetter(*(name for name in PER_CALL + PER_SHAPE if name not in ("num_sms", "stream", "tile_counter")),
                         "head_dim", "total_q", "total_k")
NO_STRIDES = (None,) * 12

_lock = threading.Lock()                      # loading is not thread-safe
_kernels: dict[FwdConfig, "Kernel"] = {}
_counters: dict[int, TileCounters] = {}       # by context


def launch(params, cfg: FwdConfig, stream=None) -> "Call":
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


def ensure_loaded(cfg: FwdConfig, stream=None) -> None:
    """Compile and load a kernel where this stream's work runs, so that no launch there has to.

    Raises what `launch` raises, except NotWarmedUp.
    """
    initialise_driver()
    with device_made_current(resolve_stream(stream)) as device:
        _kernel(cfg).load(device)


def launch_path(cfg: FwdConfig) -> str:
    """How launches of this config travel: "packed", or "objects" with the names that the DSL lacks."""
    missing = _missing_names(get_kernel(cfg))
    return f"objects: the DSL has no {', '.join(missing)}" if missing else "packed"


class Kernel:
    """One kernel and the devices it is loaded on; shared by all threads.

    num_sms  {device: its number of SMs}, for the devices that the kernel is loaded on
    """

    def __init__(self, cfg: FwdConfig):
        self.cfg = cfg
        self.num_sms: dict[int, int] = {}
        self.compiled: Any = None
        self.library: ctypes.c_void_p | None = None

    def load(self, device: int, stream: int | None = None) -> int:
        """Load on a device, which is current, and return its number of SMs; with it come the context's tile counters.

        NotWarmedUp if that is needed while `stream` is capturing.
        """
        with _lock:
            context = current_context()
            if device not in self.num_sms or context not in _counters:
                sms = num_sms(device)
                if stream is not None and is_capturing(stream):
                    raise NotWarmedUp(f"{self.cfg.name} is not loaded on device {device} and the stream is capturing a "
                                      "CUDA graph: call warmup() before the capture")
                self.compiled = self.compiled or get_kernel(self.cfg)
                if device not in self.num_sms and not _missing_names(self.compiled):
                    self._load_code(device)
                if context not in _counters:
                    _counters[context] = TileCounters()
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

    def __init__(self, cfg: FwdConfig, kernel: Kernel):
        self.cfg, self.kernel = cfg, kernel
        self.shape: list | None = None
        self.context = self.stream = self.counter = 0

    def launch(self, params, stream: int, context: int) -> None:
        """Launch with the values of params; `context` is the current one and the stream's."""
        q, k, v, out, lse, *shape = read_params(params)
        if shape != self.shape or context != self.context:
            self.set_shape(resolve_shape(self.kernel.load(current_device(), stream), *shape))
            self.shape, self.context = shape if are_constants(shape) else None, context
        self.stream, self.counter = stream, _counters[context].of_stream(stream)
        self.enqueue((q, k, v, out, lse or 0, self.counter_for_launch(), stream))

    def repeat(self, shape: list, pointers: tuple, stream) -> bool:
        """Launch again with other addresses (int, in the order of PER_CALL); False, and nothing done, if in between
        the shape has changed or another context became current, or the stream is another one."""
        handle = stream if type(stream) is int else resolve_stream(stream)
        if self.shape is not shape or handle != self.stream or not is_current(self.context):
            return False
        try:
            self.enqueue((*pointers, self.counter_for_launch(), handle))
        except CudaFailure:     # the handle may by now be that of a stream elsewhere: `launch` looks, and tells
            return False
        return True

    def counter_for_launch(self) -> int:
        """The stream's tile counter; for a launch that goes into a CUDA graph one of its own."""
        return _counters[self.context].take() if is_capturing(self.stream) else self.counter


class PackedCall(Call):
    """Launches through an argument buffer."""

    def __init__(self, cfg: FwdConfig, kernel: Kernel):
        super().__init__(cfg, kernel)
        self.run = kernel.compiled.capi_func
        self.buffer = (ctypes.c_uint64 * (ERROR_OFFSET // 8 + 1))()
        self.error = ctypes.c_int32.from_buffer(self.buffer, ERROR_OFFSET)
        offsets = storage_offsets()
        base = ctypes.addressof(self.buffer)
        self.addresses = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self.argument = ctypes.addressof(self.addresses)

    def set_shape(self, values) -> None:
        """Take the values of PER_SHAPE for this and the following calls."""
        PER_SHAPE_STRUCT.pack_into(self.buffer, PER_SHAPE_OFFSET, *values)

    def enqueue(self, values: tuple) -> None:
        """Launch with the values of PER_CALL."""
        try:
            PER_CALL_STRUCT.pack_into(self.buffer, 0, *values)
        except struct.error:                  # a pointer that has __int__ only
            PER_CALL_STRUCT.pack_into(self.buffer, 0, *map(int, values))
        self.run(self.argument)
        if self.error.value:
            check_runtime_error(self.error.value, f"launching {self.cfg.name}")


class ObjectCall(Call):
    """Launches through the DSL's argument objects: slower, with public names only."""

    def set_shape(self, values) -> None:
        """Take the values of PER_SHAPE for this and the following calls."""
        self.values = dict(zip(PER_SHAPE, values, strict=True))

    def enqueue(self, values: tuple) -> None:
        """Launch with the values of PER_CALL."""
        named = self.values | dict(zip(PER_CALL, map(int, values), strict=True))
        arguments = typed_arguments(self.cfg, [named[name] for name, _ in FORWARD_ARGUMENTS])
        try:
            self.kernel.compiled(*arguments)
        except Exception as error:            # the DSL's own kind
            code = getattr(error, "_error_code", -1)
            raise CudaFailure(code, type(error).__name__, str(error), f"launching {self.cfg.name}") from error


class _Thread(threading.local):
    def __init__(self):
        self.calls: dict[int, Call] = {}      # by id(cfg): hashing a config costs as much as packing its arguments


_thread = _Thread()


def _new_call(cfg: FwdConfig, stream: int) -> Call:
    initialise_driver()
    kernel = _kernel(cfg)
    with device_made_current(stream) as device:
        kernel.load(device, stream)
    call = _thread.calls[id(cfg)] = (ObjectCall if _missing_names(kernel.compiled) else PackedCall)(cfg, kernel)
    return call


def resolve_shape(num_sms: int, *shape) -> tuple:
    """The values of PER_SHAPE: those of params (`read_params` after the tensors), with defaults where they are None.

    The stride of a dimension of size 1 never addresses memory and array libraries put anything there, but TMA wants a
    multiple of 16 bytes: the kernel gets the contiguous one. Packed tensors have one batch, and 0 for its stride.
    """
    lengths, strides = tuple(map(address, shape[:4])), shape[4:16]
    batch, rows_q, rows_k, heads, heads_k, left, right, scale, head_dim, total_q, total_k = shape[16:]
    row_q, row_k = heads * head_dim, heads_k * head_dim
    if lengths[0]:
        batches, rows_q, rows_k, batch_q, batch_k = 1, total_q, total_k, 0, 0
    else:
        batches, batch_q, batch_k = batch, rows_q * row_q, rows_k * row_k
    q, k = (batch_q, row_q, head_dim), (batch_k, row_k, head_dim)
    contiguous = q + k + k + q
    if strides == NO_STRIDES:
        strides = contiguous
    else:
        sizes_q, sizes_k = (batches, rows_q, heads), (batches, rows_k, heads_k)
        sizes = sizes_q + sizes_k + sizes_k + sizes_q
        strides = [default if stride is None or size == 1 else stride
                   for stride, default, size in zip(strides, contiguous, sizes, strict=True)]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return (*lengths, *strides, batch, rows_q, rows_k, heads, heads_k, _reach(left), _reach(right), num_sms, scale)


def _reach(window_size: int) -> int:
    return window_size if 0 <= window_size < UNBOUNDED_WINDOW else UNBOUNDED_WINDOW


def storage_offsets() -> list[int]:
    """Where in the buffer each argument of FORWARD_ARGUMENTS lies, and last the cudaError_t."""
    places = {}
    for names, start in ((PER_CALL, 0), (PER_SHAPE, PER_SHAPE_OFFSET)):
        codes = ""
        for name in names:
            codes += CODES[name]
            places[name] = start + struct.calcsize(codes) - struct.calcsize(CODES[name])
    return [places[name] for name, _ in FORWARD_ARGUMENTS] + [ERROR_OFFSET]


def _kernel(cfg: FwdConfig) -> Kernel:
    with _lock:
        return _kernels.setdefault(cfg, Kernel(cfg))


def _missing_names(compiled: Any) -> list[str]:
    return [name for name in PRIVATE_NAMES if not hasattr(compiled, name)]


def _addresses(*arguments) -> ctypes.Array:
    return (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
