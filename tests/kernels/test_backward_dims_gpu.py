"""Backward of dims that the tables do not have, on the GPU: tiles with columns that the tensors lack, V of its own."""

import pytest
from backward_cases import dim_cases
from backward_problems import run_and_check
from backward_rows import as_if_long, dim_config_of
from images import contiguous, heads_before_rows, padded

from fa3_cute.planning.selections import backward_dim_configs

PLACES = (padded, contiguous, heads_before_rows)
CASES = dim_cases()


def test_every_kernel_of_the_selection_is_run():
    assert {dim_config_of(case) for case in CASES} == set(backward_dim_configs())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "number, case", list(enumerate(CASES)), ids=lambda value: "" if isinstance(value, int) else str(value)
)
def test_cases(number, case, stream):
    """Where rows have gaps between them NaN lies behind their last columns, of gradients what must stay there."""
    with as_if_long(bool(case.lengths)):
        run_and_check(case, stream, PLACES[number % len(PLACES)])
