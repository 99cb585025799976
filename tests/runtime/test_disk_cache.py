"""The disk cache: bytes in, bytes out, damaged, and of others."""

import os
import socket
import stat
from pathlib import Path

import pytest

from fa3_cute.runtime import disk_cache

KEY, CODE = "0123456789abcdef" * 4, b"\x7fELF not really" * 100


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Each test starts with a disk cache of its own and no other folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", str(folder))
    monkeypatch.delenv("FA3_CUTE_CACHE_PATH", raising=False)
    return folder


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_disk_round_trip(empty_cache):
    assert disk_cache.find("fwd", KEY) is None
    path = disk_cache.store("fwd", KEY, CODE)
    assert path == disk_cache.find("fwd", KEY) == entry(empty_cache)
    assert path.read_bytes().startswith(CODE)
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert disk_cache.find("fwd", "f" * 64) is None


def test_store_replaces(empty_cache):
    disk_cache.store("fwd", KEY, CODE)
    path = disk_cache.store("fwd", KEY, CODE * 2)
    assert path == entry(empty_cache) == disk_cache.find("fwd", KEY)
    assert path.read_bytes().startswith(CODE * 2)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: -disk_cache.TRAILER_BYTES],
        lambda data: flipped(data, 0),
        lambda data: flipped(data, 700),
        lambda data: flipped(data, len(data) - 1),
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "10 bytes", "half", "one short", "one more", "no trailer", "first bit", "a bit", "last bit", "zeros"],
)
def test_damaged_entry_is_a_miss(damage, caplog):
    path = disk_cache.store("fwd", KEY, CODE)
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.find("fwd", KEY) is None
    assert "damaged" in caplog.text
    assert disk_cache.find("fwd", KEY) is None and disk_cache.store("fwd", KEY, CODE) == disk_cache.find("fwd", KEY)


def test_entry_of_another_key_is_a_miss():
    other = disk_cache.store("fwd", "f" * 64, CODE)
    path = disk_cache.store("fwd", KEY, CODE)
    other.replace(path)
    assert disk_cache.find("fwd", KEY) is None


def test_entry_that_is_no_file_of_ours_is_a_miss(empty_cache, tmp_path, monkeypatch):
    path = disk_cache.store("fwd", KEY, CODE)
    elsewhere = tmp_path / "elsewhere.o"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert disk_cache.find("fwd", KEY) is None
    path.unlink()
    path.mkdir()
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("fwd", KEY, CODE) is None  # no file can take a folder's place: memory only
    assert not list(empty_cache.glob(".*"))


def test_foreign_entry_is_a_miss(monkeypatch):
    path = disk_cache.store("fwd", KEY, CODE)
    facts = os.stat_result([*path.stat()[:4], os.geteuid() + 1, *path.stat()[5:10]])
    monkeypatch.setattr(disk_cache.os, "fstat", lambda handle: facts)
    assert disk_cache.find("fwd", KEY) is None


def test_foreign_folder_is_not_used(monkeypatch, caplog):
    disk_cache.store("fwd", KEY, CODE)
    uid = os.geteuid()
    monkeypatch.setattr(disk_cache.os, "geteuid", lambda: uid + 1)
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("fwd", KEY, CODE) is None
    assert "only this user" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_folder_that_others_may_write_to_is_not_used(empty_cache, mode):
    disk_cache.store("fwd", KEY, CODE)
    empty_cache.chmod(mode)
    assert disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("other", KEY, CODE) is None
    assert len(list(empty_cache.iterdir())) == 1


def test_cache_dir_follows_the_environment(monkeypatch):
    for name in ("FA3_CUTE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert disk_cache.cache_dir() == Path("/home/someone/.cache/fa3_cute")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert disk_cache.cache_dir() == Path("/home/someone/.cache/fa3_cute")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert disk_cache.cache_dir() == Path("/var/cache/someone/fa3_cute")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", "/somewhere")
    assert disk_cache.cache_dir() == Path("/somewhere")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", "~/of mine")
    assert disk_cache.cache_dir() == Path("/home/someone/of mine")


