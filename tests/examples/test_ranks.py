"""Ranks as processes: what they send over NCCL, which calls they make on a GPU, and how they start, meet and end."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fa3_cute import BackwardParams, DataType, explain

from parallel import launch, nccl
from parallel.calls import DTYPES, Tensor, backward_params, forward_params, merge_params, output_dtype, weighted_params
from parallel.comm import SimulatedComm, all_gather, all_to_all, reduce_scatter, send_recv
from parallel.host import HostEngine
from parallel.plan import Problem, gathered_calls, ring_call, whole_call

from fa3_cute.contract.merge import plain_merge, walk

SEQLENS = {"one": (48,), "packed": (24, 48)}
RANKS = 3


# ---- NCCL ------------------------------------------------------------------------------------------------------------


class Array(np.ndarray):
    """A tensor of NcclComm in host memory."""

    @property
    def address(self) -> int:
        return self.ctypes.data


class FakeNccl:
    """Keeps what each rank asks for; `deliver` does it, as NCCL matches it: by pairs of ranks, in order."""

    def __init__(self):
        self.rank = 0
        self.transfers: dict[tuple, list] = {}
        self.reductions: dict[int, list] = {}
        self.depth, self.factor = 0, 1.0

    def ncclCommInitRank(self, handle, size, unique, rank):
        return 0

    def ncclGroupStart(self):
        self.depth += 1
        return 0

    def ncclGroupEnd(self):
        self.depth -= 1
        return 0

    def ncclSend(self, address, count, kind, peer, comm, stream):
        assert self.depth == 1 and kind == nccl.UINT8
        self.transfers.setdefault((self.rank, peer.value, "send"), []).append((address.value, count.value))
        return 0

    def ncclRecv(self, address, count, kind, peer, comm, stream):
        assert self.depth == 1 and kind == nccl.UINT8
        self.transfers.setdefault((peer.value, self.rank, "recv"), []).append((address.value, count.value))
        return 0

    def ncclRedOpCreatePreMulSum(self, operation, scalar, kind, residence, comm):
        assert kind == nccl.TYPES["fp16"] and residence == nccl.HOST_IMMEDIATE
        self.factor = float(np.uint16(scalar._obj.value).view(np.float16))
        operation._obj.value = 7
        return 0

    def ncclRedOpDestroy(self, operation, comm):
        return 0

    def ncclReduce(self, taken, put, count, kind, operation, root, comm, stream):  # noqa: PLR0913
        assert kind == nccl.TYPES["fp16"] and operation.value == (7 if self.factor != 1 else nccl.SUM)
        self.reductions.setdefault(self.rank, []).append((taken.value, put.value, count.value, root.value))
        return 0

    def deliver(self):
        for source, target, kind in list(self.transfers):
            if kind == "send":
                sent, received = (self.transfers[source, target, end] for end in ("send", "recv"))
                for (taken, size), (put, expected) in zip(sent, received, strict=True):
                    assert size == expected
                    ctypes.memmove(put, taken, size)
        for of_ranks in zip(*self.reductions.values(), strict=True):
            _, _, counts, (root, *roots) = (set(values) for values in zip(*of_ranks, strict=True))
            assert not roots and len(counts) == 1
            total = sum(half_floats(taken, count) for taken, _, count, _ in of_ranks) * self.factor
            half_floats(of_ranks[root][1], counts.pop())[:] = total
            assert [put is not None for _, put, _, _ in of_ranks] == [rank == root for rank in range(len(of_ranks))]


def half_floats(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint16 * count).from_address(address), np.float16)


@pytest.fixture
def fake(monkeypatch):
    found = FakeNccl()
    monkeypatch.setattr(nccl, "library", lambda: found)
    return found


def tensors(heads: int, rows: int, seed: int) -> dict[int, Array]:
    """One of each rank, of small whole numbers: their sums are exact."""
    rng = np.random.default_rng(seed)
    return {rank: rng.integers(-9, 9, (heads, rows, 4)).astype(np.float16).view(Array) for rank in range(RANKS)}


def exchanged(collective, comms, inputs: dict, outputs: dict) -> dict[int, np.ndarray]:
    """What a collective makes of the inputs; every process with the tensors of its ranks."""
    results = {rank: output.copy() for rank, output in outputs.items()}
    for comm in comms:
        comm.begin()
        collective(comm, *({rank: every[rank] for rank in comm.ranks} for every in (inputs, results)))
    comms[-1].end()
    return results


@pytest.mark.parametrize("seqlens", SEQLENS.values(), ids=SEQLENS)
@pytest.mark.parametrize("name", ["all_gather", "send_recv", "all_to_all", "back", "reduce_scatter", "doubled"])
def test_nccl_moves_what_the_simulation_moves(fake, name, seqlens):
    problem = Problem(seqlens, RANKS, 6, 6, 4, dtype="fp16")
    engine = HostEngine(problem)
    engine.exchange = SimpleNamespace(handle=0)
    share, whole = tensors(6, problem.rows, 1), tensors(6, problem.total, 2)
    of_heads = tensors(2, problem.total, 3)
    collective, inputs, outputs = {
        "all_gather": (lambda comm, a, b: all_gather(comm, engine, problem, a, b), share, whole),
        "send_recv": (lambda comm, a, b: send_recv(comm, engine, a, b), share, tensors(6, problem.rows, 4)),
        "all_to_all": (lambda comm, a, b: all_to_all(comm, engine, problem, a, b), share, of_heads),
        "back": (lambda comm, a, b: all_to_all(comm, engine, problem, b, a, is_back=True), of_heads, share),
        "reduce_scatter": (lambda comm, a, b: reduce_scatter(comm, engine, problem, a, b), whole, share),
        "doubled": (lambda comm, a, b: reduce_scatter(comm, engine, problem, a, b, 2), whole, share),
    }[name]

    simulated = SimulatedComm(engine, RANKS)
    simulated.begin = simulated.end = lambda: None
    comms = [nccl.NcclComm(engine, rank, RANKS, bytes(nccl.UNIQUE_ID_BYTES)) for rank in range(RANKS)]
    for comm in comms:
        comm.begin, comm.end = lambda rank=comm.rank: setattr(fake, "rank", rank), fake.deliver
    expected = exchanged(collective, [simulated], inputs, outputs)
    found = exchanged(collective, comms, inputs, outputs)
    for rank in range(RANKS):
        np.testing.assert_array_equal(found[rank], expected[rank])
        assert not np.array_equal(found[rank], outputs[rank])


def test_a_failed_call_is_told_in_nccls_words(monkeypatch):
    words = {"ncclGetErrorString": lambda code: b"invalid usage", "ncclGetLastError": lambda comm: b"Duplicate GPU"}
    monkeypatch.setattr(nccl, "library", lambda: SimpleNamespace(ncclGetVersion=lambda number: 5, **words))
    with pytest.raises(nccl.NcclError, match=r"ncclGetVersion: invalid usage \(Duplicate GPU\)"):
        nccl.version()


def test_no_library_is_told(monkeypatch):
    monkeypatch.setenv("NCCL_LIBRARY", "/nowhere/libnccl.so.2")
    nccl.library.cache_clear()
    with pytest.raises(nccl.NcclError, match="NCCL_LIBRARY name the file. Tried: /nowhere/libnccl.so.2"):
        nccl.library()


# ---- calls -----------------------------------------------------------------------------------------------------------


def tensor(number: int, dtype: DataType, *shape: int) -> Tensor:
    return Tensor(number << 32, shape, dtype)


def calls_of(problem: Problem):
    """(call, rows of q, of k, type of out) of every scheme and rank."""
    out = output_dtype(problem)
    yield whole_call(problem), problem.total, problem.total, out
    for rank in range(problem.num_ranks):
        yield from ((call, problem.rows, problem.total, out) for call in gathered_calls(problem, rank))
        for source in range(problem.num_ranks) if problem.window is None else ():
            yield ring_call(problem, rank, source), problem.rows, problem.rows, DataType.FP32


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3"])
@pytest.mark.parametrize("mask", [{}, {"is_causal": False}, {"window": 50}], ids=["causal", "full", "window"])
@pytest.mark.parametrize("seqlens", [(256,), (128, 32, 192)], ids=["one", "packed"])
def test_every_call_is_one_that_the_package_takes(seqlens, mask, dtype):
    problem = Problem(seqlens, 4, 8, 4, 128, dtype=dtype, **mask)
    of, single = DTYPES[dtype], DataType.FP32
    for call, rows_q, rows_k, out in calls_of(problem):
        q, k = tensor(1, of, 8, rows_q, 128), tensor(2, of, 4, rows_k, 128)
        lengths = {name: 0x1000 + 0x1000 * number for number, name in enumerate(call.lengths)}
        of_call = {"q": q, "k": k, "v": tensor(3, of, 4, rows_k, 128), "out": tensor(4, out, 8, rows_q, 128)}
        lse = tensor(5, single, 8, call.rows_q)
        assert explain(forward_params(problem, call, of_call, lse, lengths)) == []
        if out is single:
            pair, lses = (of_call["out"], tensor(6, single, 8, rows_q, 128)), (tensor(7, single, 8, rows_q), lse)
            assert not list(walk(plain_merge(merge_params(problem, call, pair, lses))))
        elif dtype == "bf16":
            dk, dv = (tensor(number, of, 4 * call.key_gradients, rows_k, 128) for number in (8, 9))
            gradients = {"dout": tensor(10, of, 8, rows_q, 128), "dq": tensor(11, of, 8, rows_q, 128)}
            params = backward_params(problem, call, {**of_call, **gradients, "dk": dk, "dv": dv}, lse, lengths)
            params.workspace, params.workspace_bytes = 12 << 32, 1 << 31
            assert isinstance(params, BackwardParams) and explain(params) == []


def test_rounding_and_means_are_merges():
    half, single = ([tensor(n, dtype, 4, 64, 128) for n in (1, 2, 3)] for dtype in (DataType.BF16, DataType.FP32))
    one, rows = tensor(4, DataType.FP32, 1, 1), tensor(5, DataType.FP32, 4, 64)
    rounded = weighted_params((single[0], single[0], half[2]), (rows, one))
    mean = weighted_params(tuple(half), (one, one))
    for params in (rounded, mean):
        assert not list(walk(plain_merge(params)))
    assert (mean.lse_a_row_stride, mean.lse_a_head_stride, rounded.lse_a_head_stride) == (0, 0, 64)


# ---- processes -------------------------------------------------------------------------------------------------------


RANK = """
import sys, time
sys.path.insert(0, {examples!r})
from parallel.launch import Meeting
rank, folder = int(sys.argv[sys.argv.index("--rank") + 1]), sys.argv[sys.argv.index("--meet") + 1]
{body}
"""


def start(monkeypatch, tmp_path, body: str, seconds: float = 60) -> int:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(examples=str(Path(launch.__file__).parents[1]), body=body))
    monkeypatch.setattr(sys, "argv", [str(script)])
    return launch.start_ranks([], 2, seconds)


def test_ranks_tell_one_another(monkeypatch, tmp_path):
    body = "told = [Meeting(folder, rank, 2).tell(rank + 5) for _ in range(1)]\nsys.exit(told != [[5, 6]])"
    assert start(monkeypatch, tmp_path, body) == 0


def test_the_first_failure_ends_all(monkeypatch, tmp_path):
    assert start(monkeypatch, tmp_path, "sys.exit(3) if rank else time.sleep(600)") == 3


def test_the_time_ends_all(monkeypatch, tmp_path, capsys):
    assert start(monkeypatch, tmp_path, "time.sleep(60)", seconds=1) == 124
    assert "the time is over" in capsys.readouterr().err


def test_a_rank_that_is_missing_is_told(tmp_path):
    with pytest.raises(TimeoutError, match=r"1-1\.json: not there after 0\.01 s"):
        launch.Meeting(str(tmp_path), 0, 2, patience=0.01).tell()
    with pytest.raises(FileExistsError, match="ranks need an empty folder"):
        launch.Meeting(str(tmp_path), 0, 2).tell()
