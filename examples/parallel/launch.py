"""Ranks as processes: started from one command on one machine, or by hand on several, and how they meet."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory


class Meeting:
    """Ranks that tell one another values through files in a folder that all of them see, empty before the first.

    patience   seconds that a rank waits for the others; TimeoutError then
    """

    def __init__(self, folder: str, rank: int, size: int, patience: float = 120):
        self.folder, self.rank, self.size, self.patience = Path(folder), rank, size, patience
        self.count = 0

    def tell(self, value=None) -> list:
        """Every rank's value, by rank, when all have told theirs: the n-th calls of all ranks belong together."""
        self.count += 1
        own = self._file(self.rank)
        if own.exists():
            raise FileExistsError(f"{own}: of an earlier run; ranks need an empty folder to meet in")
        waiting = own.with_suffix(f".{os.getpid()}")
        waiting.write_text(json.dumps(value))
        waiting.rename(own)  # whole for whoever reads it
        deadline = time.monotonic() + self.patience
        return [self._value(self._file(rank), deadline) for rank in range(self.size)]

    def _file(self, rank: int) -> Path:
        return self.folder / f"{self.count}-{rank}.json"

    def _value(self, file: Path, deadline: float):
        while not file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.name}: not there after {self.patience} s; has that rank ended?")
            time.sleep(0.001)
        return json.loads(file.read_text())


def start_ranks(arguments: list[str], size: int, seconds: float) -> int:
    """This program once more for each rank; the exit status: 0, the first other one of a rank, or 124 when the time is
    over. All of them end with the first that fails: the others would wait for it for ever."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv[:1], *arguments, "--meet", folder]
        environment = {"NCCL_NVLS_ENABLE": "0", **os.environ}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(size)]
        try:
            return _end_of(ranks, time.monotonic() + seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _end_of(ranks: list[subprocess.Popen], deadline: float) -> int:
    while time.monotonic() < deadline:
        ended = [process.poll() for process in ranks]
        if failed := [status for status in ended if status]:
            return failed[0] if failed[0] > 0 else 1
        if None not in ended:
            return 0
        time.sleep(0.05)
    print("the time is over: ending all ranks", file=sys.stderr)
    return 124
