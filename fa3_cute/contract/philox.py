"""The bits of dropout.py in NumPy: which probabilities of a tile are kept."""

import numpy as np

from .dropout import counter_of, key_of, num_dropped, philox


def keep_mask(p_dropout: float, seed: int, offset: int, sequence: int, head: int, queries, keys) -> np.ndarray:
    """bool [len(queries), len(keys)]: whether dropout keeps the probability of a query and a key.

    p_dropout       the probability to drop, in [0, 1); in units of 1/256, see dropout.num_dropped
    seed, offset    64 bits each: the two elements of rng_state
    sequence, head  number of the sequence in the batch, query head
    queries, keys   positions in the sequence, from 0: a slice with start and stop, a range or integers
    """
    return dropout_bytes(seed, offset, sequence, head, queries, keys) < 256 - num_dropped(p_dropout)


def dropout_bytes(seed: int, offset: int, sequence: int, head: int, queries, keys) -> np.ndarray:
    """uint8 [len(queries), len(keys)]: the random bytes, as keep_mask."""
    queries, keys = _positions(queries), _positions(keys)
    key_words, key_places = np.unique(counter_of(0, keys)[0], return_inverse=True)
    query_words, query_places = np.unique(counter_of(queries, 0)[1], return_inverse=True)
    alike = [np.full((1, 1), number, np.uint64) for number in (head, sequence, *key_of(seed, offset))]
    calls = np.broadcast_arrays(*philox((key_words[None, :], query_words[:, None], *alike[:2]), alike[2:]))
    words = np.stack(calls, axis=-1).astype("<u4")
    bytes_of = words.view(np.uint8)  # [query words, key words, 16]
    within = 8 * (keys // 16 % 2) + 2 * (keys // 8 % 2) + keys % 2  # byte of the call for queries / 8 % 2 = 0
    places = within[None, :] + 4 * (queries // 8 % 2)[:, None]
    return bytes_of[query_places[:, None], key_places[None, :], places.astype(np.int64)]


def _positions(positions) -> np.ndarray:
    """uint64, in one dimension."""
    if isinstance(positions, slice):
        positions = range(positions.start, positions.stop)
    return np.asarray(positions, np.uint64)
