"""Arrays of any library as addresses, shapes and strides, and device memory that any library can take over.

An array comes in through DLPack, or through `__cuda_array_interface__` (CAI) if it has no DLPack. Both order streams:
what its library has enqueued on the array's memory runs before what is enqueued on ours afterwards. Nothing waits on
the host for that, but a library may (JAX waits until the array is computed).

Capsules are read here because cuda.core's StridedMemoryView knows no FP8, and BF16 only with ml_dtypes installed; on
the way out it makes the capsules, and only the name of BF16 is put in here. A capsule that was read is not consumed:
when it is dropped, its producer takes the array back.
"""

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod

from cuda.bindings import driver

from ..runtime.cuda_driver import (
    capture_rules_relaxed,
    checked,
    current_context,
    device_made_current,
    initialise_driver,
    is_capturing,
    resolve_stream,
)
from ..contract.status import Status, error_for

LEGACY_STREAM, PER_THREAD_STREAM = 1, 2  # as both protocols count; 0 means the legacy one too, and is forbidden
DL_HOST, DL_CUDA, DL_PINNED, DL_MANAGED = 1, 2, 3, 13
DL_BFLOAT = 4
DL_KINDS = {
    0: "int",
    1: "uint",
    2: "float",
    DL_BFLOAT: "bfloat",
    5: "complex",
    6: "bool",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
}
CAI_KINDS = {"i": "int", "u": "uint", "f": "float", "c": "complex", "b": "bool", "V": "void"}
READ_ONLY = 1
NEWEST_DLPACK = (1, 1)  # the first with names for FP8
IMMUTABLE = ("jax", "jaxlib")  # their arrays must not change, and DLPack does not say so everywhere
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array on a device. Strides are in elements, dtype is a NumPy or ml_dtypes name; `owner` keeps it alive."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    is_readonly: bool
    owner: object

    @property
    def is_empty(self) -> bool:
        """It has no elements, and then mostly no address."""
        return 0 in self.shape


# ---- arrays of other libraries ---------------------------------------------------------------------------------------


def require_on_device(name: str, array) -> None:
    """Raise TypeError for what is no array, FlashAttentionError for one that no CUDA device holds. Needs no GPU."""
    if _has_dlpack(array):
        place = int(array.__dlpack_device__()[0])
        if place not in (DL_CUDA, DL_MANAGED):
            where = "host memory" if place in (DL_HOST, DL_PINNED) else f"memory of DLPack's device type {place}"
            raise error_for(
                Status.INVALID_ARGUMENT,
                f"{name} is a {kind_of(array)} in {where}: must be on a CUDA device (or all arrays NumPy "
                "arrays, which are computed on the host)",
            )
    elif not hasattr(array, "__cuda_array_interface__"):
        raise TypeError(f"{name} must be an array with DLPack or __cuda_array_interface__, not {kind_of(array)}")


def view(name: str, array, stream: int) -> Tensor:
    """The array as a Tensor that work on `stream` (a handle) may use, which must be of the current context.

    Raises FlashAttentionError if its library will not hand it over.
    """
    if not _has_dlpack(array):
        return _from_interface(name, array, stream)
    try:
        return _from_capsule(array, _capsule_of(array, _public(stream)))
    except Exception as error:  # each library has its own; PyTorch's for a tensor that requires grad is BufferError
        # Not every library that has FP8 hands it over.
        hint = (
            "; view it as uint8 and say dtype='float8_e4m3fn'" if "float8" in str(getattr(array, "dtype", "")) else ""
        )
        raise error_for(
            Status.INVALID_ARGUMENT, f"{name} is a {kind_of(array)} that cannot be had through DLPack: {error}{hint}"
        ) from error


def kind_of(array) -> str:
    """The array's class, with its module."""
    kind = type(array)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _has_dlpack(array) -> bool:
    return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _capsule_of(array, stream: int):
    try:
        return array.__dlpack__(stream=stream, max_version=NEWEST_DLPACK)
    except TypeError:  # a producer older than DLPack 1.0
        return array.__dlpack__(stream=stream)


