"""The command cache, and the listing and clearing of the disk cache behind it."""

import json
import os
import time
from pathlib import Path

import pytest

from fa3_cute.cli.kernels import of_tables
from fa3_cute.cli import main
from fa3_cute.cli.cache import age
from fa3_cute.planning.tables import forward_config
from fa3_cute.runtime import compiler, disk_cache

KEY = "0123456789abcdef" * 4
CFG = forward_config("bf16", 64, "causal", True, False)


def answer(capsys, *argv: str) -> tuple[int, dict]:
    """Exit status and JSON of a command."""
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(folder))
    monkeypatch.delenv("FA3_CUTE_CACHE_PATH", raising=False)
    return folder


def fill(folder: Path) -> None:
    """Two kernels, one of them three hours old; an old and a new temporary file; what is not the cache's."""
    for name in ("fwd_new", "fwd_old"):
        disk_cache.store(name, KEY, b"code")
    for name in (".left_behind.tmp", ".being_written.tmp", "notes.txt", "fwd-short.o"):
        (folder / name).write_bytes(b"12345")
    (folder / f"folder-{KEY[:32]}.o").mkdir()
    (folder / f"link-{KEY[:32]}.o").symlink_to(folder / "notes.txt")
    for name in (f"fwd_old-{KEY[:32]}.o", ".left_behind.tmp"):
        os.utime(folder / name, (time.time() - 3 * 3600,) * 2)


def test_entries(folder):
    assert disk_cache.entries() == []
    fill(folder)
    first, *others = disk_cache.entries()
    assert (first.name, first.path.parent, first.nbytes) == ("fwd_new", folder, 4 + disk_cache.TRAILER_BYTES)
    assert {entry.name for entry in others} == {"fwd_old", None}
    assert all(3 * 3600 <= entry.seconds_old < 4 * 3600 for entry in others)


def test_cache_list(folder, capsys):
    nothing = {"path": str(folder), "files": 0, "bytes": 0, "entries": [], "read_only": []}
    assert answer(capsys, "cache", "list") == (0, nothing)
    fill(folder)
    status, said = answer(capsys, "cache", "list")
    assert (status, said["files"], said["bytes"]) == (0, 3, 2 * (4 + disk_cache.TRAILER_BYTES) + 5)
    assert main(["cache", "list"]) == 0
    head, new, *old, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["kernel", "KB", "age"] and new.split() == ["fwd_new", "0.0", "0", "s"]
    assert {line.split()[0] for line in old} == {"fwd_old", "(left"} and all(line.endswith(" 3 h") for line in old)
    assert total == f"3 files, {said['bytes']} bytes in {folder}"


def test_cache_clear(folder, capsys):
    fill(folder)
    assert main(["cache", "clear"]) == 0
    nbytes = 2 * (4 + disk_cache.TRAILER_BYTES) + 5
    assert capsys.readouterr().out == f"removed 3 files, {nbytes} bytes from {folder}\n"
    assert {path.name for path in folder.iterdir()} == {
        ".being_written.tmp",
        "notes.txt",
        "fwd-short.o",
        f"folder-{KEY[:32]}.o",
        f"link-{KEY[:32]}.o",
    }
    assert answer(capsys, "cache", "clear") == (0, {"path": str(folder), "files": 0, "bytes": 0, "left": 0})


