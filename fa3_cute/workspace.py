"""Device memory that launches need beyond the caller's tensors: the tile counters of the persistent grids.

A counter is 0 between launches, the kernel sees to that (kernels/schedule.py); launches that may run at the same time
must not share one. Launches on one stream run one after the other and share the stream's. A captured launch may be
replayed on any stream, at any time: it gets a counter of its own, for good.
"""
import threading
from itertools import count

from cuda.bindings import driver

from .cuda_driver import NotWarmedUp, checked

PER_THREAD_STREAM = 2        # one handle for many streams: every thread has its own behind it
NUM_COUNTERS = 1 << 16
SPACING = 32                 # bytes: one memory sector each


class TileCounters:
    """The counters of one CUDA context, 2 MB of device memory; made while it is current, outside of captures."""

    def __init__(self):
        self.base = int(checked(driver.cuMemAlloc(NUM_COUNTERS * SPACING), "allocating the tile counters"))
        checked(driver.cuMemsetD8(self.base, 0, NUM_COUNTERS * SPACING), "clearing the tile counters")
        checked(driver.cuCtxSynchronize(), "clearing the tile counters")
        self.next_number = count().__next__        # atomic under the interpreter's lock
        self.by_stream: dict[int, int] = {}
        self.of_thread = threading.local()

    def of_stream(self, stream: int) -> int:
        """Address of the counter of launches on this stream."""
        if stream == PER_THREAD_STREAM:
            if not hasattr(self.of_thread, "counter"):
                self.of_thread.counter = self.take()
            return self.of_thread.counter
        address = self.by_stream.get(stream)
        return self.by_stream.setdefault(stream, self.take()) if address is None else address

    def take(self) -> int:
        """Address of a counter that nobody else has or will get."""
        number = self.next_number()
        if number >= NUM_COUNTERS:
            raise NotWarmedUp(f"all {NUM_COUNTERS} tile counters of this device are with streams and captured launches")
        return self.base + number * SPACING
