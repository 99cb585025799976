"""A command whose output has nowhere to go: one line at most, no traceback."""

import os
import subprocess
import sys

import pytest

EXPLAIN = [sys.executable, "-m", "fa3_cute", "explain"]


def test_stdout_is_closed():
    closed = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", closed, *EXPLAIN], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_is_full():
    with open("/dev/full", "w") as full:
        done = subprocess.run(EXPLAIN, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_cache_export_to_no_folder(tmp_path):
    """`cache export "$DIR"` where DIR is not set."""
    command = [sys.executable, "-m", "fa3_cute", "cache", "export", ""]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "must name a folder" in done.stderr and not list(tmp_path.iterdir())
