"""What is said of a run where something else was timed beside us: in which rows it was faster."""

from collections.abc import Sequence

from .shown import OURS, OURS_8, OURS_16

LONG = 1024  # tokens from which on FP8 has to be worth its errors


def timed(row: dict) -> dict[str, dict]:
    """What else a row timed, by name; a time that is the host's compares with nothing."""
    return {name: result for name, result in row["results"].items() if name != OURS and not result["host_bound"]}


def versus_peers(rows: Sequence[dict]) -> list[str]:
    """In which rows another library is faster: one line, none if there was no other."""
    compared, slower = 0, []
    for row in rows:
        theirs = {name: result["ratio"] for name, result in timed(row).items() if name not in (OURS_8, OURS_16)}
        if theirs:
            best = min(theirs, key=theirs.__getitem__)
            compared += 1
            slower += [f"{row['name']} ({best} {theirs[best]:.3f})"] * (theirs[best] < 1)
    return said("the better peer", compared, "rows", slower) if compared else []


def versus_16_bit(rows: Sequence[dict]) -> list[str]:
    """In which rows of long sequences our own 16-bit kernel is faster: one line, none if it was not timed."""
    ratios = {
        row["name"]: timed(row)[OURS_16]["ratio"]
        for row in rows
        if OURS_16 in timed(row) and row["case"]["seqlen_k"] >= LONG
    }
    slower = [f"{name} ({ratio:.3f})" for name, ratio in ratios.items() if ratio < 1]
    return said(OURS_16, len(ratios), f"rows from {LONG} tokens up", slower) if ratios else []


def said(other: str, compared: int, rows: str, slower: list[str]) -> list[str]:
    names = f" (its time over ours): {', '.join(slower)}" if slower else ""
    return [f"slower than {other} in {len(slower) or 'none'} of {compared} {rows}{names}"]
