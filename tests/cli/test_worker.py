"""Processes of commands: whatever happens to one that works on request is an answer; none outlives its use."""

import os
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from commands import running

from fa3_cute.cli.processes import spread
from fa3_cute.cli.worker import Worker


def adds(number):
    return lambda other: {"sum": number + other}


def dies(number):
    os._exit(number)


def cannot_prepare(number):
    raise LookupError("nothing to prepare")


def raises(number):
    return lambda: [][number]


def hangs(number):
    return lambda: time.sleep(600)


@pytest.fixture
def start():
    workers = []
    yield lambda task: workers.append(Worker(task, 3)) or workers[-1]
    for worker in workers:
        worker.stop()


def test_answers_more_than_once(start):
    worker = start(adds)
    assert [worker.ask(number)["sum"] for number in (1, 2)] == [4, 5]


@pytest.mark.parametrize(
    "task, said", [(dies, "exit status 3"), (raises, "IndexError"), (cannot_prepare, "LookupError: nothing to prepare")]
)
def test_a_failure_is_an_answer(task, said, start):
    assert said in start(task).ask()["error"]


def test_one_that_hangs_is_ended(start):
    worker = start(hangs)
    assert "no result after 1 s, given up" in worker.ask(seconds=1)["error"]
    assert not worker.process.is_alive()


def naps(seconds):
    time.sleep(seconds)
    return seconds


def starts_another(number):
    def work():
        return {"pid": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid}

    return work


def test_what_a_worker_started_ends_with_it(start):
    worker = start(starts_another)
    pid = worker.ask()["pid"]
    assert Path(f"/proc/{pid}").exists()
    worker.stop()
    deadline = time.monotonic() + 30
    while pid in running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pid not in running()


def test_processes_end_with_their_iterator():
    """Whatever they are at."""
    others = set(active_children())
    results = spread(naps, [0, 600, 600, 600], jobs=2)
    assert next(results) == 0 and len(set(active_children()) - others) == 2
    results.close()
    assert set(active_children()) <= others
