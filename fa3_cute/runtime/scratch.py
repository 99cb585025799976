"""Device memory that launches need beyond the caller's tensors, per CUDA context.

Counters (the persistent grid's next tile, split-KV's arrivals) are 0 between launches, the kernels see to that;
launches that may run at the same time must not share one. Launches on one stream run one after the other and share the
stream's. A captured launch may be replayed on any stream, at any time: it gets counters of its own, which come back
when its graph and all that was made of it are gone.

The partial results of split-KV lie in the stream's workspace, also those of a captured launch: graphs that were
captured on one stream must not be replayed at the same time, unless each launch was given a workspace by the caller.

Streams and contexts are told by their ids, for handles come back: that of a context after a reset, that of a destroyed
stream at once, even while the device still does its work. When that is done nobody can say any more, so what the old
stream held rests until much newer memory does (RESTING_STREAMS, RESTING_BYTES). A thread's default stream has one
handle with all others': its memory is handed on when the thread has ended and what it enqueued is done.
"""

import bisect
import ctypes
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from cuda.bindings import driver

from .cuda_driver import (
    CudaFailure,
    NotWarmedUp,
    capture_of,
    capture_rules_relaxed,
    checked,
    context_id,
    current_context,
    is_capturing,
)

PER_THREAD_STREAM = 2  # one handle for many streams: every thread has its own behind it
NUM_COUNTERS = 1 << 16
COUNTERS_OF_STREAMS = 1 << 10  # that captures leave
SPACING = 32  # bytes: one memory sector each
INTS_PER_COUNTER = SPACING // 4
# What may rest of destroyed streams before the oldest is used again.
RESTING_STREAMS, RESTING_BYTES = 1 << 14, 256 << 20
SEMAPHORE_BYTES = 64  # at least a sem_t


def allocate(nbytes: int, what: str) -> int:
    """Device memory on the current context, within captures too; returns its address."""
    with capture_rules_relaxed():
        return int(checked(driver.cuMemAlloc(nbytes), f"allocating {what}"))


def allocate_zeros(nbytes: int, what: str) -> int:
    """The same, full of zeros; outside of captures of the calling thread.

    Waits for no stream but one of its own: to wait for the context would end the captures there.
    """
    address = allocate(nbytes, what)
    with capture_rules_relaxed():
        stream = checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), f"clearing {what}")
        try:
            checked(driver.cuMemsetD8Async(address, 0, nbytes, stream), f"clearing {what}")
            checked(driver.cuStreamSynchronize(stream), f"clearing {what}")
        finally:
            driver.cuStreamDestroy(stream)
    return address


# ---- counters --------------------------------------------------------------------------------------------------------


