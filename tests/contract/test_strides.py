"""Whether rows of out overlap: exact, against brute force."""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_calls import DENSE, PACKED, first_problem

from fa3_cute.contract import strides
from fa3_cute.planning.operations import problems

STRIDE = st.sampled_from([None, 0, 8, 64, 128, 136, 256, 264, 384, 512, 1024, 4096, 3, -8])
SIZE = st.integers(1, 5)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from([DENSE, PACKED]), st.tuples(SIZE, SIZE, SIZE), st.tuples(STRIDE, STRIDE, STRIDE))
def test_strides_of_out_against_brute_force(base, sizes, given_strides):
    """Refused are the layouts that TMA does not take and those whose rows meet, and no others."""
    batch, rows, heads = sizes
    params = replace(
        base,
        batch_size=batch,
        num_heads=heads,
        num_heads_k=1,
        out_batch_stride=given_strides[0],
        out_row_stride=given_strides[1],
        out_head_stride=given_strides[2],
        **{"seqlen_q" if base is DENSE else "total_q": rows},
    )
    sizes = (batch if base is DENSE else 1, rows, heads)
    contiguous = (rows * heads * 128, heads * 128, 128)
    real = [default if stride is None else stride for stride, default in zip(given_strides, contiguous, strict=True)]
    fit = all(size == 1 or stride >= 128 and stride % 8 == 0 for stride, size in zip(real, sizes, strict=True))
    apart = fit and not meet(list(zip(real, sizes, strict=True)), 128)
    assert (problems(params) == []) == apart
    assert first_problem(params) == (problems(params) or [None])[0]


def meet(dims, head_dim: int) -> bool:
    """Two rows share an element: their starts in order, one after the other."""
    starts = sorted(
        sum(i * stride for i, (stride, _) in zip(index, dims, strict=True))
        for index in np.ndindex(*(size for _, size in dims))
    )
    return any(b - a < head_dim for a, b in zip(starts, starts[1:], strict=False))


def test_overlap_against_brute_force():
    """Small layouts of every kind, nested or not; both answers come often."""
    rng = random.Random(9)
    found = {True: 0, False: 0}
    for _ in range(8000):
        head_dim = rng.choice((1, 2, 3, 5, 8))
        dims = [(rng.randint(head_dim, 70), rng.randint(1, 6)) for _ in range(3)]
        is_met = meet(dims, head_dim)
        assert strides.overlap(dims, head_dim) == is_met, (dims, head_dim)
        found[is_met] += 1
    assert min(found.values()) > 1000


def test_sums_of_quotients():
    for count, step, start, divisor in product(range(6), range(9), range(-20, 20), range(1, 8)):
        expected = sum((start + i * step) // divisor for i in range(count))
        assert strides._sum_of_quotients(count, step, start, divisor) == expected


LARGE = 5000
BEYOND = 3 * 2**30


@pytest.mark.parametrize(
    "dims, is_met",
    [
        # contiguous, heads first, nested with gaps
        ([(64 * LARGE**2, LARGE), (64 * LARGE, LARGE), (64, LARGE)], False),
        ([(64 * LARGE**2, LARGE), (64, LARGE), (64 * LARGE, LARGE)], False),
        # the batch stride forgotten: that of a contiguous tensor, with rows twice as far apart
        ([(64 * LARGE**2, LARGE), (128 * LARGE, LARGE), (64, LARGE)], True),
        # the last two of a dimension that steps into the next, and just not
        ([(128 * (LARGE - 1), LARGE), (128, LARGE), (BEYOND, LARGE)], True),
        ([(128 * (LARGE - 1) + 64, LARGE), (128, LARGE), (BEYOND * LARGE, LARGE)], False),
        # two dimensions interleaved with a third: 7 * 11 * 13 steps apart before they meet
        ([(64 * 77, 13), (64 * 91, 11), (64 * 143, 7)], False),
        ([(64 * 77, 14), (64 * 91, 12), (64 * 143, 7)], True),
        ([(64, 1), (2**22, 2**18), (64, 2**18)], True),
        ([(0, 1), (2**24, 2**18), (64, 2**18)], False),
    ],
)
def test_large_layouts(dims, is_met):
    """No matter how many rows: what is tried in turn is the smallest dimension's."""
    assert strides.overlap(dims, 64) == is_met


@pytest.mark.parametrize(
    "row, batch",
    [(4096, None), (2056, None), (2048, 2048 * 511), (2048, 2048 * 512 - 64), (8192, 2048 * 512), (136, 2048)],
)
def test_a_forgotten_stride_is_found(row, batch):
    """One stride of out given for a padded tensor, another left as that of a contiguous one."""
    params = replace(DENSE, out_row_stride=row, out_batch_stride=batch)
    (problem,) = problems(params)
    assert problem.status == -7 and "must keep the rows of out apart" in problem.detail
    assert f"out_row_stride={row}" in problem.detail
