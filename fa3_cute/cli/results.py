"""What the benchmark makes of the rounds of one implementation: medians, and ratios of the batches of one round."""

from collections.abc import Iterable
from statistics import median

from .case import COPIED_BYTES, Case
from .measure import Batch

FLOPS_PER_CLOCK_AND_SM = {1: 8192, 2: 4096}  # dense WGMMA, by the bytes of an operand's element


def medians(case: Case, batches: list[Batch], ours: list[Batch], num_sms: int) -> dict:
    """Medians over the rounds of one implementation, and its time over ours, round by round."""
    milliseconds = median(batch.milliseconds for batch in batches)
    tflops = case.flops / milliseconds / 1e9
    clock, power = (middle(getattr(batch, name) for batch in batches) for name in ("clock_mhz", "power_watts"))
    return {
        "ms": milliseconds,
        "tflops": tflops,
        "peak": clock and tflops * 1e6 / (num_sms * FLOPS_PER_CLOCK_AND_SM[case.element_bytes] * clock),
        "clock_mhz": clock,
        "power_watts": power,
        "ratio": ratio(batches, ours),
        "host_bound": sum(batch.is_host_bound for batch in batches) > len(batches) / 2,
        "rounds_ms": [batch.milliseconds for batch in batches],
    }


def ratio(batches: list[Batch], others: list[Batch]) -> float:
    """The time over another one, the median over the rounds."""
    return median(mine.milliseconds / other.milliseconds for mine, other in zip(batches, others, strict=True))


def bandwidths(case: Case, batches: list[Batch], copies: list[Batch]) -> dict:
    """GB/s of one implementation and of the copy, medians over the rounds, and the first over the second, per round."""

    def rates(nbytes: int, timed: list[Batch]) -> list[float]:
        return [nbytes / batch.milliseconds / 1e6 for batch in timed]

    own, copy = rates(case.nbytes, batches), rates(2 * COPIED_BYTES, copies)
    return {
        "gbs": median(own),
        "copy_gbs": median(copy),
        "of_copy": median(mine / theirs for mine, theirs in zip(own, copy, strict=True)),
    }


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
