"""What the host spends: CPU time of one forward() call, and the time to a process's first result.

bench --suite host. Of calls: microseconds of the calling thread's CPU time, from batches of calls with no wait in
between; the median over batches. The problem is small and its sizes change as a caller's do: not at all, between two
shapes in turn, or to one never seen before in every call. Then the same call over pages: packed decodes, and decodes
beside a chunk of a prompt, which are two launches. With --peers fa3, calls of torch tensors too (wrappers.py). Of
starts: seconds from the import to the first result of a fresh process, CUDA context included, with no kernel on disk
(cold) and with the one that the cold one left (warm).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count, cycle, islice
from statistics import median

from .. import FlashAttentionParams, forward
from ..arrays.memory import hopper_device_problem, open_device
from . import environment, wrappers
from .case import Case, Tensors
from .measure import Monitor
from .options import cannot_run
from .peers import PeerMissing
from .table import Table

CASE = Case("bf16", 128, True, 128, 8192, 1, 16, 16)
PAGED = {
    f"{label}, pages of 16": Case(
        "bf16", 128, True, max(queries), 512, 8, 16, 2, lengths=queries, lengths_k=(512,) * 8, page_size=16
    )
    for label, queries in (("8 decodes", (1,) * 8), ("7 decodes and a chunk", (1,) * 7 + (128,)))
}
CALLS = 200  # in a batch: fewer than a stream queues before launching blocks
BATCHES_PER_ROUND = 3
FIXED = ("head_dim", "seqlen", "dtype", "masks", "batch_size", "num_heads", "num_heads_k", "plot")
FIRST_RESULT = (
    "import time; began = time.perf_counter(); from fa3_cute.cli import host; host.first_result(); "
    "print(time.perf_counter() - began)"
)


def run(args) -> int:
    if fixed := [name for name in FIXED if getattr(args, name) is not None]:
        return cannot_run(f"the host suite has its own {', '.join(fixed)}")
    if problem := hopper_device_problem():
        return cannot_run(f"bench needs a Hopper GPU: {problem}")
    device = open_device()
    stream = device.create_stream()
    known = environment.describe(device, Monitor(device), {}, args)
    print(environment.sentence(known))
    tensors, handle = Tensors([CASE, *PAGED.values()], stream), int(stream.handle)
    table, rows = Table((("host", 36), ("median", 8), ("", 3))), []
    kinds = changing(tensors.params(CASE))
    kinds |= {name: cycle([tensors.params(case)]) for name, case in PAGED.items()}
    try:
        through_torch = list(wrappers.rows(args.rounds)) if "fa3" in args.peers else []
    except PeerMissing as error:
        return cannot_run(str(error))
    for name, value, unit in [*calls(kinds, handle, stream.sync, args.rounds), *through_torch, *starts(args.rounds)]:
        rows.append({"name": name, "value": value, "unit": unit})
        table.print_row([name, f"{value:.2f}", unit])
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"environment": known, "host": rows}, file, indent=1)
    return 0


def changing(params: FlashAttentionParams) -> dict[str, Iterable[FlashAttentionParams]]:
    """Endless calls by name, for each way in which shapes change."""
    other = replace(params, seqlen_k=params.seqlen_k // 2)
    return {
        "the same call": cycle([params]),
        "two shapes in turn": cycle([params, other]),
        "a new shape each call": new_shapes(params),
    }


def calls(
    kinds: dict[str, Iterable[FlashAttentionParams]], handle: int, sync: Callable, rounds: int
) -> Iterator[tuple[str, float, str]]:
    """(name, median, unit) of the CPU time of a call of each kind."""
    for name, every in kinds.items():
        yield name, microseconds(every, handle, sync, rounds), "us"


def new_shapes(params: FlashAttentionParams) -> Iterator[FlashAttentionParams]:
    """The params with one key less each time; another query row less where these run out."""
    for number in count():
        rows, keys = divmod(number, params.seqlen_k)
        yield replace(params, seqlen_q=params.seqlen_q - rows, seqlen_k=params.seqlen_k - keys)


def microseconds(every: Iterable[FlashAttentionParams], handle: int, sync: Callable, rounds: int) -> float:
    """CPU time of one forward() of the next params. The first batch, which loads the kernel, does not count."""
    every, means = iter(every), []
    for _ in range(1 + rounds * BATCHES_PER_ROUND):
        batch = list(islice(every, CALLS))
        sync()
        began = time.thread_time()
        for params in batch:
            forward(params, handle)
        means.append((time.thread_time() - began) / CALLS)
        forward(batch[-1], handle).check()
    sync()
    return 1e6 * median(means[1:])


def starts(rounds: int) -> Iterator[tuple[str, float, str]]:
    """(name, median, unit) of the time to a process's first result."""
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fa3_cute_") as folder:
            cold.append(start(folder))
            warm.append(start(folder))
    yield "cold start", median(cold), "s"
    yield "warm start", median(warm), "s"


def start(folder: str) -> float:
    """Seconds to the first result of a process that keeps its kernels in a folder."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("FA3_CUTE_")}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RESULT],
        env=others | {"FA3_CUTE_CACHE_DIR": folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def first_result() -> None:
    """One forward() of a fresh process, waited for."""
    stream = open_device().create_stream()
    params = Tensors([CASE.shortened(CASE.seqlen_q)], stream).params(CASE.shortened(CASE.seqlen_q))
    forward(params, int(stream.handle)).check()
    stream.sync()
