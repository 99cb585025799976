"""Compiled kernels on disk, so that the next process launches without compiling. Standard library only.

One file per kernel, `<name>-<key>.o`: the exported object followed by a trailer of MAGIC and the SHA-256 of key and
object. An ELF reader ignores bytes behind its sections, so the file is still an object to every tool, and one atomic
rename publishes both. Nothing reaches the native loader, which may crash on damaged code, before its trailer matches.

Code that is loaded must come from its own user: a folder or a file that belongs to somebody else, or a folder that
others may write to, counts as absent. Whatever goes wrong here is a miss, logged, never an error: the kernel is
compiled again, or kept in memory only.
"""

import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

MAGIC = b"fa3cute1"
TRAILER_BYTES = len(MAGIC) + hashlib.sha256().digest_size
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
KEY_DIGITS = 32  # of the key, in a file's name
ENTRY_NAME = re.compile(rf"(\w+)-[0-9a-f]{{{KEY_DIGITS}}}\.o")
LEFTOVER_NAME = re.compile(r"\.\w+\.tmp")
LEFTOVER_SECONDS = 3600  # a temporary file so old was left behind by a process that died

log = logging.getLogger("fa3_cute")


def cache_dir() -> Path | None:
    """The folder of the disk cache, whether or not it exists; None where the user has no home folder.

    `$FA3_CUTE_CACHE_DIR` itself, else `fa3_cute` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if own := os.environ.get("FA3_CUTE_CACHE_DIR"):
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # the XDG specification: ignore a relative path
        shared = os.path.expanduser("~/.cache")
    return Path(shared, "fa3_cute") if os.path.isabs(shared) else None


def find(name: str, key: str) -> Path | None:
    """The object stored under a key, checked byte for byte; None where there is none that can be trusted."""
    folder = _trusted_folder()
    if folder is None:
        return None
    path = _path(folder, name, key)
    try:
        data = _read_own_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("ignoring %s: %s", path, error)
        return None
    if data[-TRAILER_BYTES:] != _trailer(key, data[:-TRAILER_BYTES]):
        log.warning("ignoring %s: damaged, or not written for this key", path)
        return None
    return path


def store(name: str, key: str, code: bytes) -> Path | None:
    """Write an object atomically and return its path; None where the disk does not allow it."""
    directory = cache_dir()
    try:
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = _trusted_folder()
        return folder and _replace(_path(folder, name, key), code + _trailer(key, code))
    except OSError as error:
        log.warning("%s stays in memory only: %s", name, error)
        return None


class Entry(NamedTuple):
    """A file of the cache: `name` is its kernel's, None for a temporary file that a dead process left behind."""

    path: Path
    name: str | None
    nbytes: int
    seconds_old: float


def entries() -> list[Entry]:
    """The files of the cache, the newest first, trusted or not; [] where there is no folder. Raises OSError where the
    folder cannot be read. Other files in it are not the cache's and are left out."""
    folder = cache_dir()
    if folder is None or not folder.exists():
        return []
    with os.scandir(folder) as files:
        found = [entry for file in files if (entry := _entry(file))]
    return sorted(found, key=lambda entry: (entry.seconds_old, entry.path.name))


def clear() -> list[Entry]:
    """Remove the files of the cache and return those that were removed; a kernel that is loaded stays loaded."""
    removed = []
    for entry in entries():
        try:
            entry.path.unlink()
            removed.append(entry)
        except OSError as error:
            log.warning("%s was not removed: %s", entry.path, error)
    return removed


def folder_problem() -> str | None:
    """Why kernels cannot be kept in the cache folder, in a sentence; None if they can. Makes no folder."""
    folder = cache_dir()
    if folder is None:
        return "this user has no home folder: set FA3_CUTE_CACHE_DIR"
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable"
    if existing == folder and _trusted_folder() is None:
        return f"{folder} belongs to another user or others may write to it: nothing is kept in it or read from it"
    return None


def _entry(file: os.DirEntry) -> Entry | None:
    try:
        facts = file.stat(follow_symlinks=False)
    except OSError:  # removed in between
        return None
    age = max(0.0, time.time() - facts.st_mtime)
    match = ENTRY_NAME.fullmatch(file.name)
    is_leftover = LEFTOVER_NAME.fullmatch(file.name) and age > LEFTOVER_SECONDS
    if not stat.S_ISREG(facts.st_mode) or not (match or is_leftover):
        return None
    return Entry(Path(file.path), match and match[1], facts.st_size, age)


def _path(folder: Path, name: str, key: str) -> Path:
    return folder / f"{name}-{key[:KEY_DIGITS]}.o"


def _trailer(key: str, code: bytes) -> bytes:
    return MAGIC + hashlib.sha256(key.encode() + code).digest()


def _trusted_folder() -> Path | None:
    folder = cache_dir()
    try:
        facts = folder and folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("ignoring the cache folder %s: %s", folder, error)
        return None
    if facts is None:
        return None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & WRITABLE_BY_OTHERS:
        log.warning("ignoring the cache folder %s: it must be a folder that only this user may write to", folder)
        return None
    return folder


def _read_own_file(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise PermissionError("not a file of this user")
        return file.read()


def _replace(path: Path, data: bytes) -> Path:
    """All of the file or nothing: readers in other processes never see a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
