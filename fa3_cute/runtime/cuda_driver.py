"""Streams, devices and contexts through the CUDA driver, and its errors as exceptions.

The device of a launch is its stream's. Compute capability and SM count are asked once per device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from cuda.bindings import driver, runtime
from cuda.bindings.driver import CUdevice_attribute, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus

from ..contract.params import holds_address
from ..contract.status import Status, error_for, shown

LAST_SPECIAL_STREAM = 2  # 0, 1 and 2 are the default streams: they belong to whichever device is current
SUPPORTED_CAPABILITY = (9, 0)
NOT_CAPTURING = CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


class CudaFailure(RuntimeError):
    """A CUDA call failed: `code` is its cudaError_t or CUresult, `name` the name of that code."""

    def __init__(self, code: int, name: str, text: str, action: str):
        super().__init__(f"{action} failed with {name} ({code}): {text}")
        self.code, self.name = code, name


class NotWarmedUp(RuntimeError):
    """The stream is capturing a CUDA graph and something is missing that cannot be made within a capture."""


class UnsupportedDevice(RuntimeError):
    """No CUDA driver, no device, or a device that is not of compute capability 9.0."""


def resolve_stream(stream) -> int:
    """Handle of a stream: an int, None (the legacy default stream), or an object with `__cuda_stream__` or `__int__`.

    Raises TypeError for anything else, arrays and fractions too; InvalidCallError for an int that no handle can be.
    """
    handle = stream
    if type(handle) is not int:
        if handle is None:
            return 0
        try:
            if protocol := getattr(handle, "__cuda_stream__", None):
                _, handle = protocol()  # (version of the protocol, handle)
            found = int(handle) if holds_address(type(handle)) else None
        except Exception as error:  # a foreign class may raise anything
            raise TypeError(f"stream: {type(stream).__name__} does not give its handle: {error}") from error
        if found is None:
            raise TypeError(f"stream must be an int handle, None or have __cuda_stream__, not {type(stream).__name__}")
        handle = found
    if not 0 <= handle < 2**64:
        raise error_for(Status.INVALID_ARGUMENT, f"stream={shown(stream)}: must be a handle, from 0 to 2**64 - 1")
    return handle


@cache
def initialise_driver() -> None:
    """Start the driver; raises UnsupportedDevice with its reason where there is none, or no device."""
    try:
        (failed,) = driver.cuInit(0)
    except RuntimeError as error:  # the library itself is missing
        raise UnsupportedDevice(f"no CUDA driver: {error}") from error
    if failed:
        raise UnsupportedDevice("no usable CUDA device: cuInit returned {}, {}".format(*_driver_error(failed)))


def shared_context(stream: int) -> int:
    """Handle of the current context if the stream's work belongs to it; 0 if another one must be made current.

    Two driver queries that a capture permits: cuStreamGetDevice and cuStreamGetId would invalidate it.
    """
    failed, current = driver.cuCtxGetCurrent()
    context = 0 if failed else int(current)
    if not context or stream <= LAST_SPECIAL_STREAM:
        return context
    failed, own = driver.cuStreamGetCtx(stream)
    return context if not failed and int(own) == context else 0


def is_current(context: int) -> bool:
    """Whether the context of this id is the thread's current one."""
    failed, current = driver.cuCtxGetId(None)
    return current == context and not failed


def context_id() -> int:
    """Of the current context: no other one of the process ever has it, while a handle comes back after a reset."""
    return int(checked(driver.cuCtxGetId(None), "finding the current context"))


def stream_id(stream: int, handle: driver.CUstream | None = None) -> int:
    """Of a stream that is not capturing: no other one of the process ever has it, while a handle comes back as soon as
    its stream is destroyed. 0 for the default streams, which are not.

    handle   the same as an object, with which the driver is asked faster than with an int
    """
    if stream <= LAST_SPECIAL_STREAM:
        return 0
    failed, found = driver.cuStreamGetId(stream if handle is None else handle)
    return 0 if failed else found