class Counters:
    """The counters of one CUDA context, 2 MB of device memory."""

    def __init__(self):
        self.base = allocate_zeros(NUM_COUNTERS * SPACING, "the counters")
        self.free = [(0, NUM_COUNTERS)]  # (first, how many), apart, in order

    def take(self, num_ints: int = 1, kept: int = 0) -> int:
        """Address of so many int32 that nobody else has; 0 if they are not left beside so many counters."""
        needed = -(-num_ints // INTS_PER_COUNTER)
        if kept and sum(count for _, count in self.free) < needed + kept:
            return 0
        for place, (first, count) in enumerate(self.free):
            if count >= needed:
                self.free[place : place + 1] = [(first + needed, count - needed)] if count > needed else []
                return self.base + first * SPACING
        return 0

    def give_back(self, address: int, num_ints: int = 1) -> None:
        """What was taken is free; nothing runs that uses it."""
        first, count = (address - self.base) // SPACING, -(-num_ints // INTS_PER_COUNTER)
        place = bisect.bisect(self.free, (first, count))
        if place < len(self.free) and self.free[place][0] == first + count:
            count += self.free.pop(place)[1]
        if place and sum(self.free[place - 1]) == first:
            place -= 1
            before, length = self.free.pop(place)
            first, count = before, length + count
        self.free.insert(place, (first, count))


# ---- what streams and captures hold ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Workspace:
    """Scratch memory for split-KV: addresses and sizes. One that `is_captured` is a graph's, for good."""

    partials: int = 0
    partial_bytes: int = 0
    arrivals: int = 0
    num_arrivals: int = 0
    is_captured: bool = False


@dataclass(slots=True)
class Holding:
    """Counters, as (address, int32), and workspaces that are in use until `is_done` says that they are not.

    Of a stream: its tile counter is the first of the counters, its workspace the last; the others it has outgrown.
    stream_id is 0 where it is not known.
    """

    stream_id: int = 0
    counters: list[tuple[int, int]] = field(default_factory=list)
    workspaces: list[Workspace] = field(default_factory=list)
    is_done: Callable[[], bool] = lambda: False

    @property
    def nbytes(self) -> int:
        """Of its workspaces."""
        return sum(workspace.partial_bytes + 4 * workspace.num_arrivals for workspace in self.workspaces)


class Memory:
    """All of one context's; made while it is current."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counters = Counters()
        self.spare: list[Workspace] = []
        self.of_streams: dict[int, Holding] = {}  # by stream_key
        self.of_captures: dict[int, Holding] = {}  # by the capture's id
        self.ending: list[Holding] = []  # of threads that have ended
        self.resting: deque[Holding] = deque()  # of destroyed streams, the oldest first
        self.resting_bytes = 0

    def tile_counter(self, stream: int, identity: int = 0) -> int:
        """Address of the stream's (a handle and its stream_id), for launches that do not go into a graph."""
        with self.lock:
            holding = self._of_stream(stream, identity)
            if not holding.counters:
                holding.counters.append((self._take(1), 1))
            return holding.counters[0][0]

    def captured(self, stream: int, num_ints: int) -> int:
        """Address of so many int32 of counters for a launch that goes into the graph that the stream is capturing."""
        capture, graph = capture_of(stream)
        with self.lock, capture_rules_relaxed():
            holding = self.of_captures.get(capture)
            if holding is None:
                self._reclaim()
                holding = self.of_captures[capture] = Holding(is_done=end_of(graph))
            holding.counters.append((self._take(num_ints, kept=COUNTERS_OF_STREAMS), num_ints))
            return holding.counters[-1][0]

    def workspace(self, stream: int, partial_bytes: int, num_arrivals: int, identity: int = 0) -> Workspace:
        """The stream's (a handle and its stream_id), made or grown if it must be; within a capture, where the id cannot
        be asked for, without arrival counts only."""
        with self.lock:
            own = self._of_stream(stream, identity).workspaces
            if not own or own[-1].partial_bytes < partial_bytes:
                own.append(self._spare_or_new(own[-1] if own else None, partial_bytes))
            found = own[-1]
            if found.num_arrivals < num_arrivals:
                count = max(num_arrivals, 2 * found.num_arrivals)
                found.arrivals, found.num_arrivals = allocate_zeros(4 * count, "arrival counts"), count
            return found

    def thread_ends(self, key: int) -> None:
        """The calling thread ends, whose default stream has this key."""
        with self.lock:
            holding = self.of_streams.pop(key, None)
            if holding is None or is_capturing(PER_THREAD_STREAM):  # it cannot be asked, then
                return
            self._reclaim()
            event = checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING), "creating an event")
            checked(driver.cuEventRecord(event, PER_THREAD_STREAM), "recording an event")
            holding.workspaces = [workspace for workspace in holding.workspaces if not workspace.is_captured]
            holding.is_done = lambda: is_over(event)
            self.ending.append(holding)

    def _of_stream(self, stream: int, identity: int) -> Holding:
        key = stream_key(stream)
        holding = self.of_streams.get(key)
        if holding is not None and identity != holding.stream_id:
            if not identity:
                return holding
            if holding.stream_id:
                self._rest(holding)
                holding = None
        if holding is None:
            holding = self.of_streams[key] = Holding()
        holding.stream_id = identity
        return holding

    def _rest(self, holding: Holding) -> None:
        """Of a destroyed stream. The oldest that rest come back if they are too many; a graph's workspaces never."""
        holding.workspaces = [workspace for workspace in holding.workspaces if not workspace.is_captured]
        self.resting.append(holding)
        self.resting_bytes += holding.nbytes
        while len(self.resting) > RESTING_STREAMS or self.resting_bytes > RESTING_BYTES:
            oldest = self.resting.popleft()
            self.resting_bytes -= oldest.nbytes
            self._take_back(oldest)

    def _take_back(self, holding: Holding) -> None:
        for address, num_ints in holding.counters:
            self.counters.give_back(address, num_ints)
        self.spare += holding.workspaces

    def _take(self, num_ints: int, kept: int = 0) -> int:
        """As Counters.take, but that some are kept back; NotWarmedUp if too few are left."""
        address = self.counters.take(num_ints, kept)
        if not address:
            self._reclaim()
            address = self.counters.take(num_ints, kept)
        if not address:
            raise NotWarmedUp(
                f"the {NUM_COUNTERS} counters of this context are with streams and captured launches, too few are left "
                f"for {num_ints} int32: give tile_counter with calls that are captured, or destroy graphs"
            )
        return address

    def _spare_or_new(self, outgrown: Workspace | None, partial_bytes: int) -> Workspace:
        """A workspace of at least this size, and twice what is too small: few of them are ever made."""
        if not partial_bytes:
            return Workspace()
        self._reclaim()
        for workspace in self.spare:
            if workspace.partial_bytes >= partial_bytes:
                self.spare.remove(workspace)
                return workspace
        too_small = [workspace.partial_bytes for workspace in (*self.spare, *([outgrown] if outgrown else []))]
        nbytes = max([partial_bytes, *(2 * size for size in too_small)])
        return Workspace(allocate(nbytes, "a workspace"), nbytes)

    def _reclaim(self) -> None:
        """Take back what graphs and threads held that are gone."""
        with capture_rules_relaxed():
            gone = [capture for capture, holding in self.of_captures.items() if holding.is_done()]
            done = [self.of_captures.pop(capture) for capture in gone]
            left = []
            for holding in self.ending:
                (done if holding.is_done() else left).append(holding)
            self.ending = left
        for holding in done:
            self._take_back(holding)


