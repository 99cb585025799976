"""Compiles in processes: the DSL compiles one kernel at a time per process."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import active_children, get_context
from pathlib import Path


def spread(function: Callable, items: Sequence, jobs: int) -> Iterator:
    """Yields a function's result for each item, in order; `jobs` processes work at a time.

    They end with the iterator: also where Ctrl-C or an error stops it, whatever they are at. Ctrl-C is for the caller
    alone, of whose group they are.
    """
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    others = set(active_children())
    with ProcessPoolExecutor(
        min(jobs, len(items)), get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        try:
            # Not pool.map, which cancels what is left: over that the pool stumbles when its processes are gone.
            for future in [pool.submit(function, item) for item in items]:
                yield future.result()
        except BaseException:
            for process in set(active_children()) - others:
                kill(process.pid)
            raise


def kill(pid: int | None) -> None:
    """Ends a process, if there is one, and first those that it has started: a worker's compiler."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            for child in task.read_text().split():
                kill(int(child))
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