def test_a_relative_folder_stays_where_it_was_first_named(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", f"relative to {tmp_path.name}")
    expected = tmp_path / "first" / f"relative to {tmp_path.name}"
    assert disk_cache.cache_dir() == expected
    monkeypatch.chdir(tmp_path)
    assert disk_cache.cache_dir() == expected


def test_a_relative_folder_without_a_working_folder_is_none(tmp_path, monkeypatch, caplog):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("FA3_CUTE_CACHE_DIR", f"{tmp_path.name} of nothing")
    assert disk_cache.cache_dir() is None and disk_cache.find("fwd", KEY) is None
    assert disk_cache.store("fwd", KEY, CODE) is None
    assert f"FA3_CUTE_CACHE_DIR={tmp_path.name} of nothing is relative" in disk_cache.folder_problem()


# ---- what is no entry ------------------------------------------------------------------------------------------------


def test_a_pipe_is_a_miss(empty_cache, caplog):
    """Opening it would wait for a writer."""
    path = disk_cache.store("fwd", KEY, CODE)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert disk_cache.find("fwd", KEY) is None and "not a file" in caplog.text


def test_a_socket_is_a_miss(empty_cache, monkeypatch):
    path = disk_cache.store("fwd", KEY, CODE)
    path.unlink()
    monkeypatch.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(path.name)
        assert disk_cache.find("fwd", KEY) is None


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_an_entry_that_others_may_write_to_is_a_miss(mode, caplog):
    path = disk_cache.store("fwd", KEY, CODE)
    path.chmod(mode)
    assert disk_cache.find("fwd", KEY) is None and "others may write" in caplog.text
    path.chmod(0o644)
    assert disk_cache.find("fwd", KEY) == path


# ---- folders that are only read --------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder with one kernel, made by export; the own folder is empty again."""
    disk_cache.store("fwd", KEY, CODE)
    folder = tmp_path / "made" / "shipped"
    mask = os.umask(0o002)
    try:
        path = disk_cache.export(folder, "fwd", KEY)
    finally:
        os.umask(mask)
    assert path.parent == folder and disk_cache.export(folder, "other", KEY) is None
    disk_cache.clear()
    monkeypatch.setenv("FA3_CUTE_CACHE_PATH", os.pathsep.join(["", str(tmp_path / "missing"), str(folder)]))
    return folder


def test_read_only_folders_are_searched_after_the_own(shipped, empty_cache):
    assert disk_cache.read("fwd", KEY) == (entry(shipped), CODE)
    assert not list(empty_cache.iterdir())
    own = disk_cache.store("fwd", KEY, CODE)
    assert disk_cache.find("fwd", KEY) == own and own.parent == empty_cache


def test_what_is_exported_everybody_may_read(shipped):
    assert stat.S_IMODE(shipped.stat().st_mode) == 0o755
    assert stat.S_IMODE(entry(shipped).stat().st_mode) == 0o644


def test_a_read_only_folder_that_others_may_write_to_is_not_used(shipped):
    shipped.chmod(0o775)
    assert disk_cache.find("fwd", KEY) is None
    assert "others may write" in disk_cache.read_only_problem(shipped)


def test_a_read_only_folder_is_this_users_or_roots(shipped, monkeypatch):
    assert disk_cache.read_only_problem(shipped) is None
    monkeypatch.setattr(disk_cache, "ROOT", {shipped.stat().st_uid})
    monkeypatch.setattr(disk_cache.os, "geteuid", lambda: 12345)
    assert disk_cache.find("fwd", KEY) == entry(shipped)
    monkeypatch.setattr(disk_cache, "ROOT", {54321})
    assert disk_cache.find("fwd", KEY) is None
    assert "another user" in disk_cache.read_only_problem(shipped)
