"""All that a rank does, from its meeting to its last result: ranks are threads, and NCCL hands over bytes."""

import ctypes
import sys
import threading
from argparse import Namespace
from queue import Queue

import context_parallel
import host_gpu
import numpy as np
import pytest
from parallel import check, nccl
from parallel.plan import Problem

RANKS = 2
PATIENCE = 120


class ThreadedNccl:
    """Bytes go through a queue for each pair of ranks; receives and sums wait for them at the end of a group."""

    def __init__(self):
        self.here = threading.local()
        self.queues = {(a, b): Queue() for a in range(RANKS) for b in range(RANKS)}

    def ncclGetVersion(self, number):
        number._obj.value = 23203
        return 0

    def ncclGetUniqueId(self, unique):
        ctypes.memset(unique, 7, nccl.UNIQUE_ID_BYTES)
        return 0

    def ncclCommInitRank(self, handle, size, unique, rank):
        assert size.value == RANKS and bytes(unique) == b"\7" * nccl.UNIQUE_ID_BYTES
        self.here.rank = rank.value
        return 0

    def ncclCommDestroy(self, handle):
        assert all(queue.empty() for (_, target), queue in self.queues.items() if target == self.here.rank)
        return 0

    def ncclGroupStart(self):
        self.here.waiting = []
        return 0

    def ncclGroupEnd(self):
        for wait in self.here.waiting:
            wait()
        return 0

    def ncclSend(self, address, count, kind, peer, comm, stream):
        self.queues[self.here.rank, peer.value].put(ctypes.string_at(address, count.value))
        return 0

    def ncclRecv(self, address, count, kind, peer, comm, stream):
        def receive():
            received = self.queues[peer.value, self.here.rank].get(timeout=PATIENCE)
            assert len(received) == count.value
            ctypes.memmove(address, received, count.value)

        self.here.waiting.append(receive)
        return 0

    def ncclRedOpCreatePreMulSum(self, operation, scalar, kind, residence, comm):
        self.here.factor = {0x3F80: 1, 0x4000: 2}[scalar._obj.value]
        return 0

    def ncclRedOpDestroy(self, operation, comm):
        self.here.factor = 1
        return 0

    def ncclReduce(self, taken, put, count, kind, operation, root, comm, stream):
        rank, factor = self.here.rank, getattr(self.here, "factor", 1)
        self.queues[rank, root.value].put(ctypes.string_at(taken, 2 * count.value))

        def add():
            parts = [self.queues[source, rank].get(timeout=PATIENCE) for source in range(RANKS)]
            total = factor * sum(check.as_float(np.frombuffer(part, np.uint16)) for part in parts)
            ctypes.memmove(put, check.to_bits(total, "bf16").tobytes(), 2 * count.value)

        if root.value == rank:
            self.here.waiting.append(add)
        return 0


@pytest.fixture
def together(monkeypatch, tmp_path):
    """Runs all ranks with these options; their exit statuses."""
    host_gpu.install(monkeypatch)
    fake = ThreadedNccl()
    monkeypatch.setattr(nccl, "library", lambda: fake)
    monkeypatch.setattr(context_parallel, "problem_of", lambda size: Problem((64,), size, 4, 2, 64))
    monkeypatch.setattr(check, "MODES", {"causal": {}, "packed": {"seqlens": (32, 16)}})

    def run(**options) -> list:
        found: list = [None] * RANKS

        def be(rank: int) -> None:
            given = {"ranks": RANKS, "rank": rank, "device": None, "meet": str(tmp_path), "timeout": PATIENCE}
            found[rank] = context_parallel.be_rank(Namespace(**given, **options))

        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return run


def test_all_modes_are_right(together, capsys):
    assert together(bench=None) == [0] * RANKS
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 x NVIDIA Nothing, NCCL 23203"
    # Three schemes in two modes, in BF16 and FP8; three gradients of two schemes in two modes.
    assert len(said) == 1 + 2 * 3 * 2 + 3 * 2 * 2 and all("largest error" in line for line in said[1:])


def test_a_wrong_result_is_a_failure(together, monkeypatch):
    monkeypatch.setitem(check.ALLOWED, "fp8_e4m3", 0)
    assert together(bench=None) == [1] * RANKS


def test_gpus_that_are_not_there_are_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["context_parallel.py", "--ranks", "2", "--bench", "16k"])
    assert context_parallel.arguments().bench == [16384]
    monkeypatch.setattr(context_parallel, "hopper_device_problem", lambda ordinal: f"no device {ordinal}")
    with pytest.raises(SystemExit, match="--ranks 2: no device 1"):
        context_parallel.main()


def test_bench(together, capsys, monkeypatch):
    monkeypatch.setattr("parallel.bench.ROUND_MS", 1.0)
    monkeypatch.setattr(context_parallel, "Problem", lambda **fields: Problem((), RANKS, 4, 2, 64))
    options = {"bench": [64], "dtypes": ["bf16", "fp8_e4m3"], "margins": [0], "backward": True}
    assert together(**options) == [0] * RANKS
    said = capsys.readouterr().out
    assert said.count("one GPU, all rows") == 3 and said.count("backward: all-gather") == 1
