"""Tables, plain and in markdown."""

from collections.abc import Sequence


class Table:
    """An aligned table that is printed row by row, so that a long run shows its progress.

    Columns are (heading, width) pairs; a cell is aligned right, the first one left, and a wider one pushes its row out.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]):
        self.widths = [max(width, len(heading)) for heading, width in columns]
        self.print_row([heading for heading, _ in columns])

    def print_row(self, cells: Sequence[object]):
        first, *rest = (str(cell) for cell in cells)
        aligned = [first.ljust(self.widths[0])]
        aligned += (cell.rjust(width) for cell, width in zip(rest, self.widths[1:], strict=True))
        print("  ".join(aligned).rstrip(), flush=True)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