def test_cache_clear_says_what_is_left(folder, monkeypatch, capsys):
    def refuses(path):
        raise PermissionError("no")

    disk_cache.store("fwd", KEY, b"code")
    monkeypatch.setattr(disk_cache.Path, "unlink", refuses)
    assert main(["cache", "clear"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "1 could not be removed"


def test_cache_path(folder, capsys):
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert answer(capsys, "cache", "path") == (0, {"path": str(folder), "exists": False, "read_only": []})


def test_cache_export(folder, tmp_path, monkeypatch, capsys):
    """What this installation would load, to where another one reads it."""
    disk_cache.store(CFG.name, compiler.cache_key(CFG), b"code")
    disk_cache.store(CFG.name, KEY, b"of other sources")
    shipped = tmp_path / "shipped"
    status, said = answer(capsys, "cache", "export", str(shipped))
    (path,) = shipped.iterdir()
    missing = len(of_tables(None)) - 1
    nbytes = 4 + disk_cache.TRAILER_BYTES
    assert status == 0 and said["missing"] == missing
    assert (said["to"], said["files"], said["bytes"]) == (str(shipped), 1, nbytes)
    assert main(["cache", "export", str(shipped)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"copied 1 file, {nbytes} bytes to {shipped}",
        f"{missing} kernels of the tables are not in the cache: `compile` makes them",
    ]
    assert main(["cache", "clear"]) == 0
    monkeypatch.setenv("FA3_CUTE_CACHE_PATH", str(shipped))
    assert disk_cache.find(CFG.name, compiler.cache_key(CFG)) == path


def test_cache_export_of_nothing(folder, tmp_path, capsys):
    assert main(["cache", "export", str(tmp_path / "shipped")]) == 1
    assert not (tmp_path / "shipped").exists()
    disk_cache.store(CFG.name, compiler.cache_key(CFG), b"code")
    (tmp_path / "file").write_text("in the way")
    capsys.readouterr()
    assert main(["cache", "export", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_cache_export_to_where_nobody_would_read_it(folder, tmp_path, capsys):
    disk_cache.store(CFG.name, compiler.cache_key(CFG), b"code")
    (tmp_path / "open to all").mkdir()
    (tmp_path / "open to all").chmod(0o777)
    assert main(["cache", "export", str(tmp_path / "open to all")]) == 1
    assert "others may write to it: nothing is read from it" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["export"], ["list", "somewhere"], ["clear", "somewhere"]])
def test_a_folder_is_exports(words, folder, capsys):
    assert main(["cache", *words]) == 2
    assert "cache export DIR" in capsys.readouterr().err


def test_folders_that_are_only_read_are_shown(folder, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(mode=0o755)
    second.mkdir()
    second.chmod(0o777)
    (first / f"fwd-{KEY[:32]}.o").write_bytes(b"12345")
    monkeypatch.setenv("FA3_CUTE_CACHE_PATH", f"{first}{os.pathsep}{second}")
    assert main(["cache", "list"]) == 0
    own, good, bad = capsys.readouterr().out.splitlines()
    assert own == f"0 files, 0 bytes in {folder}" and good == f"1 file, 5 bytes in {first}, which is only read"
    assert bad.startswith(f"{second} belongs to another user than root, or others may write to it")
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{folder}\n{first} (only read)\n{second} (only read)\n"
    status, said = answer(capsys, "cache", "path")
    assert [(row["path"], row["files"]) for row in said["read_only"]] == [(str(first), 1), (str(second), 0)]


def test_no_cache(folder, monkeypatch, capsys):
    folder.write_text("a file")
    assert main(["cache", "list"]) == 2 and "cannot be read" in capsys.readouterr().err
    assert "is not a folder" in disk_cache.folder_problem()
    monkeypatch.setattr(disk_cache, "cache_dir", lambda: None)
    monkeypatch.delenv("FA3_CUTE_CACHE_DIR")
    assert main(["cache", "list"]) == 2 and "no home folder" in capsys.readouterr().err
    assert disk_cache.entries() == []


def test_folder_problem(folder):
    assert disk_cache.folder_problem() is None and not folder.exists()
    folder.mkdir(mode=0o700)
    assert disk_cache.folder_problem() is None
    folder.chmod(0o777)
    assert "others may write" in disk_cache.folder_problem()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (119, "119 s"),
        (121, "2 min"),
        (2 * 3600, "2 h"),
        (47 * 3600, "47 h"),
        (72 * 3600, "3 d"),
        (800 * 86400, "800 d"),
    ],
)
def test_age(seconds, text):
    assert age(seconds) == text
