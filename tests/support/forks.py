"""Scripts in processes of their own that start with everything imported: copies of one process that has done no more.

What a script needs takes a second or two to import, the CuTe DSL above all, and most scripts take less than that
themselves. ForkServer starts the process, which runs this file.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback

SECONDS = 300  # for a script


class ForkServer:
    """A process that has run `prelude` and runs scripts in copies of itself, one at a time."""

    def __init__(self, prelude: str, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, __file__, prelude],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str) -> tuple[int, str]:
        """(exit status, all it printed) of a script, which has the names of the prelude."""
        self.process.stdin.write(json.dumps(script) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that starts scripts has ended"
        return tuple(json.loads(answer))

    def close(self) -> None:
        with self.process:
            self.process.stdin.close()


def serve(names: dict) -> None:
    """A script a line on the standard input, an answer a line on the standard output."""
    assert len(os.listdir("/proc/self/task")) == 1, "a copy has no thread but the one that forks"
    for line in sys.stdin:
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if child == 0:
                run_here(json.loads(line), names, said.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            print(json.dumps((status, said.read().decode(errors="replace"))), flush=True)


def run_here(script: str, names: dict, output: int) -> None:
    """Does not return: the copy ends as a script's process does, without what is registered for the end."""
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    try:
        exec(compile(script, "script", "exec"), names)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    names = {"__name__": "__main__"}
    exec(sys.argv[1], names)
    serve(names)
