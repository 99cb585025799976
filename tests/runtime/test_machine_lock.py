"""The lock that keeps tests of huge tensors apart."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import machine_lock
import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_lock.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def is_free(name: str) -> bool:
    with open(machine_lock.lock_file(name), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_one_at_a_time():
    with pytest.raises(ZeroDivisionError), machine_lock.machine_lock("a"):
        assert not is_free("a") and is_free("b")
        raise ZeroDivisionError
    assert is_free("a")


def test_a_process_that_dies_leaves(folder):
    script = "import machine_lock, signal\nwith machine_lock.machine_lock('a'): print('in', flush=True); signal.pause()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(machine_lock.__file__).parent), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "in\n" and not is_free("a")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert is_free("a")
