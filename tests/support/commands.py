"""Commands as tests run them."""

import json
from pathlib import Path

from fa3_cute.cli import main


def answer(capsys, *argv: str) -> tuple[int, dict]:
    """Exit status and JSON of a command."""
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def running() -> dict[int, int]:
    """Group by process of all that run here; not of those that have ended and wait to be collected."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            found[int(file.parent.name)] = int(group)
    return found
