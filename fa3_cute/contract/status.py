"""Status codes of `forward`, the exceptions they turn into, and the calling thread's last error. Stands alone.

`forward` returns a `Status` as a C API would; `Status.check()` raises instead. Both tell the same story: the code says
which row of the table, the detail (kept per thread, `last_error()`) which field, its value and what is accepted.
"""

import threading
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple


class Status(IntEnum):
    """What became of a call. 0 is success, -1 to -16 a refusal (nothing was launched), -100 and below a failure."""

    OK = 0
    NULL_POINTER = -1
    UNSUPPORTED_HEAD_DIM = -2
    FP8_HEAD_DIM = -3
    INVALID_HEADS = -4
    CAUSAL_WINDOW_CONFLICT = -5
    VARLEN_MISMATCH = -6
    INVALID_SHAPE = -7
    MODE_MISMATCH = -8
    INVALID_ARGUMENT = -9
    BF16_UNSUPPORTED = -10
    SOFTCAP_UNSUPPORTED = -11
    PACK_GQA_UNSUPPORTED = -12
    SPLIT_KV_UNSUPPORTED = -13
    PAGED_KV_UNSUPPORTED = -14
    ROTARY_UNSUPPORTED = -15
    FEATURE_UNSUPPORTED = -16
    CUDA_ERROR = -100
    UNSUPPORTED_DEVICE = -101
    COMPILE_ERROR = -102
    NOT_WARMED_UP = -103

    def check(self) -> None:
        """Return None if OK; raise the matching FlashAttentionError otherwise.

        The detail and the cause are those of `last_error()` if that error has this status, so check a status before
        the same thread makes another call; a status that is not the last error's raises with the general sentence.
        """
        if self is Status.OK:
            return
        error = last_error()
        if error is None or error.status is not self:
            raise error_for(self)
        raise error_for(self, error.detail) from error.cause


_MEANING = {
    Status.OK: "success",
    Status.NULL_POINTER: "q, k, v or out is missing",
    Status.UNSUPPORTED_HEAD_DIM: "head_dim and head_dim_v must be multiples of 8 up to 256, 512, 576 and 512, or 64 "
    "and 512 with q_v",
    Status.FP8_HEAD_DIM: "FP8 needs head_dim and head_dim_v that are multiples of 16 up to 256, or 64 or 128 with q of "
    "16 bit",
    Status.INVALID_HEADS: "num_heads must be a positive multiple of a positive num_heads_k",
    Status.CAUSAL_WINDOW_CONFLICT: "is_causal and a sliding window exclude each other",
    Status.VARLEN_MISMATCH: "VARLEN_PREFILL, cu_seqlens_q, cu_seqlens_k, total_q and total_k do not fit together",
    Status.INVALID_SHAPE: "a size or a stride is missing, negative or out of range",
    Status.MODE_MISMATCH: "DECODE needs seqlen_q == 1",
    Status.INVALID_ARGUMENT: "an argument is misaligned, out of range, of the wrong type or out of place",
    Status.BF16_UNSUPPORTED: "BF16 is not supported (reserved: this library supports it)",
    Status.SOFTCAP_UNSUPPORTED: "softcap must be 0 or a positive finite number",
    Status.PACK_GQA_UNSUPPORTED: "pack_gqa is not supported (reserved: this library supports it)",
    Status.SPLIT_KV_UNSUPPORTED: "num_splits, max_num_splits and fixed_split_size must give at most 256 splits",
    Status.PAGED_KV_UNSUPPORTED: "page_table, page_size, num_pages, seqused_k and seqlen_k do not fit together",
    Status.ROTARY_UNSUPPORTED: "rotary_cos, rotary_sin, rotary_dim and what belongs to them do not fit together",
    Status.FEATURE_UNSUPPORTED: "the call asks for a feature that is not supported",
    Status.CUDA_ERROR: "a CUDA call failed",
    Status.UNSUPPORTED_DEVICE: "needs a CUDA driver and a GPU of compute capability 9.0 (Hopper)",
    Status.COMPILE_ERROR: "the kernel did not compile",
    Status.NOT_WARMED_UP: "the stream is capturing a CUDA graph and the kernel is not loaded yet: call warmup() first; "
    "or no counter is left",
}


