"""What is remembered of calls that were good, by their values. Pure Python."""

from typing import Generic, TypeVar

MAX_SHAPES = 512  # that are remembered; the next one starts anew
Found = TypeVar("Found")


class Known(Generic[Found]):
    """{values of a call: what was found for it}."""

    def __init__(self):
        self._found: dict[tuple, Found] = {}

    def get(self, values: tuple) -> Found | None:
        """None for those that have not come before."""
        try:
            return self._found.get(values)
        except Exception:  # a value that cannot be hashed or compared: the rules put it into words
            return None

    def remember(self, values: tuple, found: Found) -> None:
        """Of values that are what they are, not objects that may change (`are_constants`)."""
        if len(self._found) >= MAX_SHAPES:
            self._found.clear()
        self._found[values] = found

    def clear(self) -> None:
        """Nothing has come before."""
        self._found.clear()