@contextmanager
def device_made_current(stream: int) -> Iterator[int]:
    """Make a stream's device current and yield its ordinal; a context that was current before is current again after.

    A thread with no current context gets the stream's or the primary one of device 0, and keeps it, as CUDA's runtime
    does it.
    """
    if not shared_context(stream):
        is_special = stream <= LAST_SPECIAL_STREAM
        wanted = (
            _primary_context(0)
            if is_special
            else checked(driver.cuStreamGetCtx(stream), "finding the stream's context")
        )
        if current_context():
            checked(driver.cuCtxPushCurrent(wanted), "switching to the stream's device")
            try:
                yield current_device()
            finally:
                checked(driver.cuCtxPopCurrent(), "switching back to the caller's device")
            return
        checked(driver.cuCtxSetCurrent(wanted), "switching to the stream's device")
    yield current_device()


def current_context() -> int:
    """Handle of the current context, 0 if there is none."""
    return int(checked(driver.cuCtxGetCurrent(), "finding the current context"))


def current_device() -> int:
    """Ordinal of the device whose context is current."""
    return int(checked(driver.cuCtxGetDevice(), "finding the current device"))


def _primary_context(device: int):  # each time anew: it may have been reset
    return checked(driver.cuDevicePrimaryCtxRetain(device), f"using device {device}")


@cache
def num_sms(device: int) -> int:
    """Number of SMs of a device; raises UnsupportedDevice unless it is of compute capability 9.0."""
    major, minor, sms = (
        checked(driver.cuDeviceGetAttribute(attribute, device), f"reading the attributes of device {device}")
        for attribute in (
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    if (major, minor) != SUPPORTED_CAPABILITY:
        raise UnsupportedDevice(f"device {device} is of compute capability {major}.{minor}, not 9.0 (Hopper)")
    return sms


def is_capturing(stream: int | driver.CUstream) -> bool:
    """Whether work that is enqueued on the stream now goes into a CUDA graph."""
    failed, state = driver.cuStreamIsCapturing(stream)
    if not failed:
        return state is not NOT_CAPTURING
    if failed == CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:  # the legacy stream, while another stream captures
        return True
    raise CudaFailure(int(failed), *_driver_error(failed), "asking whether the stream is capturing")


def capture_of(stream: int) -> tuple[int, Any]:
    """(id, graph) of the capture that the stream is in; no other capture of the process ever has the id."""
    _, capture, graph, *_ = checked_all(driver.cuStreamGetCaptureInfo(stream), "finding the stream's capture")
    return int(capture), graph


@contextmanager
def capture_rules_relaxed() -> Iterator[None]:
    """Let the thread allocate and load while it, or another one, captures: else CUDA refuses, and ends that capture.

    What is done meanwhile must not be meant for a graph. Nothing may wait for a device or a context even so.
    """
    mode = checked(
        driver.cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED),
        "relaxing the rules of captures",
    )
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def checked_all(result: tuple, action: str) -> list:
    """The values of a driver call's (CUresult, *values); raises CudaFailure if the call failed."""
    failed, *values = result
    if failed:
        raise CudaFailure(int(failed), *_driver_error(failed), action)
    return values


def checked(result: tuple, action: str) -> Any:
    """The value of a driver call's (CUresult, value), or None; raises CudaFailure if the call failed."""
    values = checked_all(result, action)
    return values[0] if values else None


def _driver_error(failed: CUresult) -> tuple[str, str]:
    name, text = (
        words.decode() if words else "unknown"
        for _, words in (driver.cuGetErrorName(failed), driver.cuGetErrorString(failed))
    )
    return name, text


def check_runtime_error(code: int, action: str) -> None:
    """Raise CudaFailure for a cudaError_t that is not success."""
    if not code:
        return
    try:
        error = runtime.cudaError_t(code)
        name, text = (ask(error)[1].decode() for ask in (runtime.cudaGetErrorName, runtime.cudaGetErrorString))
    except ValueError:  # a code newer than these bindings
        name, text = "cudaError_t", "unknown"
    raise CudaFailure(code, name, text, action)
