"""Scripts in copies of one process: nothing of one is seen by the next."""

import os

import pytest
from forks import ForkServer


@pytest.fixture(scope="module")
def process():
    server = ForkServer("import sys\nnumbers = [1]", dict(os.environ))
    yield server
    server.close()


def test_a_script_changes_nothing_for_the_next(process):
    for _ in range(2):
        assert process.run("numbers.append(2); sys.path.clear(); print(numbers)") == (0, "[1, 2]\n")


@pytest.mark.parametrize(
    "script, status, said",
    [
        ("print('so far', end=''); raise SystemExit", 0, "so far"),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.system('echo of a process of its own')", 0, "of a process of its own\n"),
    ],
)
def test_how_a_script_ends_and_what_it_prints(script, status, said, process):
    assert process.run(script) == (status, said)


def test_an_exception_is_a_status_and_a_traceback(process):
    status, said = process.run("1 / 0")
    assert status == 1 and said.startswith("Traceback") and said.endswith("ZeroDivisionError: division by zero\n")


def test_a_process_with_threads_is_not_copied():
    prelude = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    server = ForkServer(prelude, dict(os.environ))
    with pytest.raises((AssertionError, BrokenPipeError)):
        server.run("print(1)")
    server.close()
