"""How a rule puts what it objects to into words. Pure Python."""

from collections.abc import Sequence

from .status import shown

Sentences = Sequence[str]


def must(p, name: str, accepted: str) -> str:
    """The sentence of a field: its value as the caller wrote it, and what is accepted."""
    return f"{name}={shown(getattr(getattr(p, 'raw', p), name))}: must be {accepted}"


def listed(numbers: tuple[int, ...]) -> str:
    """In words: 64, 96 or 128."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"


def is_int(value, least: int, most: int) -> bool:
    """An int, and no bool, from least to most."""
    return type(value) is int and least <= value <= most
