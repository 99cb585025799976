"""The compiled kernels on disk: `list` shows name, size and age of each, `path` prints the folder, `clear` removes them
without asking and says how many files and bytes that were. A kernel is found by its name and a hash of all that it
depends on: after a change of sources, options or versions, old files stay behind unused.

Other files in the folder are left alone, temporary ones of a process that died are cleared after an hour. Exit status
1 if a file could not be removed, 2 if the folder cannot be read or there is none because the user has no home folder.
FA3_CUTE_CACHE_DIR moves it.
"""

import json
import sys

from ..runtime import disk_cache
from .table import Table

COLUMNS = (("kernel", 39), ("KB", 7), ("age", 6))
LEFTOVER = "(left behind)"
UNITS = (("s", 60), ("min", 60), ("h", 24))


def add_arguments(parser) -> None:
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args) -> int:
    folder = disk_cache.cache_dir()
    if folder is None:
        print(f"cache: {disk_cache.folder_problem()}", file=sys.stderr)
        return 2
    answer, say = ACTIONS[args.action]
    try:
        facts = {"path": str(folder)} | answer()
    except OSError as error:
        print(f"cache: {folder} cannot be read: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        say(facts)
    return 1 if facts.get("left") else 0


def path() -> dict:
    folder = disk_cache.cache_dir()
    return {"exists": folder is not None and folder.is_dir()}


def list_entries() -> dict:
    found = disk_cache.entries()
    rows = [
        {"name": entry.name, "file": entry.path.name, "bytes": entry.nbytes, "seconds_old": round(entry.seconds_old)}
        for entry in found
    ]
    return totals(found) | {"entries": rows}


def clear() -> dict:
    return totals(disk_cache.clear()) | {"left": len(disk_cache.entries())}


def say_path(facts: dict) -> None:
    print(facts["path"])


def say_entries(facts: dict) -> None:
    if facts["entries"]:
        table = Table(COLUMNS)
        for entry in facts["entries"]:
            table.print_row([entry["name"] or LEFTOVER, f"{entry['bytes'] / 1000:.1f}", age(entry["seconds_old"])])
    print(f"{size(facts)} in {facts['path']}")


def say_cleared(facts: dict) -> None:
    print(f"removed {size(facts)} from {facts['path']}")
    if facts["left"]:
        print(f"{facts['left']} could not be removed")


# By the action's name: what it does and answers, and how that is said.
ACTIONS = {"list": (list_entries, say_entries), "path": (path, say_path), "clear": (clear, say_cleared)}


def totals(found: list[disk_cache.Entry]) -> dict:
    return {"files": len(found), "bytes": sum(entry.nbytes for entry in found)}


def size(facts: dict) -> str:
    return f"{facts['files']} file{'' if facts['files'] == 1 else 's'}, {facts['bytes']} bytes"


def age(seconds: float) -> str:
    """In the largest unit of which it is at least two: "90 s", "3 h"."""
    for unit, factor in UNITS:
        if seconds < 2 * factor:
            return f"{seconds:.0f} {unit}"
        seconds /= factor
    return f"{seconds:.0f} d"
