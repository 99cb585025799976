"""What this process has done so far, as `stats()` tells it."""

import sys
import threading
from typing import Any

PACKAGE = __name__.rpartition(".tracing.")[0]


class Counter:
    """Counts what any thread does, and the seconds that it takes."""

    def __init__(self):
        self.lock = threading.Lock()
        self.value, self.seconds = 0, 0.0

    def add(self, seconds: float = 0.0) -> None:
        """One more."""
        with self.lock:
            self.value += 1
            self.seconds += seconds


calls: dict[str, Counter] = {}  # by function; empty where calls are not counted
first_calls = Counter()
compiled, from_disk = Counter(), Counter()  # kernels, by where they came from


def stats() -> dict[str, Any]:
    """What the package has done and holds in this process; asks no device and waits for none. Ready for JSON.

    calls              {"forward": .., "merge_attention": .., "backward": ..}, refused ones too; None without
                       FA3_CUTE_STATS=1 at the import, since to count costs each call some time
    first_calls        of `forward`: those that were checked and planned in full, refused ones too. Where they grow
                       with every call, shapes, kinds of addresses or devices are new ones each time
    compiles           kernels that were compiled, and compile_seconds, which include the wait for a process to do so
    disk_hits          kernels that were read from a cache folder instead
    kernels            names of the kernels that are loaded, on some device
    workspaces         {"number": .., "bytes": ..} of split-KV's scratch memory that is the library's own
    counters_bytes     of the other device memory that it has made: a block of counters in each context
    """
    return {
        "calls": {name: count.value for name, count in calls.items()} or None,
        "first_calls": first_calls.value,
        "compiles": compiled.value,
        "compile_seconds": compiled.seconds,
        "disk_hits": from_disk.value,
        "kernels": _kernels(),
        **_memory(),
    }


def _loaded(module: str) -> Any:
    """A module of the runtime, None if nothing has needed it so far: it imports CUDA and the DSL."""
    return sys.modules.get(f"{PACKAGE}.{module}")


def _kernels() -> list[str]:
    launch = _loaded("launch")
    return [] if launch is None else sorted(cfg.name for cfg, kernel in list(launch._kernels.items()) if kernel.num_sms)


def _memory() -> dict[str, Any]:
    scratch = _loaded("scratch")
    memories = [] if scratch is None else list(scratch.contexts.memories.values())
    found = [workspace for memory in memories for workspace in _workspaces(memory)]
    nbytes = sum(workspace.partial_bytes + 4 * workspace.num_arrivals for workspace in found)
    counters = len(memories) * scratch.NUM_COUNTERS * scratch.SPACING if scratch else 0
    return {"workspaces": {"number": len(found), "bytes": nbytes}, "counters_bytes": counters}


def _workspaces(memory: Any) -> list:
    """Those of one context: of streams, of destroyed ones and of threads that have ended, and spare ones."""
    with memory.lock:
        holdings = (*memory.of_streams.values(), *memory.ending, *memory.resting)
        return [workspace for holding in holdings for workspace in holding.workspaces] + memory.spare
