"""XLA's foreign functions in Python: what its runtime calls, read by ctypes. No kernel, no attention.

XLA calls a C function with a frame of its stable C ABI (xla/ffi/api/c_api.h, version 0): addresses of argument and
result buffers, attributes, and functions that make an error or tell the stream. ctypes makes such a function of a
Python one, and takes the GIL for it.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import jax

from ..contract.status import FlashAttentionError

MAJOR_VERSION = 0
METADATA = 1  # the type of the extension that asks what a handler is
# XLA_FFI_Error_Code
INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13


class _Struct(ctypes.Structure):
    """All of them start so: their size, and extensions."""

    _fields_ = [("struct_size", c_size_t), ("extension", c_void_p)]


class _Version(_Struct):
    _fields_ = [("major", c_int), ("minor", c_int)]


class _Api(_Struct):
    """The functions up to the last that is called here; later versions append to them."""

    _fields_ = [
        ("version", _Version),
        ("internal", c_void_p),
        ("error_create", c_void_p),
        ("error_details", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32), ("state_type", c_int64)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    ]


class _Buffer(_Struct):
    _fields_ = [("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class _Buffers(_Struct):
    """Arguments or results."""

    _fields_ = [("size", c_int64), ("types", c_void_p), ("buffers", POINTER(POINTER(_Buffer)))]


class _Text(ctypes.Structure):
    _fields_ = [("start", c_void_p), ("size", c_size_t)]


class _Attributes(_Struct):
    _fields_ = [("size", c_int64), ("types", c_void_p), ("names", c_void_p), ("values", POINTER(POINTER(_Text)))]


class _Frame(_Struct):
    _fields_ = [
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int32),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


class _NewError(_Struct):
    _fields_ = [("message", c_char_p), ("code", c_int)]


class _StreamOf(_Struct):
    _fields_ = [("context", c_void_p), ("stream", c_void_p)]


_call = ctypes.CFUNCTYPE(c_void_p, c_void_p)  # an error, or NULL, of a frame or of a function's arguments

# run(text, addresses, stream): the attribute, and the addresses of arguments and then results.
Run = Callable[[bytes, Sequence[int], int], None]


def handler(run: Run) -> Any:
    """A C function that XLA can call, to be kept as long as the process lives. It has one attribute, a string.

    What `run` raises becomes XLA's error, with its words.
    """

    def called(address: int) -> int | None:
        frame = _Frame.from_address(address)
        if frame.extension and _describe(frame):
            return None
        try:
            run(_text(frame.attributes), (*_addresses(frame.arguments), *_addresses(frame.results)), stream_of(frame))
        except BaseException as error:  # there is no Python above this that it could go up to
            return _failure(frame, error)
        return None

    return _call(called)


def register(name: str, function: Any, platform: str) -> None:
    """Make a handler known as a target of `jax.ffi.ffi_call`; CUDA graphs are not made of calls to it."""
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform=platform)


def stream_of(frame: _Frame) -> int:
    """The CUDA stream on which the call is to run."""
    given = _StreamOf(ctypes.sizeof(_StreamOf), None, frame.context, None)
    if _call(frame.api.contents.stream_get)(ctypes.addressof(given)):
        raise RuntimeError("XLA knows no stream of this call")
    return given.stream or 0


def _describe(frame: _Frame) -> bool:
    """Answer XLA, if it asks, which version of the ABI this is: its own, of which only what never moves is read."""
    extension = _Extension.from_address(frame.extension)
    if extension.type != METADATA:
        return False
    version = frame.api.contents.version
    if version.major != MAJOR_VERSION:  # XLA refuses a handler of another one, and says so
        version = _Version(ctypes.sizeof(_Version), None, MAJOR_VERSION, 0)
    found = extension.metadata.contents
    found.version, found.traits = version, 0
    if found.struct_size >= ctypes.sizeof(_Metadata):  # since version 0.1
        found.state_type = 0
    return True


def _text(attributes: _Attributes) -> bytes:
    text = attributes.values[0].contents
    return ctypes.string_at(text.start, text.size)


def _addresses(buffers: _Buffers) -> list[int]:
    found = buffers.buffers
    return [found[i].contents.data or 0 for i in range(buffers.size)]


def _failure(frame: _Frame, error: BaseException) -> int:
    code = INTERNAL
    if isinstance(error, FlashAttentionError):
        kinds = {ValueError: INVALID_ARGUMENT, NotImplementedError: UNIMPLEMENTED}
        code = next((found for kind, found in kinds.items() if isinstance(error, kind)), INTERNAL)
    message = f"fa3_cute: {type(error).__name__}: {error}".encode()
    given = _NewError(ctypes.sizeof(_NewError), None, message, code)
    return _call(frame.api.contents.error_create)(ctypes.addressof(given))
