"""What tables tell of a result, printed and in markdown: rates of arithmetic, or of memory. bench.py says what is what.

A column is (heading, width where it is printed, text of a result). A result is what bench.py makes of the rounds of one
implementation; a row holds them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

OURS = "fa3_cute"
OURS_16 = "ours bf16"  # our own 16-bit kernel, which is timed beside FP8
OURS_8 = "ours fp8"  # with FP8 queries too, timed beside 16-bit queries over an FP8 cache
Column = tuple[str, int, Callable[[dict], str]]


@dataclass(frozen=True)
class Shown:
    """The columns of our own result and the one of a peer's, which is printed under the peer's name.

    problem    the columns of markdown that say which problem it was: (heading, name in the JSON of a case)
    has_variants   whether a cell has what problems differ in besides, side by side
    """

    printed: tuple[Column, ...]
    markdown: tuple[Column, ...]
    peer: Column
    problem: tuple[tuple[str, str], ...] = (
        ("type", "dtype"),
        ("head_dim", "head_dim"),
        ("heads", "heads"),
        ("sequences", "layout"),
    )
    has_variants: bool = True


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


def of_first(result: dict) -> str:
    """Of the rows that were timed together, the time over the first one's."""
    return f"{result['of_first']:.3f}"


def known(name: str, text: Callable[[dict], str]) -> Callable[[dict], str]:
    """The text of a result that was measured, else a dash."""
    return lambda result: text(result) if name in result else "-"


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
