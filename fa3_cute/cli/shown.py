"""What tables tell of a result, printed and in markdown: rates of arithmetic, or of memory. bench.py says what is what.

A column is (heading, width where it is printed, text of a result). A result is what bench.py makes of the rounds of one
implementation; a row holds them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

OURS = "fa3_cute"
OURS_16 = "ours bf16"  # our own 16-bit kernel, which is timed beside FP8
Column = tuple[str, int, Callable[[dict], str]]


@dataclass(frozen=True)
class Shown:
    """The columns of our own result and the one of a peer's, which is printed under the peer's name."""

    printed: tuple[Column, ...]
    markdown: tuple[Column, ...]
    peer: Column


def rate(result: dict) -> str:
    return f"{result['tflops']:.1f}{mark(result)}"


def bandwidth(result: dict) -> str:
    return f"{result['gbs']:.0f}{mark(result)}"


def microseconds(result: dict) -> str:
    return f"{1000 * result['ms']:.1f}"


def marked_microseconds(result: dict) -> str:
    return microseconds(result) + mark(result)


def mark(result: dict) -> str:
    return "*" if result["host_bound"] else ""


def share(name: str) -> Callable[[dict], str]:
    return lambda result: "-" if result[name] is None else f"{result[name]:.0%}"


def whole(name: str) -> Callable[[dict], str]:
    return lambda result: "-" if result[name] is None else f"{result[name]:.0f}"


ARITHMETIC = Shown(
    printed=(
        ("TFLOP/s", 8, rate),
        ("us", 8, microseconds),
        ("peak", 5, share("peak")),
        ("MHz", 5, whole("clock_mhz")),
        ("W", 4, whole("power_watts")),
    ),
    markdown=(("us", 8, microseconds), ("TFLOP/s", 8, rate), ("of peak", 5, share("peak"))),
    peer=("TFLOP/s", 8, rate),
)
MEMORY = Shown(
    printed=(("us", 8, microseconds), ("GB/s", 6, bandwidth), ("copy", 5, share("of_copy"))),
    markdown=(("us", 8, microseconds), ("GB/s", 6, bandwidth), ("of copy", 5, share("of_copy"))),
    peer=("us", 8, marked_microseconds),
)
