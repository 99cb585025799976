"""The log of calls that FA3_CUTE_LOG_CALLS asks for: a line of each call (record.py), before it runs.

1 writes to stderr, anything else is the path of a file that lines are added to. FA3_CUTE_LOG_LENGTHS=1 adds what the
arrays of lengths and pages hold, which waits for the stream in every call.
"""

import ctypes
import logging
import os
import sys
import threading
from typing import Any

from ...contract.plain import plain
from ...planning import backward_launch, operations
from .record import CALLS, Ints, Params, lengths_of, line_of

log = logging.getLogger("fa3_cute")

OFF = ("", "0")
STDERR = "1"


def is_set(name: str) -> bool:
    """A variable of the environment that is a switch."""
    return os.environ.get(name, "") not in OFF


class CallLog:
    """Where lines go: stderr, or a file that is opened for the first one. Whole lines, of any thread or process."""

    def __init__(self, target: str, has_lengths: bool):
        self.target, self.has_lengths = target, has_lengths
        self.lock = threading.Lock()
        self.file: Any = None

    def write(self, call: str, params: Params, stream: Any) -> None:
        """The line of a call; of what is no such call, which raises TypeError, none. Raises nothing of its own."""
        if not isinstance(params, CALLS[call][0]):
            return
        facts: dict[str, Any] = {"pid": os.getpid()}
        if self.has_lengths and call != "merge_attention":
            facts["lengths"] = _lengths(params, stream)
        line = line_of(call, params, **facts) + "\n"
        with self.lock:
            self._put(line)

    def _put(self, line: str) -> None:
        try:
            if self.target == STDERR:
                print(line, end="", file=sys.stderr, flush=True)
                return
            # Not buffered, a write per line: the line is there if the call ends the process.
            self.file = self.file or open(self.target, "ab", buffering=0)  # noqa: SIM115 (to the end of the process)
            self.file.write(line.encode())
        except OSError as error:
            log.warning("FA3_CUTE_LOG_CALLS=%s cannot be written, stderr is instead: %s", self.target, error)
            if self.target != STDERR:
                self.target = STDERR
                self._put(line)


def _lengths(params: Any, stream: Any) -> Any:
    """What the arrays of a good call hold, by field; else, in a sentence, why they were not read."""
    planning = backward_launch if hasattr(params, "dout") else operations
    found = planning.problems(params)
    if found:
        return f"not read: {found[0]}"
    p = plain(params)
    arrays = lengths_of(p)
    try:
        return {name: read(getattr(p, name), array, stream) for name, array in arrays.items()}
    except Exception as error:  # of the driver: the log is no reason for a call to fail
        return f"not read: {error}"


def read(address: int, array: Ints, stream: Any) -> list:
    """The numbers of an array in device memory, of one row as a list; waits for the stream."""
    from cuda.bindings import driver

    from ..cuda_driver import capture_rules_relaxed, checked, device_made_current, is_capturing, resolve_stream

    handle = resolve_stream(stream)
    numbers = (ctypes.c_int32 * array.extent)()
    with device_made_current(handle):
        if is_capturing(handle):
            raise RuntimeError("the stream is capturing a CUDA graph")
        with capture_rules_relaxed():
            checked(driver.cuStreamSynchronize(handle), "waiting for the stream")
            if array.extent:
                nbytes = ctypes.sizeof(numbers)
                checked(driver.cuMemcpyDtoH(ctypes.addressof(numbers), address, nbytes), "reading lengths")
    starts = [row * array.stride for row in range(array.rows)] if array.extent else [0] * array.rows
    rows = [list(numbers[start : start + array.columns]) for start in starts]
    return rows[0] if array.rows == 1 else rows