class Problem(NamedTuple):
    """One reason why a call is refused; prints as a sentence."""

    status: Status
    detail: str

    def __str__(self) -> str:
        return f"{self.status.name} ({int(self.status)}): {self.detail}"


def get_error_string(status: int) -> str:
    """The general sentence of a status code, known or not; never raises. `last_error()` has the particulars."""
    try:
        known = Status(status)
    except Exception:  # any object may come in: an unhashable one raises TypeError, a foreign class what it likes
        return f"unknown status {shown(status)}"
    return f"{known.name}: {_MEANING[known]}"


class FlashAttentionError(RuntimeError):
    """A refused or failed call: `code` is its Status, `detail` says which field or which call, in words.

    Subclasses are also ValueError (-1 to -9, -11, -13 to -15) or NotImplementedError (-10, -12, -16); those of -100 and
    below are named after their row. Pickles and copies with both attributes.
    """

    def __init__(self, code: int, detail: str | None = None):
        super().__init__(code, detail)
        self.code = code
        self.detail = get_error_string(code) if detail is None else detail

    def __str__(self) -> str:
        return f"{self.detail} [{getattr(self.code, 'name', 'status')} {int(self.code)}]"


class InvalidCallError(FlashAttentionError, ValueError):
    """The parameters contradict the contract (-1 to -9, -11, -13 to -15)."""


class UnsupportedFeatureError(FlashAttentionError, NotImplementedError):
    """The parameters ask for something that this library does not do (-10, -12, -16)."""


class CudaError(FlashAttentionError):
    """A CUDA call failed (-100); `__cause__` is the original error."""


class UnsupportedDeviceError(FlashAttentionError):
    """No CUDA driver, no GPU, or not compute capability 9.0 (-101)."""


class KernelCompileError(FlashAttentionError):
    """The kernel did not compile (-102)."""


class NotWarmedUpError(FlashAttentionError):
    """Graph capture met a kernel that is not loaded yet, or no counter is left (-103)."""


_UNSUPPORTED = (Status.BF16_UNSUPPORTED, Status.PACK_GQA_UNSUPPORTED, Status.FEATURE_UNSUPPORTED)
_FAILURES = {
    Status.CUDA_ERROR: CudaError,
    Status.UNSUPPORTED_DEVICE: UnsupportedDeviceError,
    Status.COMPILE_ERROR: KernelCompileError,
    Status.NOT_WARMED_UP: NotWarmedUpError,
}


def error_for(status: Status, detail: str | None = None) -> FlashAttentionError:
    """The exception, not yet raised, that stands for a status other than OK."""
    if status in _UNSUPPORTED:
        return UnsupportedFeatureError(status, detail)
    if Status.FEATURE_UNSUPPORTED < status < Status.OK:
        return InvalidCallError(status, detail)
    return _FAILURES.get(status, FlashAttentionError)(status, detail)


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """One refusal or failure: its status, the sentence, and the exception behind it if there was one."""

    status: Status
    detail: str
    cause: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.status.name} ({int(self.status)}): {self.detail}"


_thread = threading.local()


def last_error() -> ErrorRecord | None:
    """The calling thread's latest refusal or failure, None if there was none. A later success does not clear it."""
    return getattr(_thread, "last_error", None)


def record_error(status: Status, detail: str, cause: BaseException | None = None) -> Status:
    """Make this the calling thread's last error; returns the status for the caller to hand on."""
    _thread.last_error = ErrorRecord(status, detail, cause)
    return status


def shown(value) -> str:
    """A value as one short line: its repr, an enum member as a user writes it, the type's name where repr fails.

    Of an int too long for a line its bits: Python refuses to print those of thousands of digits.
    """
    if isinstance(value, int) and not isinstance(value, Enum) and value.bit_length() > 256:
        return f"{'-' if value < 0 else ''}<int of {value.bit_length()} bits>"
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a foreign class's __repr__ may raise anything
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
