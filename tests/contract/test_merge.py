"""MergeParams: what merge_attention accepts, refuses and means. No GPU."""

from dataclasses import replace

import pytest
from rule_calls import BF16, DENSE, FP16, FP32, first_problem

from fa3_cute.contract.status import Status


@pytest.mark.parametrize("value", [FP32, 3])
@pytest.mark.parametrize("name, accepted", [("dtype", "FP16, BF16 or FP8_E4M3"), ("out_dtype", "None or BF16")])
def test_partial_results_alone_are_fp32(name, accepted, value):
    """No kernel reads or writes it in `forward`."""
    problem = first_problem(replace(DENSE, **{"dtype": BF16, name: value}))
    assert problem.status is Status.INVALID_ARGUMENT
    assert f"{name}=" in problem.detail and accepted in problem.detail
    assert first_problem(replace(DENSE, dtype=FP16)) is None
