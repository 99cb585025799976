"""Compiles in processes: the DSL compiles one kernel at a time per process."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context


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
            yield from pool.map(function, items)
        except BaseException:
            for process in set(active_children()) - others:
                process.kill()
            pool.shutdown(cancel_futures=True)
            raise