def is_over(event) -> bool:
    """Whether the work before an event is done; the event is destroyed then."""
    (failed,) = driver.cuEventQuery(event)
    if failed:
        return False
    driver.cuEventDestroy(event)
    return True


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = ctypes.c_size_t, ctypes.c_size_t
    libc.free.argtypes = libc.sem_trywait.argtypes = (ctypes.c_void_p,)
    libc.sem_init.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    return libc


def end_of(graph) -> Callable[[], bool]:
    """What says whether a graph that is being captured, all its instances and their launches are over.

    The driver tells at any time, on a thread of its own, also when Python has ended: that posts a semaphore, and no
    Python runs. The semaphore is freed once it was seen.
    """
    libc = _libc()
    semaphore = libc.calloc(1, SEMAPHORE_BYTES)
    libc.sem_init(semaphore, 0, 0)
    post = driver.CUhostFn(ctypes.cast(libc.sem_post, ctypes.c_void_p).value)
    flags = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
    token = checked(driver.cuUserObjectCreate(semaphore, post, 1, flags), "following a captured graph")
    move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
    (failed,) = driver.cuGraphRetainUserObject(graph, token, 1, move)
    if failed:  # a graph that cannot be followed keeps what it has
        return lambda: False

    def is_over() -> bool:
        if libc.sem_trywait(semaphore):
            return False
        libc.free(semaphore)
        return True

    return is_over


# ---- contexts and threads --------------------------------------------------------------------------------------------


class Contexts:
    """The memory of each context, by its id. `num_gone` counts those that are known to be no more."""

    def __init__(self):
        self.lock = threading.Lock()
        self.memories: dict[int, Memory] = {}
        self.ids: dict[int, int] = {}  # by handle
        self.num_gone = 0

    def memory(self) -> Memory:
        """The current context's, made if it is not there: outside of captures of the calling thread."""
        context = context_id()
        with self.lock:
            if context not in self.memories:
                handle = current_context()
                before = self.ids.get(handle)
                if before is not None:  # destroyed or reset: the driver has freed its memory
                    self.memories.pop(before, None)
                    self.num_gone += 1
                self.ids[handle] = context
                self.memories[context] = Memory()
            return self.memories[context]


contexts = Contexts()


class _OfThread(threading.local):
    """Names the thread's default stream; below all handles."""

    def __init__(self):
        self.key = next(_keys)
        self.life = _Life()
        finalizer = weakref.finalize(self.life, _thread_ends, self.key, threading.get_ident())
        finalizer.atexit = False


class _Life:
    """Ends with its thread."""


_keys = itertools.count(-1, -1)


def _thread_ends(key: int, thread: int) -> None:
    """Hand on what a thread's default stream held in the current context, while the stream can be asked for its end."""
    if threading.get_ident() != thread:
        return
    try:
        memory = contexts.memories.get(context_id())
        if memory is not None:
            memory.thread_ends(key)
    except CudaFailure:  # no context, or it is gone
        pass


_of_thread = _OfThread()


def stream_key(stream: int) -> int:
    """What tells a stream from the others of its context: its handle, or the thread whose default stream it is."""
    return _of_thread.key if stream == PER_THREAD_STREAM else stream
