"""Sliding windows on the GPU: every kind of band over dense and packed sequences, and the two that are causal masks."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cases import DTYPES, HEAD_DIMS, HEADS, Case, Layout, in_turn, with_heads
from check import check, make_problem, packed_problem, run, run_and_check

pytestmark = pytest.mark.gpu

INT32_MAX = 2**31 - 1

# (left, right). What each is for:
WINDOWS = (
    (0, 0),  # the diagonal alone
    (5, 3),  # far narrower than a tile
    (64, 64),  # about a tile
    (200, 50),  # several tiles, unlike sides
    (30, -1),  # one side each
    (-1, 30),
    (0, -1),  # only the keys from the diagonal on
    (257, 0),  # causal, with a bound
    (1000, 1000),  # wider than the sequence
    (INT32_MAX, 17),  # bounds that overflow if added to
    (17, INT32_MAX),
    (INT32_MAX, INT32_MAX),
)
# (seqlen_q, seqlen_k): as many queries as keys; fewer; more, where a narrow window leaves the first rows without a key.
LENGTHS = ((420, 420), (300, 777), (550, 130))
FAMILIES = [Case(dtype, head_dim, False, 6, 2, 0, 0, batch=2) for dtype, head_dim in product(DTYPES, HEAD_DIMS)]


def sized(family: Case, lengths: tuple[int, int], window: tuple[int, int], **changes) -> Case:
    return replace(family, seqlen_q=lengths[0], seqlen_k=lengths[1], window=window, **changes)


GRID = [
    sized(family, lengths, window, has_lse=(i + j) % 2 == 0)
    for (family, (i, window)), (j, lengths) in product(in_turn(FAMILIES, enumerate(WINDOWS)), enumerate(LENGTHS))
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, stream):
    run_and_check(make_problem(case), stream)


@pytest.mark.parametrize("window", [(20, 0), (0, 200), (100, 100)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 300), (239, 1), (799, 3), (128, 128), (192, 320), (64, 2000)], ids=str)
@pytest.mark.parametrize("family", FAMILIES[2::4], ids=str)
def test_unusual_lengths(family, lengths, window, stream):
    """One row, one key, whole tiles only, a band that begins thousands of keys in; rows without a key."""
    run_and_check(make_problem(sized(family, lengths, window)), stream)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_head_ratios(family, heads, stream):
    run_and_check(make_problem(with_heads(sized(family, (333, 400), (90, 10)), heads)), stream)


@pytest.mark.parametrize("window", [(512, 0), (300, 400), (0, 0)], ids=str)
@pytest.mark.parametrize("family", FAMILIES[1::3], ids=str)
def test_several_tiles_per_cta(family, window, stream):
    """More tiles than CTAs, so that rings and barriers are carried on; interior tiles of the band, which no mask cuts;
    at the top of each head, tiles without a key."""
    case = with_heads(sized(family, (1900, 1500), window), (16, 4))
    run_and_check(make_problem(case), stream)


@pytest.mark.parametrize("window", [(40, 419), (40, 418), (-1, 357), (0, 0), (63, 0), (-1, 300)], ids=str)
@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_a_band_that_misses_the_keys(family, window, stream):
    """130 keys for 550 queries: the band of the first 420 - right rows ends before key 0."""
    problem = make_problem(sized(family, (550, 130), window))
    out, lse = run(problem, stream)
    num_empty = 420 - window[1]
    assert not out[:, :num_empty].any() and (lse[..., :num_empty] == -np.inf).all()
    assert np.isfinite(lse[..., num_empty:]).all()
    check(problem, out, lse)


@pytest.mark.parametrize("left", [-1, INT32_MAX])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_an_unbounded_left_and_no_right_is_causal(family, lengths, left, stream):
    """The same bits, out and LSE."""
    problem = make_problem(sized(family, lengths, (left, 0)))
    windowed = run(problem, stream)
    problem.upload()
    causal = run(problem, stream, is_causal=True, window_size_left=-1, window_size_right=-1)
    for a, b in zip(windowed, causal, strict=True):
        assert a.tobytes() == b.tobytes()
    check(problem, *causal)


@pytest.mark.parametrize("seqused_k", [None, (400, 0, 1, 260)], ids=["whole", "used"])
@pytest.mark.parametrize("window", [(0, 0), (50, 20), (-1, 100), (100, -1), (INT32_MAX, 5), (2000, 2000)], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_packed(family, window, seqused_k, stream):
    """Each sequence has its own diagonal, which its used keys move."""
    layout = Layout((300, 77, 129, 500), (420, 0, 1, 290), before=3, after=5)
    used = {"seqused_k": seqused_k} if seqused_k else {}
    run_and_check(packed_problem(family, layout, used=used, window=window), stream)


@pytest.mark.parametrize("window", [(60, 0), (0, 60), (100, 30)], ids=str)
@pytest.mark.parametrize("family", FAMILIES[::2], ids=str)
def test_dense_with_used_lengths(family, window, stream):
    lengths = {"seqused_q": (300, 111), "seqused_k": (123, 420)}
    run_and_check(make_problem(sized(family, (300, 420), window), lengths=lengths), stream)


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_runs_agree_bit_for_bit(family, stream):
    problem = make_problem(sized(family, (900, 1100), (200, 100), num_heads=16))
    first = run(problem, stream)
    check(problem, *first)
    for _ in range(20):
        problem.out.poison(stream)
        for a, b in zip(first, run(problem, stream), strict=True):
            assert a.tobytes() == b.tobytes()
