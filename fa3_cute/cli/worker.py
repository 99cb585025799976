"""A process that prepares a task and then works on request, and is given up if it does not answer."""

import multiprocessing
import signal
import sys
from collections.abc import Callable

from .processes import kill
from .trial import said

HUNG_SECONDS = 90  # a kernel that deadlocks never returns


class Worker:
    """A fresh process in which `task(argument)` prepares and returns a function, which each request calls.

    An answer is the function's dict, {"error": text} instead if it failed, died or did not answer in time. A process
    that did not is killed, and with it goes whatever its kernel was doing.

    is_fresh    the package is imported anew before the first call: for sources that have changed meanwhile
    """

    def __init__(self, task: Callable, argument, is_fresh: bool = False):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(task, argument, is_fresh, theirs), daemon=True)
        self.process.start()
        theirs.close()  # else the end of the process would not end the connection

    def ask(self, *request, seconds: float = HUNG_SECONDS) -> dict:
        """The answer to one request, whose values can be pickled."""
        self.send(*request)
        return self.result(seconds)

    def send(self, *request) -> None:
        try:
            self.connection.send(request)
        except OSError:  # it died; `result` says so
            pass

    def result(self, seconds: float = HUNG_SECONDS) -> dict:
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"error": f"the process ended without a result, exit status {self.process.exitcode}"}
        self.stop()
        return {"error": f"no result after {seconds:.0f} s, given up: does the kernel hang?"}

    def stop(self) -> None:
        if self.process.is_alive():
            kill(self.process.pid)
        self.process.join()


def serve(task: Callable, argument, is_fresh: bool, connection) -> None:
    """The life of a worker: prepare, then answer until the other end is gone. Python files may be saved twice a second,
    which the time in a .pyc cannot tell apart: none is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    try:
        work = task(argument)
    except Exception as error:
        connection.send({"error": said(error)})
        return
    while True:
        try:
            request = connection.recv()
        except EOFError:  # whoever asked is gone
            return
        if is_fresh:
            forget_package()
        try:
            found = work(*request)
        except Exception as error:  # a kernel that is being written fails in any way there is
            found = {"error": said(error)}
        connection.send(found)


def forget_package() -> None:
    """The next import of any module of the package reads its file. Objects made before keep what they were made of."""
    package = __name__.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
