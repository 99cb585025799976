"""Timing with CUDA events, in interleaved rounds, and what the card was doing meanwhile."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from statistics import median
from typing import Any

# A stream queues about a thousand launches before launching blocks: below that, the host's time is its own.
MAX_LAUNCHES = 512
# The host needs more than this share of a batch to queue it: the GPU waited for the host, and the time is the host's.
HOST_BOUND = 0.9
# Shorter calls are replayed from a CUDA graph: one by one, the gaps between them would count.
SHORT_MS = 0.05
CALLS_PER_GRAPH = 20


@dataclass(frozen=True)
class Work:
    """What a batch repeats: `launch()` queues `calls` calls of one implementation."""

    launch: Callable
    calls: int = 1


@dataclass(frozen=True)
class Batch:
    """One timed batch of launches. Times are per call; the clock is the median of its samples, None if unknown."""

    milliseconds: float
    host_microseconds: float
    clock_mhz: float | None
    power_watts: float | None

    @property
    def is_host_bound(self) -> bool:
        return self.host_microseconds > HOST_BOUND * 1000 * self.milliseconds


def in_turn(launches: Sequence[Callable]) -> Callable:
    """One launch that is the next of these each time it is called, and after the last one the first again."""
    if len(launches) == 1:
        return launches[0]
    turn = cycle(launches)
    return lambda: next(turn)()


class Monitor:
    """The SM clock and the power draw of a cuda.core device, read through NVML.

    The clock is NVML's current SM clock, the power NVML's average over the last second. `problem` says why they are
    unknown, where they are; samples are then None.
    """

    def __init__(self, device):
        self.problem = None
        try:
            from cuda.bindings import nvml

            nvml.init_v2()
            self.handle = nvml.device_get_handle_by_pci_bus_id_v2(device.pci_bus_id)
            self.nvml = nvml
            self.sample()
        except Exception as error:  # no library, no permission, a virtual card: then without clocks
            self.problem = f"{type(error).__name__}: {error}"

    def sample(self) -> tuple[int | None, float | None]:
        """(SM clock in MHz, power in W) now."""
        if self.problem:
            return None, None
        return (
            self.nvml.device_get_clock_info(self.handle, self.nvml.ClockType.CLOCK_SM),
            self.nvml.device_get_power_usage(self.handle) / 1000,
        )

    def limits(self) -> dict:
        """The card's maximal SM clock and its power limit, and the driver's version; empty where NVML cannot tell."""
        if self.problem:
            return {}
        return {
            "max_clock_mhz": self.nvml.device_get_max_clock_info(self.handle, self.nvml.ClockType.CLOCK_SM),
            "power_limit_watts": self.nvml.device_get_enforced_power_limit(self.handle) / 1000,
            "driver": self.nvml.system_get_driver_version(),
        }


class Stopwatch:
    """Times launches on one cuda.core stream."""

    def __init__(self, device, stream):
        from cuda.core import EventOptions

        self.stream = stream
        self.monitor = Monitor(device)
        self.start, self.stop = (device.create_event(EventOptions(timing_enabled=True)) for _ in range(2))

    def time(self, work: Work, count: int) -> Batch:
        """`count` launches between two events; the clock is sampled while the GPU works off the queue."""
        self.stream.record(self.start)
        began = time.perf_counter()
        for _ in range(count):
            work.launch()
        host_seconds = time.perf_counter() - began
        self.stream.record(self.stop)
        samples = [self.monitor.sample()]
        while not self.stop.is_done:
            samples.append(self.monitor.sample())
            time.sleep(0.001)
        clock, power = (None if self.monitor.problem else median(values) for values in zip(*samples, strict=True))
        calls = count * work.calls
        return Batch((self.stop - self.start) / calls, 1e6 * host_seconds / calls, clock, power)

    def is_short(self, work: Work) -> bool:
        """Launched one by one, the host's time would show in the GPU's."""
        self.time(work, 2)
        batch = self.time(work, CALLS_PER_GRAPH)
        return batch.milliseconds < SHORT_MS or batch.is_host_bound

    def capture(self, launch: Callable, calls: int = CALLS_PER_GRAPH) -> Work:
        """So many calls of a launch on this stream as one CUDA graph."""
        builder = self.stream.create_graph_builder().begin_building()
        try:
            for _ in range(calls):
                launch()
        finally:  # a stream left capturing is lost for everything after
            builder.end_building()
        graph = builder.complete()
        return Work(lambda: graph.launch(self.stream), calls)

    def rounds(
        self, works: dict[Any, Work], rounds: int, batch_ms: float, settle_ms: float = 0.0
    ) -> dict[Any, list[Batch]]:
        """`rounds` batches of about `batch_ms` for each work, interleaved, after one round that is not recorded; before
        each batch as much of the same work as takes `settle_ms`, until the clock answers to its power alone.

        The order turns, and goes back in every other round: A B C, A C B, C A B, ... so that none always comes behind
        the same one, whose power the clock still answers to. Clock and temperature drift by more than the differences
        that matter, so only batches of one round are comparable: take ratios per round.
        """
        counts, to_settle = {}, {}
        for name, work in works.items():
            self.time(work, 2)
            launch_ms = self.time(work, 3).milliseconds * work.calls
            counts[name] = min(MAX_LAUNCHES, max(3, ceil(batch_ms / launch_ms)))
            to_settle[name] = ceil(settle_ms / launch_ms)
        batches = {name: [] for name in works}
        order = list(works)
        for number in range(rounds + 1):
            is_forth = number % 2 == 0 or len(order) == 2  # two in turn are back and forth already
            for name in order if is_forth else order[::-1]:
                for done in range(0, to_settle[name], MAX_LAUNCHES):
                    self.time(works[name], min(MAX_LAUNCHES, to_settle[name] - done))
                batch = self.time(works[name], counts[name])
                if number > 0:
                    batches[name].append(batch)
            order.append(order.pop(0))
        return batches

    def host_microseconds(self, launch: Callable, calls: int = 200, repetitions: int = 5) -> float:
        """Host time of one launch: the median over repetitions of the mean of `calls` calls with no wait in between."""
        means = []
        for _ in range(repetitions):
            self.stream.sync()
            began = time.perf_counter()
            for _ in range(calls):
                launch()
            means.append((time.perf_counter() - began) / calls)
        self.stream.sync()
        return 1e6 * median(means)
