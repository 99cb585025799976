"""What ranks exchange: a seam with two primitives, a set of moves and a set of sums, and the collectives made of them.

A process holds the ranks in `comm.ranks`: one of them over NCCL (nccl.py), all of them in a simulation. Tensors come as
{rank: tensor}, those of the ranks held here; a collective is the moves from and to them, those between two ranks in the
same order on both sides. All of them are enqueued on the engine's exchange stream.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from .plan import Piece, Problem


class Move(NamedTuple):
    """A piece of memory from one rank to another; None: of a rank that another process holds."""

    source: int
    target: int
    taken: Any
    put: Any


class Sum(NamedTuple):
    """The sum, over all ranks, of a piece of each one's memory, for one of them."""

    owner: int
    taken: dict[int, Any]
    put: Any


class Comm(Protocol):
    """The ranks of a group. `move` and `add` are collective; sums are those for all ranks, in the same order."""

    size: int
    ranks: tuple[int, ...]

    def move(self, moves: list[Move]) -> None: ...

    def add(self, sums: list[Sum], factor: float, dtype: str) -> None: ...


class SimulatedComm:
    """All ranks in this process, on one device or on none."""

    def __init__(self, engine, size: int):
        self.engine, self.size, self.ranks = engine, size, tuple(range(size))

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            self.engine.copy(move.put, move.taken)

    def add(self, sums: list[Sum], factor: float, dtype: str) -> None:
        for one in sums:
            self.engine.add(one.put, [one.taken[rank] for rank in self.ranks], factor)


def all_gather(comm: Comm, engine, problem: Problem, parts: dict, wholes: dict) -> None:
    """parts [heads, rows, dim] of each rank -> wholes [heads, total, dim], rows in their order, on every rank."""
    moves = []
    for source, target in _pairs(comm):
        for head, piece in _blocks(problem, source, _heads_of(parts)):
            taken = _block(engine, parts, source, head, piece.local, piece.rows)
            put = _block(engine, wholes, target, head, piece.whole, piece.rows)
            moves.append(Move(source, target, taken, put))
    comm.move(moves)


def send_recv(comm: Comm, engine, parts: dict, received: dict) -> None:
    """Every rank's tensor to the next one."""
    moves = []
    for source in range(comm.size):
        target = (source + 1) % comm.size
        if not {source, target} & set(comm.ranks):
            continue
        taken, put = parts.get(source), received.get(target)
        moves.append(Move(source, target, _all_of(engine, taken), _all_of(engine, put)))
    comm.move(moves)


def all_to_all(comm: Comm, engine, problem: Problem, parts: dict, wholes: dict, is_back: bool = False) -> None:
    """parts [heads, rows, dim] -> wholes [heads / P, total, dim]: all rows of a share of the heads; or back."""
    heads = _heads_of(wholes)
    moves = []
    for rank, owner in _pairs(comm):  # of rows, and of a share of the heads
        for head, piece in _blocks(problem, rank, heads):
            ends = [
                (rank, _block(engine, parts, rank, owner * heads + head, piece.local, piece.rows)),
                (owner, _block(engine, wholes, owner, head, piece.whole, piece.rows)),
            ]
            (source, taken), (target, put) = reversed(ends) if is_back else ends
            moves.append(Move(source, target, taken, put))
    comm.move(moves)


def reduce_scatter(comm: Comm, engine, problem: Problem, wholes: dict, parts: dict, factor: float = 1) -> None:
    """wholes [heads, total, dim] of each rank -> parts [heads, rows, dim]: factor times their sum, of its own rows."""
    sums = []
    for owner in range(comm.size):
        for head, piece in _blocks(problem, owner, _heads_of(parts)):
            taken = {rank: engine.block(wholes[rank], head, piece.whole, piece.rows) for rank in comm.ranks}
            sums.append(Sum(owner, taken, _block(engine, parts, owner, head, piece.local, piece.rows)))
    comm.add(sums, factor, problem.dtype)


def _heads_of(tensors: dict) -> int:
    return next(iter(tensors.values())).shape[0]


def _pairs(comm: Comm) -> list[tuple[int, int]]:
    """Of ranks, those with one that is held here."""
    pairs = ((first, second) for first in range(comm.size) for second in range(comm.size))
    return [pair for pair in pairs if set(pair) & set(comm.ranks)]


def _blocks(problem: Problem, rank: int, heads: int) -> Iterator[tuple[int, Piece]]:
    return ((head, piece) for head in range(heads) for piece in problem.pieces(rank))


def _block(engine, tensors: dict, rank: int, head: int, first: int, rows: int):
    return engine.block(tensors[rank], head, first, rows) if rank in tensors else None


def _all_of(engine, tensor):
    return None if tensor is None else engine.everything(tensor)