def _from_capsule(array, capsule) -> Tensor:
    tensor, is_readonly = _tensor_in(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous(shape)
    kind = DL_KINDS.get(tensor.code, f"DLPack type {tensor.code} of ")
    dtype = kind if kind.startswith("float8") else f"{kind}{tensor.bits}" if tensor.lanes == 1 else "a vector"
    is_readonly = is_readonly or type(array).__module__.partition(".")[0] in IMMUTABLE
    address = (tensor.data or 0) + tensor.byte_offset
    return Tensor(address, shape, strides, dtype, tensor.device_id, is_readonly, capsule)


def _from_interface(name: str, array, stream: int) -> Tensor:
    interface = array.__cuda_array_interface__
    shape, typestr, (address, is_readonly) = (interface[key] for key in ("shape", "typestr", "data"))
    itemsize = int(typestr[2:])
    strides = interface.get("strides")
    strides = contiguous(shape) if strides is None else tuple(stride // itemsize for stride in strides)
    if interface.get("mask") is not None:
        raise error_for(Status.INVALID_ARGUMENT, f"{name} is a {kind_of(array)} with a mask: must have none")
    producer = interface.get("stream")
    if producer is not None and producer != _public(stream):
        order(producer, stream)
    device = _device_of(name, address) if address else int(checked(driver.cuCtxGetDevice(), "finding the device"))
    dtype = f"{CAI_KINDS.get(typestr[1], typestr[1])}{8 * itemsize}"
    return Tensor(address or 0, tuple(shape), strides, dtype, device, bool(is_readonly), array)


def _device_of(name: str, address: int) -> int:
    """Ordinal of the device that an address belongs to."""
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    failed, device = driver.cuPointerGetAttribute(attribute, address)
    if failed:
        raise error_for(Status.INVALID_ARGUMENT, f"{name} has the address {address:#x}: must be on a CUDA device")
    return int(device)


# ---- streams ---------------------------------------------------------------------------------------------------------


@contextmanager
def on_device_of(stream):
    """Make a stream's device current; yields (handle, device ordinal). `stream` is what `resolve_stream` takes."""
    handle = resolve_stream(stream)
    initialise_driver()
    with device_made_current(handle) as device:
        yield handle, device


def order(before: int, after: int) -> None:
    """What is enqueued on stream `after` from now on waits for what is on stream `before` now. Handles."""
    event = checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING), "creating an event")
    try:
        checked(driver.cuEventRecord(event, before), "recording an event")
        checked(driver.cuStreamWaitEvent(after, event, 0), "making a stream wait")
    finally:
        driver.cuEventDestroy(event)


def _public(stream: int) -> int:
    return stream or LEGACY_STREAM


# ---- arrays of ours --------------------------------------------------------------------------------------------------


class DeviceArray:
    """A new C-contiguous array on a device, which any array library takes over without a copy.

    shape     tuple of int; `strides` (in elements), `ndim`, `size`, `nbytes` follow from it
    dtype     "float16", "bfloat16" or "float32"
    device    ordinal
    buffer    the memory, a cuda.core Buffer; freed in the order of the stream when nobody holds it or a capsule of it

    It has DLPack (`torch.from_dlpack(x)`, `cupy.from_dlpack(x)`, `jax.dlpack.from_dlpack(x)`) and, except for bfloat16,
    which that protocol cannot name, `__cuda_array_interface__`. Both tell a consumer's stream to wait for the stream
    that computes the array, which must still exist then. A consumer that works on yet another stream keeps what it made
    of the array until that work is done.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, buffer, stream: int, device: int):
        self.shape, self.dtype, self.buffer, self.device = shape, dtype, buffer, device
        self._stream, self._context = _public(stream), current_context()

    @property
    def address(self) -> int:
        return int(self.buffer.handle)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]

    @property
    def strides(self) -> tuple[int, ...]:
        return contiguous(self.shape)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}{list(self.shape)} on device {self.device})"

    def __dlpack_device__(self) -> tuple[int, int]:
        return DL_CUDA, self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A capsule of the array. The consumer's `stream` waits for ours; None is the legacy default stream, -1 none.

        Raises BufferError where the array would have to be copied.
        """
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"the array is on CUDA device {self.device}: cannot be had on device {dl_device}")
        consumer = LEGACY_STREAM if stream is None else int(stream)
        if consumer not in (-1, self._stream):
            self._order(consumer)
        capsule = _view_of(self.buffer, self.shape, self.dtype).__dlpack__(max_version=max_version, copy=copy)
        if self.dtype == "bfloat16":
            tensor, _ = _tensor_in(capsule)
            tensor.code = DL_BFLOAT
        return capsule

    def _order(self, consumer: int) -> None:
        checked(driver.cuCtxPushCurrent(self._context), "switching to the array's device")
        try:
            order(self._stream, consumer)
        finally:
            checked(driver.cuCtxPopCurrent(), "switching back to the caller's device")

    @property
    def __cuda_array_interface__(self) -> dict:
        if self.dtype == "bfloat16":
            raise AttributeError("__cuda_array_interface__ has no name for bfloat16: take the array through DLPack")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": f"<f{ITEM_BYTES[self.dtype]}",
            "strides": None,
            "data": (self.address, False),
            "stream": self._stream,
        }


