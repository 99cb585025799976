"""Philox4x32-10 is the published one, and what is made of it: bits by place alone, in the right number, independent."""

from itertools import product

import numpy as np
import pytest

from fa3_cute.contract.dropout import counter_of, effective_p, key_of, num_dropped, philox
from fa3_cute.contract.philox import dropout_bytes, keep_mask

# (counter, key, words) of Random123's kat_vectors, philox4x32 10.
KNOWN = (
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
CALL = {"seed": 0x123456789ABCDEF0, "offset": 12, "sequence": 3, "head": 5}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert philox(counter, key) == words
    arrays = philox([np.full(2, word, np.uint64) for word in counter], [np.full(2, word, np.uint64) for word in key])
    assert [array.tolist() for array in arrays] == [[word] * 2 for word in words]


def test_all_bits_of_seed_and_offset_count():
    keys = {key_of(1 << bit, 0) for bit in range(64)} | {key_of(0, 1 << bit) for bit in range(64)} | {key_of(0, 0)}
    assert len({first for first, _ in keys}) == len({second for _, second in keys}) == 129


def byte_of(query: int, key: int, seed: int, offset: int, sequence: int, head: int) -> int:
    """The definition, one place at a time."""
    counter = 4 * (key // 32) + key % 8 // 2, 8 * (query // 16) + query % 8, head, sequence
    words = philox(counter, philox((offset % 2**32, offset >> 32, 0, 0), (seed % 2**32, seed >> 32))[:2])
    word = words[2 * (key // 16 % 2) + query // 8 % 2]
    return word >> 8 * (2 * (key // 8 % 2) + key % 2) & 0xFF


@pytest.mark.parametrize(
    ("first_query", "first_key"), [(0, 0), (1, 7), (13, 30), (8, 16), (2**31 - 40, 5), (3, 2**31 - 80)]
)
def test_arrays_agree_with_the_definition(first_query, first_key):
    queries, keys = range(first_query, first_query + 19), range(first_key, first_key + 70)
    expected = [[byte_of(query, key, **CALL) for key in keys] for query in queries]
    assert dropout_bytes(**CALL, queries=queries, keys=keys).tolist() == expected


def test_no_byte_serves_two_places():
    """One block of queries and keys takes each byte of its calls once."""
    places = {
        (*counter_of(query, key), 2 * (key // 16 % 2) + query // 8 % 2, 2 * (key // 8 % 2) + key % 2)
        for query, key in product(range(32), range(64))
    }
    assert len(places) == 32 * 64


def test_a_part_is_a_part_of_the_whole():
    whole = keep_mask(0.3, **CALL, queries=range(100), keys=range(200))
    assert (keep_mask(0.3, **CALL, queries=slice(33, 71), keys=slice(45, 146)) == whole[33:71, 45:146]).all()
    order = np.random.default_rng(0).permutation(100)
    assert (keep_mask(0.3, **CALL, queries=order, keys=[7, 3]) == whole[order][:, [7, 3]]).all()


@pytest.mark.parametrize("p_dropout", [1e-6, 0.1, 0.25, 0.5, 0.9, 0.9999])
def test_rate(p_dropout):
    p, mask = effective_p(p_dropout), keep_mask(p_dropout, **CALL, queries=range(1024), keys=range(1024))
    assert abs(mask.mean() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / mask.size)


def test_bytes_are_uniform():
    counts = np.bincount(dropout_bytes(**CALL, queries=range(1024), keys=range(1024)).ravel(), minlength=256)
    expected = 1024 * 1024 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


def test_neighbours_do_not_correlate():
    def bits(**changed) -> np.ndarray:
        mask = keep_mask(0.5, **(CALL | changed), queries=range(512), keys=range(512))
        return np.where(mask, 1.0, -1.0)

    here, shifts = bits(), (1, 2, 8, 16, 32, 64)
    pairs = {f"query + {d}": (here[d:], here[:-d]) for d in shifts}
    pairs |= {f"key + {d}": (here[:, d:], here[:, :-d]) for d in shifts}
    pairs |= {f"{name} + 1": (here, bits(**{name: CALL[name] + 1})) for name in CALL}
    for name, (one, other) in pairs.items():
        assert abs((one * other).mean()) < 5 / np.sqrt(one.size), name


def test_nothing_and_all():
    assert keep_mask(0.0, **CALL, queries=range(64), keys=range(64)).all()
    assert keep_mask(0.5, **CALL, queries=range(0), keys=range(64)).shape == (0, 64)


@pytest.mark.parametrize(
    ("p_dropout", "expected"),
    [(0.0, 0), (0, 0), (1e-60, 1), (1e-9, 1), (0.49 / 256, 1), (1.49 / 256, 1), (1.5 / 256, 2), (0.1, 26), (0.5, 128)]
    + [(2.5 / 256, 3), (255 / 256, 255), (0.999, 255), (1 - 1e-16, 255)],
)
def test_number_that_is_dropped(p_dropout, expected):
    assert num_dropped(p_dropout) == expected
    assert effective_p(p_dropout) == expected / 256
