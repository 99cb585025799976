"""Compiled kernels on disk, so that the next process launches without compiling. Standard library only.

One file per kernel, `<name>-<key>.o`: the exported object followed by a trailer of MAGIC and the SHA-256 of key and
object. An ELF reader ignores bytes behind its sections, so the file is still an object to every tool, and one atomic
rename publishes both. Nothing reaches the native loader, which may crash on damaged code, before its trailer matches.

Code that is loaded must come from its own user: a folder or a file that belongs to somebody else, or that others may
write to, counts as absent. Whatever goes wrong here is a miss, logged, never an error: the kernel is compiled again, or
kept in memory only.

Besides the user's own folder, those of FA3_CUTE_CACHE_PATH are searched, in their order, and never written to: kernels
that came with an image or a wheel. They may be root's as well.
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
ROOT = {0}
LEFTOVER_SECONDS = 3600  # a temporary file so old was left behind by a process that died

log = logging.getLogger("fa3_cute")


def cache_dir() -> Path | None:
    """The folder of the disk cache, whether or not it exists; None where no folder can be named.

    `$FA3_CUTE_CACHE_DIR` itself, else `fa3_cute` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if own := os.environ.get("FA3_CUTE_CACHE_DIR"):
        return _absolute(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(shared):  # the XDG specification: ignore a relative path
        shared = os.path.expanduser("~/.cache")
    return Path(shared, "fa3_cute") if os.path.isabs(shared) else None


def read_only_dirs() -> list[Path]:
    """The folders of `$FA3_CUTE_CACHE_PATH`, separated as those of PATH, whether or not they exist."""
    named = os.environ.get("FA3_CUTE_CACHE_PATH", "").split(os.pathsep)
    return [folder for name in named if name and (folder := _absolute(name))]


def _absolute(name: str) -> Path | None:
    """A folder as it was first named: of a relative one it stays the same when the working folder changes or goes."""
    if name not in _named:
        path = os.path.expanduser(name)
        try:
            if path.startswith("~"):
                raise OSError("this user has no home folder")
            _named[name] = Path(path).absolute()
        except OSError as error:  # for a relative one: there is no working folder
            log.warning("ignoring the cache folder %s: %s", name, error)
            return None
    return _named[name]


_named: dict[str, Path] = {}


class Found(NamedTuple):
    """A kernel's object and the file that it was read from."""

    path: Path
    code: bytes


def read(name: str, key: str) -> Found | None:
    """The object stored under a key, checked byte for byte; None where there is none that can be trusted."""
    return next((found for folder in _trusted_folders() if (found := _read(_path(folder, name, key), key))), None)


def find(name: str, key: str) -> Path | None:
    """The file of that object."""
    found = read(name, key)
    return found and found.path


def _read(path: Path, key: str) -> Found | None:
    try:
        data = _read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("ignoring %s: %s", path, error)
        return None
    code = data[:-TRAILER_BYTES]
    if data[-TRAILER_BYTES:] != _trailer(key, code):
        log.warning("ignoring %s: damaged, or not written for this key", path)
        return None
    return Found(path, code)


def store(name: str, key: str, code: bytes) -> Path | None:
    """Write an object atomically and return its path; None where the disk does not allow it."""
    directory = cache_dir()
    try:
        if directory is not None:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = _trusted(directory, _own())
        return folder and _replace(_path(folder, name, key), code + _trailer(key, code))
    except OSError as error:
        log.warning("%s stays in memory only: %s", name, error)
        return None


def export(folder: Path, name: str, key: str) -> Path | None:
    """Copy the object stored under a key into a folder for FA3_CUTE_CACHE_PATH, made if it is missing; None where
    there is none. Everybody may read the copy, its user alone may write to it. Raises OSError."""
    found = read(name, key)
    if found is None:
        return None
    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o755)
    path = _replace(_path(folder, name, key), found.code + _trailer(key, found.code))
    path.chmod(0o644)
    return path


class Entry(NamedTuple):
    """A file of the cache: `name` is its kernel's, None for a temporary file that a dead process left behind."""

    path: Path
    name: str | None
    nbytes: int
    seconds_old: float


def entries(folder: Path | None = None) -> list[Entry]:
    """The files of the cache or of another folder, the newest first, trusted or not; [] where there is no folder.
    Raises OSError where the folder cannot be read. Other files in it are not the cache's and are left out."""
    folder = folder or cache_dir()
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
        named = os.environ.get("FA3_CUTE_CACHE_DIR")
        wrong = (
            f"FA3_CUTE_CACHE_DIR={named} is relative to what is not there" if named else "this user has no home folder"
        )
        return f"{wrong}: set FA3_CUTE_CACHE_DIR to an absolute path"
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable"
    if existing == folder and _trusted(folder, _own()) is None:
        return f"{folder} belongs to another user or others may write to it: nothing is kept in it or read from it"
    return None


def read_only_problem(folder: Path) -> str | None:
    """Why no kernel is read from a folder of FA3_CUTE_CACHE_PATH, in a sentence; None if they are."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if _trusted(folder, _own() | ROOT) is None:
        return f"{folder} belongs to another user than root, or others may write to it: nothing is read from it"
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


def _own() -> set[int]:
    return {os.geteuid()}


def _trusted_folders() -> list[Path]:
    """Those that code may be read from, in the order in which it is looked for."""
    found = [_trusted(cache_dir(), _own()), *(_trusted(folder, _own() | ROOT) for folder in read_only_dirs())]
    return [folder for folder in found if folder]


def _trusted(folder: Path | None, owners: set[int]) -> Path | None:
    """The folder, if it is one of these users' and no other may write to it."""
    try:
        facts = folder and folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("ignoring the cache folder %s: %s", folder, error)
        return None
    if facts is None:
        return None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid not in owners or facts.st_mode & WRITABLE_BY_OTHERS:
        owner = "this user or root" if owners & ROOT else "this user"
        log.warning("ignoring the cache folder %s: it must be a folder that only %s may write to", folder, owner)
        return None
    return folder


def _read_file(path: Path) -> bytes:
    """The bytes of a regular file that is this user's or that of its folder's owner, who is trusted."""
    # Not blocking: the open of a pipe without a writer would wait for one.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in _own() | {path.parent.stat().st_uid}:
            raise PermissionError("not a file of this user")
        if facts.st_mode & WRITABLE_BY_OTHERS:
            raise PermissionError("others may write to it")
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
