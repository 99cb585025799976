"""NumPy arrays on a CUDA device: allocate, fill, upload, download. A thin layer over cuda.core, imported on first use.

The attention calls themselves need none of this: they take device pointers from any library. It serves programs that
have no array library on the device (the examples, the benchmark, the tests).

Every function takes `stream`, a cuda.core stream, and works in its order; None is the default stream of the current
device. A download sees the result of a kernel only if it is given that kernel's stream, or if that stream was
synchronised before. Functions return when their work is done, with one exception: a fill on a given stream is only
enqueued.
"""

import ctypes
import threading

import numpy as np

# Pageable memory cannot be copied asynchronously; arrays pass through a pinned window of at most this size.
STAGING_BYTES = 64 << 20


def hopper_device_problem(ordinal: int = 0) -> str | None:
    """Why CUDA device `ordinal` cannot run the kernels, in one sentence; None if it can. Never raises."""
    try:
        from cuda.core import Device
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        return f"cuda.core cannot be imported ({error})"
    try:
        device = Device(ordinal)
        major, minor = device.compute_capability
        name = device.name
    except DynamicLibNotFoundError:
        return "no CUDA driver on this machine"
    except Exception as error:  # no device, no such ordinal, a driver too old: each has its own type, and is the answer
        return f"no usable CUDA device {ordinal}: {str(error).strip() or type(error).__name__}"
    if (major, minor) != (9, 0):
        return f"{name} has compute capability {major}.{minor}; the kernels need 9.0 (Hopper: H100, H200)"
    return None


def open_device(ordinal: int = 0):
    """The cuda.core Device `ordinal`, made current in the calling thread. RuntimeError if it cannot run the kernels."""
    problem = hopper_device_problem(ordinal)
    if problem:
        raise RuntimeError(problem)
    from cuda.core import Device

    device = Device(ordinal)
    device.set_current()
    return device


def allocate(nbytes: int, *, stream=None):
    """A cuda.core Buffer of `nbytes` bytes (at least 1, so that it has an address), 256-byte aligned, uninitialised."""
    from cuda.core import Device

    stream = _or_default(stream)
    buffer = Device().allocate(max(1, nbytes), stream=stream)
    stream.sync()  # allocation is ordered on `stream` only; after this the memory may be used on any
    return buffer


def address(buffer, offset: int = 0) -> int:
    """The device address of byte `offset` of a buffer, as FlashAttentionParams takes it."""
    return int(buffer.handle) + offset


def window(buffer, offset: int, nbytes: int):
    """The bytes [offset, offset + nbytes) of a buffer, as a buffer; keeps the whole alive, copies nothing."""
    from cuda.core import Buffer

    if not 0 <= offset <= offset + nbytes <= buffer.size:
        raise ValueError(f"window [{offset}, {offset + nbytes}) of a buffer of {buffer.size} bytes")
    return Buffer.from_handle(address(buffer, offset), nbytes, owner=buffer)


def fill(buffer, byte: int, *, stream=None) -> None:
    """Set every byte of a buffer to `byte` (0xFF is a NaN in FP16, BF16, FP32, FP8). Given a stream, does not wait."""
    buffer.fill(byte, stream=_or_default(stream))
    if stream is None:
        _or_default(stream).sync()


def upload(array, target=None, *, stream=None):
    """Copy a NumPy array to the device, in C order whatever its strides; returns the buffer.

    array   any dtype (ml_dtypes' too), any strides
    target  a buffer (or window) of exactly array.nbytes bytes; None allocates one
    """
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    stream = _or_default(stream)
    target = allocate(source.size, stream=stream) if target is None else target
    if source.size and target.size != source.size:
        raise ValueError(f"upload of {source.size} bytes into a buffer of {target.size} bytes")
    for start, size, staging, staged in _staged(source.size):
        staged[:size] = source[start : start + size]
        window(target, start, size).copy_from(window(staging, 0, size), stream=stream)
        stream.sync()
    return target


def download(buffer, shape, dtype, *, stream=None) -> np.ndarray:
    """The first bytes of a buffer as a new C-ordered NumPy array of `shape` and `dtype`."""
    array = np.empty(shape, dtype)
    target = array.reshape(-1).view(np.uint8)
    stream = _or_default(stream)
    for start, size, staging, staged in _staged(target.size):
        window(buffer, start, size).copy_to(window(staging, 0, size), stream=stream)
        stream.sync()
        target[start : start + size] = staged[:size]
    return array


def _staged(nbytes: int):
    """Yield (start, size, pinned buffer, its bytes as an array) for consecutive pieces of a copy of `nbytes` bytes."""
    if not nbytes:
        return
    staging = _kept.at_least(min(nbytes, STAGING_BYTES))
    staged = np.frombuffer((ctypes.c_ubyte * staging.size).from_address(address(staging)), np.uint8)
    for start in range(0, nbytes, staging.size):
        yield start, min(staging.size, nbytes - start), staging, staged


class _Kept(threading.local):
    """A thread's pinned window, kept from copy to copy: to pin memory takes longer than most copies."""

    staging = None

    def at_least(self, nbytes: int):
        """The window as a buffer of `nbytes` or more, which holds until the next call."""
        from cuda.core import LegacyPinnedMemoryResource

        if self.staging is None or self.staging.size < nbytes:
            self.staging = None  # freed before its successor is there
            self.staging = LegacyPinnedMemoryResource().allocate(1 << max(16, (nbytes - 1).bit_length()))
        return self.staging


_kept = _Kept()


def _or_default(stream):
    if stream is not None:
        return stream
    from cuda.core import Device

    return Device().default_stream
