"""What processes of one user on one machine do one after the other."""

import fcntl
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path


def lock_file(name: str) -> Path:
    """Where every process of this user finds the lock of that name."""
    return Path(tempfile.gettempdir(), f"fa3_cute-{os.getuid()}-{name}.lock")


@contextmanager
def machine_lock(name: str):
    """Waits until no other process is within; a process that dies leaves."""
    with open(lock_file(name), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
