"""Arrays of all ranks' rows cut into the shares of the ranks, and put together again. NumPy only."""

import numpy as np

from .plan import Problem


def share_of(problem: Problem, whole: np.ndarray, rank: int) -> np.ndarray:
    """A rank's rows [heads, rows, dim] of an array [heads, total, dim]."""
    pieces = [whole[:, piece.whole : piece.whole + piece.rows] for piece in problem.pieces(rank)]
    return np.ascontiguousarray(np.concatenate(pieces, axis=1))


def whole_of(problem: Problem, shares: dict[int, np.ndarray]) -> np.ndarray:
    """The array whose shares these are; NaN where a rank's is not there."""
    heads, _, dim = next(iter(shares.values())).shape
    whole = np.full((heads, problem.total, dim), np.nan)
    for rank, share in shares.items():
        for piece in problem.pieces(rank):
            whole[:, piece.whole : piece.whole + piece.rows] = share[:, piece.local : piece.local + piece.rows]
    return whole
