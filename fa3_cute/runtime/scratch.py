"""Device memory that launches need beyond the caller's tensors, per CUDA context.

Counters (the persistent grid's next tile, split-KV's arrivals) are 0 between launches, the kernels see to that;
launches that may run at the same time must not share one. Launches on one stream run one after the other and share the
stream's. A captured launch may be replayed on any stream, at any time: it gets counters of its own, for good.

The partial results of split-KV lie in the stream's workspace, also those of a captured launch: graphs that were
captured on one stream must not be replayed at the same time, unless each launch was given a workspace by the caller.
"""

import threading
from typing import NamedTuple

from cuda.bindings import driver

from .cuda_driver import NotWarmedUp, checked, is_capturing

PER_THREAD_STREAM = 2  # one handle for many streams: every thread has its own behind it
NUM_COUNTERS = 1 << 16
SPACING = 32  # bytes: one memory sector each
INTS_PER_COUNTER = SPACING // 4


def allocate(nbytes: int, what: str) -> int:
    """Device memory full of zeros, for good, on the current context; returns its address."""
    address = int(checked(driver.cuMemAlloc(nbytes), f"allocating {what}"))
    checked(driver.cuMemsetD8(address, 0, nbytes), f"clearing {what}")
    checked(driver.cuCtxSynchronize(), f"clearing {what}")
    return address


class Counters:
    """The counters of one CUDA context, 2 MB of device memory; made while it is current, outside of captures."""

    def __init__(self):
        self.base = allocate(NUM_COUNTERS * SPACING, "the counters")
        self.lock = threading.Lock()
        self.num_taken = 0
        self.by_stream: dict = {}

    def of_stream(self, stream) -> int:
        """Address of the tile counter of launches on this stream, as `stream_key` names it."""
        address = self.by_stream.get(stream)
        return self.by_stream.setdefault(stream, self.take()) if address is None else address

    def take(self, num_ints: int = 1) -> int:
        """Address of so many int32 that nobody else has or will get."""
        with self.lock:
            number, needed = self.num_taken, -(-num_ints // INTS_PER_COUNTER)
            if number + needed > NUM_COUNTERS:
                raise NotWarmedUp(f"all {NUM_COUNTERS} counters of this device are with streams and captured launches")
            self.num_taken = number + needed
        return self.base + number * SPACING


class Workspace(NamedTuple):
    """A stream's scratch memory for split-KV: addresses and sizes."""

    partials: int
    partial_bytes: int
    arrivals: int
    num_arrivals: int

    def is_enough_for(self, partial_bytes: int, num_arrivals: int) -> bool:
        return self.partial_bytes >= partial_bytes and self.num_arrivals >= num_arrivals


class Workspaces:
    """The workspaces of one CUDA context, one per stream. What a stream outgrows stays: a graph may hold it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.by_stream: dict = {}
        self.spare: Workspace | None = None

    def of_stream(self, stream, handle: int, partial_bytes: int, num_arrivals: int) -> Workspace:
        """The stream's workspace (`stream_key` and handle), made or grown if it must be; NotWarmedUp within a capture.

        A capture may take the spare one that `prepare` left.
        """
        found = self.by_stream.get(stream)
        if found is not None and found.is_enough_for(partial_bytes, num_arrivals):
            return found
        with self.lock:
            if not is_capturing(handle):
                found = self.by_stream[stream] = self.make(found, partial_bytes, num_arrivals)
            elif self.spare is not None and self.spare.is_enough_for(partial_bytes, num_arrivals):
                found = self.by_stream[stream] = self.spare
                self.spare = None
            else:
                raise NotWarmedUp(
                    "the stream is capturing a CUDA graph and has no workspace of "
                    f"{partial_bytes} bytes: call warmup() before the capture, or give a workspace"
                )
        return found

    def prepare(self, stream, handle: int, partial_bytes: int, num_arrivals: int) -> None:
        """Make the stream's workspace, and a spare one for a stream that begins its life with a capture."""
        self.of_stream(stream, handle, partial_bytes, num_arrivals)
        with self.lock:
            if self.spare is None or not self.spare.is_enough_for(partial_bytes, num_arrivals):
                self.spare = self.make(self.spare, partial_bytes, num_arrivals)

    @staticmethod
    def make(outgrown: Workspace | None, partial_bytes: int, num_arrivals: int) -> Workspace:
        """A workspace of at least these sizes, and twice the outgrown one's: few of them are ever made."""
        if outgrown is not None:
            partial_bytes, num_arrivals = (
                max(partial_bytes, 2 * outgrown.partial_bytes),
                max(num_arrivals, 2 * outgrown.num_arrivals),
            )
        partial_bytes = max(partial_bytes, SPACING)
        return Workspace(
            allocate(partial_bytes, "a workspace"),
            partial_bytes,
            allocate(4 * num_arrivals, "a workspace"),
            num_arrivals,
        )


class Memory:
    """All of one context's; made while it is current, outside of captures."""

    def __init__(self):
        self.counters, self.workspaces = Counters(), Workspaces()


class _OfThread(threading.local):
    def __init__(self):
        self.key = object()


_of_thread = _OfThread()


def stream_key(stream: int):
    """What tells a stream from the others of its context: its handle, or the thread whose default stream it is."""
    return _of_thread.key if stream == PER_THREAD_STREAM else stream
