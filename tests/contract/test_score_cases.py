"""Cases with score options: what lies in memory is what the reference is given, and a result without one is refused."""

from dataclasses import replace

import numpy as np
import pytest
from cases import Case
from check import check, make_problem, params_of

from fa3_cute.contract.params import DataType
from fa3_cute.contract.reference import low_precision_twin, to_bits
from fa3_cute.contract.rules import contract_problems

CASE = Case("bf16", 64, False, 6, 2, 40, 70, batch=2)
OPTIONS = {
    "softcap": {"softcap": 1.0},
    "sinks": {"sinks": (0.0, 3.0, -np.inf)},
    "sinks, BF16": {"sinks": (0.0, 60.0), "sink_dtype": "bf16"},
    "slopes": {"alibi": "heads"},
    "slopes of sequences": {"alibi": "sequences"},
    "boolean mask": {"attn_mask": "bool"},
    "mask of rows, with gaps": {"attn_mask": "bf16", "mask_dims": "qk", "mask_gap": 3},
    "mask of sequences": {"attn_mask": "fp32", "mask_dims": "bk"},
    "mask of heads": {"attn_mask": "fp16", "mask_dims": "hqk"},
    "chunks": {"attention_chunk": 32},
    "dropout": {"p_dropout": 0.25},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@each_option
def test_a_right_result_passes_and_one_without_the_option_is_refused(gpu, options):
    problem = make_problem(replace(CASE, **options))
    out, lse = low_precision_twin(*problem.inputs, "bf16", **problem.options)
    check(problem, to_bits(out, "bf16"), lse.astype(np.float32))
    out, lse = low_precision_twin(*problem.inputs, "bf16", causal=False)
    with pytest.raises(AssertionError, match="out: max error|should not be|LSE"):
        check(problem, to_bits(out, "bf16"), lse.astype(np.float32))


@each_option
def test_a_call_says_where_the_inputs_lie(gpu, options):
    case = replace(CASE, **options)
    problem, full = make_problem(case), (2, 6, 40, 70)
    params = params_of(problem)
    assert contract_problems(params) == []
    assert (params.softcap, params.attention_chunk, params.p_dropout) == (
        case.softcap,
        case.attention_chunk,
        case.p_dropout,
    )
    for name in ("s_aux", "alibi_slopes", "attn_mask", "rng_state"):
        assert bool(getattr(params, name)) == (name in problem.scores)
    given = problem.options
    if params.s_aux:
        kind = np.uint16 if params.s_aux_dtype is DataType.BF16 else np.float32
        assert np.array_equal(gpu.read(params.s_aux, (6,), kind), given["s_aux"])
    if params.alibi_slopes:
        shape = (2, 6) if params.alibi_batch_stride else (6,)
        assert params.alibi_batch_stride in (0, 6)
        assert np.array_equal(gpu.read(params.alibi_slopes, shape, np.float32), given["alibi_slopes"])
    if params.rng_state:
        assert np.array_equal(gpu.read(params.rng_state, (2,), np.uint64), given["rng_state"])
    if params.attn_mask:
        mask = given["attn_mask"]
        kinds = {None: np.uint8, DataType.FP16: np.float16, DataType.BF16: np.uint16, DataType.FP32: np.float32}
        kind = np.dtype(kinds[params.attn_mask_dtype])
        assert mask.shape == full and mask.dtype == kind
        strides = [getattr(params, f"attn_mask_{dim}_stride") for dim in ("batch", "head", "row")]
        if strides == [None] * 3:
            strides = [6 * 40 * 70, 40 * 70, 70]
        for place in ((0, 0, 0, 0), (1, 5, 39, 69), (1, 2, 3, 4), (0, 5, 20, 0)):
            at = params.attn_mask + kind.itemsize * int(np.dot(place, [*strides, 1]))
            assert gpu.read(at, (1,), kind).tobytes() == mask[place].tobytes()


def test_masks_hide_whole_rows_where_rows_differ(gpu):
    for mask in ("bool", "bf16"):
        problem = make_problem(replace(CASE, attn_mask=mask, sinks=(1.0,)))
        _, lse = low_precision_twin(*problem.inputs, "bf16", **problem.options)
        assert (lse[:, :, 20] == 1).all() and (lse[:, :, 19] > 1).all()


def test_names_say_what_is_set():
    assert str(CASE) == "bf16-d64-full-6over2heads-40x70-batch2-lse"
    names = {str(replace(CASE, **options)) for options in OPTIONS.values()}
    assert len(names) == len(OPTIONS)
    case = replace(CASE, softcap=30.0, sinks=(0, 1.5), attn_mask="bool", mask_dims="qk", attention_chunk=64)
    assert str(case) == f"{CASE}-softcap30-sinks(0,1.5)-mask(bool,qk)-chunk64"
