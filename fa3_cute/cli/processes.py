"""Compiles in processes: the DSL compiles one kernel at a time per process."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def spread(function: Callable, items: Sequence, jobs: int) -> Iterator:
    """Yields a function's result for each item, in order; `jobs` processes work at a time."""
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, items)
