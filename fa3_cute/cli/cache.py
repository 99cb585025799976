"""The compiled kernels on disk: `list` shows name, size and age of each, `path` prints the folder, `clear` removes them
without asking and says how many files and bytes that were. A kernel is found by its name and a hash of all that it
depends on: after a change of sources, options or versions, old files stay behind unused.

`export DIR` copies those kernels that `compile` knows and this installation would load, for an image or a wheel: a
process that names DIR in FA3_CUTE_CACHE_PATH reads them there. `list` and `path` show such folders too, nothing writes
to them.

Other files in the folder are left alone, temporary ones of a process that died are cleared after an hour. Exit status
1 if a file could not be removed, if there is no kernel to copy or nobody would read the copies; 2 if the folder cannot
be read or written, or if there is none because the user has no home folder. FA3_CUTE_CACHE_DIR moves it.
"""

import argparse
import json
import sys
from pathlib import Path

from ..planning.key_source import PAGE_BOXES
from ..runtime import disk_cache
from .kernels import beside_tables, of_tables
from .table import Table

COLUMNS = (("kernel", 39), ("KB", 7), ("age", 6))
LEFTOVER = "(left behind)"
UNITS = (("s", 60), ("min", 60), ("h", 24))


def add_arguments(parser) -> None:
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("dir", nargs="?", type=folder_name, metavar="DIR", help="of export: the folder to copy to")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def folder_name(text: str) -> Path:
    """A folder that was named; "" is no name, it would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("'': must name a folder")
    return Path(text)


def run(args) -> int:
    if (args.dir is None) == (args.action == "export"):
        print("cache: export, and nothing else, takes a folder: cache export DIR", file=sys.stderr)
        return 2
    folder = disk_cache.cache_dir()
    if folder is None and args.action != "export":  # which may read from folders that are only read
        print(f"cache: {disk_cache.folder_problem()}", file=sys.stderr)
        return 2
    answer, say = ACTIONS[args.action]
    try:
        facts = {"path": folder and str(folder)} | (answer(args.dir) if args.dir else answer())
    except OSError as error:
        doing = f"{args.dir} cannot be written" if args.dir else f"{folder} cannot be read"
        print(f"cache: {doing}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        say(facts)
    return 1 if has_failed(args.action, facts) else 0


def has_failed(action: str, facts: dict) -> bool:
    return bool(facts.get("left") or facts.get("problem") or action == "export" and not facts["files"])


def path() -> dict:
    folder = disk_cache.cache_dir()
    return {"exists": folder is not None and folder.is_dir()} | read_only()


def list_entries() -> dict:
    found = disk_cache.entries()
    return totals(found) | {"entries": [row(entry) for entry in found]} | read_only()


def row(entry: disk_cache.Entry) -> dict:
    return {
        "name": entry.name,
        "file": entry.path.name,
        "bytes": entry.nbytes,
        "seconds_old": round(entry.seconds_old),
    }


def read_only() -> dict:
    """The folders of FA3_CUTE_CACHE_PATH, with what is wrong with them."""
    found = []
    for folder in disk_cache.read_only_dirs():
        problem = disk_cache.read_only_problem(folder)
        found.append({"path": str(folder), "problem": problem} | totals([] if problem else disk_cache.entries(folder)))
    return {"read_only": found}


def clear() -> dict:
    return totals(disk_cache.clear()) | {"left": len(disk_cache.entries())}


def export(folder: Path) -> dict:
    """Copies of the kernels that `compile` knows, also of those over caches and pages; missing are those of dense and
    packed calls that were not compiled here."""
    from ..runtime.compiler import cache_key  # the DSL takes half a second to import

    dense = of_tables(None)
    others = {cfg.name: cfg for page_size in (0, *PAGE_BOXES) for cfg in of_tables(page_size)}
    others |= {cfg.name: cfg for cfg in beside_tables()}
    found = {cfg.name: disk_cache.export(folder, cfg.name, cache_key(cfg)) for cfg in (*dense, *others.values())}
    paths = list(filter(None, found.values()))
    nbytes = sum(path.stat().st_size for path in paths)
    problem = disk_cache.read_only_problem(folder) if paths else None
    rest = {"missing": sum(not found[cfg.name] for cfg in dense), "problem": problem}
    return {"to": str(folder), "files": len(paths), "bytes": nbytes} | rest


def say_path(facts: dict) -> None:
    print(facts["path"])
    for folder in facts["read_only"]:
        print(f"{folder['path']} (only read)")


def say_entries(facts: dict) -> None:
    if facts["entries"]:
        table = Table(COLUMNS)
        for entry in facts["entries"]:
            table.print_row([entry["name"] or LEFTOVER, f"{entry['bytes'] / 1000:.1f}", age(entry["seconds_old"])])
    print(f"{size(facts)} in {facts['path']}")
    for folder in facts["read_only"]:
        print(folder["problem"] or f"{size(folder)} in {folder['path']}, which is only read")


def say_exported(facts: dict) -> None:
    print(f"copied {size(facts)} to {facts['to']}")
    if facts["missing"]:
        print(f"{facts['missing']} kernels of the tables are not in the cache: `compile` makes them")
    if facts["problem"]:
        print(facts["problem"])


def say_cleared(facts: dict) -> None:
    print(f"removed {size(facts)} from {facts['path']}")
    if facts["left"]:
        print(f"{facts['left']} could not be removed")


# By the action's name: what it does and answers, and how that is said.
ACTIONS = {
    "list": (list_entries, say_entries),
    "path": (path, say_path),
    "clear": (clear, say_cleared),
    "export": (export, say_exported),
}


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