def new_array(name: str, shape: tuple[int, ...], dtype: str, stream, device: int) -> DeviceArray:
    """An uninitialised array on a device, which is current, allocated in the order of a stream of it.

    Raises FlashAttentionError within a capture of a CUDA graph, and if the memory cannot be had.
    """
    handle = resolve_stream(stream)
    if is_capturing(handle):
        raise error_for(
            Status.INVALID_ARGUMENT,
            f"{name} would be allocated while the stream is capturing a CUDA graph: must not; give out and "
            "leave return_lse False",
        )
    nbytes = prod(shape) * ITEM_BYTES[dtype]
    try:
        with capture_rules_relaxed():  # other threads may be capturing
            buffer = _allocate(nbytes, stream, handle, device)
    except Exception as error:  # cuda.core's own type, out of memory for the most part
        raise error_for(Status.CUDA_ERROR, f"allocating {nbytes} bytes for {name} failed: {error}") from error
    return DeviceArray(tuple(shape), dtype, buffer, handle, device)


def _allocate(nbytes: int, stream, handle: int, device: int):
    """A buffer that keeps alive the stream in whose order it is freed."""
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Buffer, Device, Stream

    special = {
        0: LEGACY_DEFAULT_STREAM,
        LEGACY_STREAM: LEGACY_DEFAULT_STREAM,
        PER_THREAD_STREAM: PER_THREAD_DEFAULT_STREAM,
    }
    own = stream if isinstance(stream, Stream) else special.get(handle) or Stream.from_handle(handle)
    memory = Device(device).memory_resource.allocate(max(1, nbytes), stream=own)
    # A tuple lets go of its last item first: of the memory before the stream.
    return Buffer.from_handle(int(memory.handle), memory.size, owner=(stream, memory))


def _view_of(buffer, shape: tuple[int, ...], dtype: str):
    """cuda.core's view of the memory, which it can export; as uint16 in place of bfloat16, which it cannot."""
    from cuda.core.utils import StridedMemoryView
    from numpy import dtype as numpy_dtype

    return StridedMemoryView.from_buffer(buffer, shape, dtype=numpy_dtype("uint16" if dtype == "bfloat16" else dtype))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


# ---- capsules (dlpack.h, versions 0 and 1) ---------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


def _tensor_in(capsule) -> tuple[_DLTensor, bool]:
    """(the tensor in an unconsumed capsule, whether it is read-only); valid for as long as the capsule is."""
    is_valid, pointer = _capsule_functions()
    if is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(pointer(capsule, b"dltensor_versioned"))
        if versioned.major != NEWEST_DLPACK[0]:
            raise BufferError(f"DLPack {versioned.major}.{versioned.minor}: must be version {NEWEST_DLPACK[0]}")
        return versioned.tensor, bool(versioned.flags & READ_ONLY)
    return _DLTensor.from_address(pointer(capsule, b"dltensor")), False  # ValueError if it is no such capsule


@cache
def _capsule_functions():
    arguments = ctypes.py_object, ctypes.c_char_p
    return (
        ctypes.PYFUNCTYPE(ctypes.c_int, *arguments)(("PyCapsule_IsValid", ctypes.pythonapi)),
        ctypes.PYFUNCTYPE(ctypes.c_void_p, *arguments)(("PyCapsule_GetPointer", ctypes.pythonapi)),
    )
