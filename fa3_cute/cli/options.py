"""The types of options, and how a command says that it cannot run."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path

FAILED, CANNOT_RUN = 1, 2  # exit statuses


def cannot_run(reason: object) -> int:
    """Says on stderr why a command does nothing; its exit status. Stdout is for results alone, also with --json."""
    print(reason, file=sys.stderr)
    return CANNOT_RUN


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: an int of at least so much."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:20]!r}: must be an int") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return parse


count = whole(1)


def milliseconds(text: str) -> float:
    """An argparse type: a positive, finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:20]!r}: must be a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text}: must be positive and finite")
    return value


def new_file(text: str) -> str:
    """An argparse type: the path of a file that can be written, so that a long run does not end in vain."""
    folder = Path(text).parent
    if not os.access(folder, os.W_OK | os.X_OK) or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a file in a folder that can be written to")
    return text


def one_or_more(kind: Callable, choices: Collection | None = None) -> Callable[[str], list]:
    """An argparse type: "a,b,c" to a list of `kind`, each one of `choices` if given."""

    def parse(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {kind.__name__} values, separated by commas") from None
        for value in values:
            if choices is not None and value not in choices:
                raise argparse.ArgumentTypeError(f"{value!r}: must be one of {', '.join(map(str, choices))}")
        return values

    return parse


def counted(number: int, noun: str) -> str:
    """ "1 kernel", "2 kernels"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
