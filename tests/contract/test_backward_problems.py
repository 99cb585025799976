"""Backward problems as GPU tests make them, with device memory on the host: addresses, strides, and what is found."""

import backward_problems
import numpy as np
import pytest
from backward_cases import NAMES, BackwardCase, backward_cases, inputs_of
from backward_problems import BackwardProblem, run_and_check
from cases import Case
from fake_gpu import OFFSET_BITS
from images import contiguous, heads_before_rows, padded

from fa3_cute.contract.backward_params import plain_backward, sizes_of, strides_of
from fa3_cute.contract.backward_reference import Saved, backward_twin
from fa3_cute.contract.backward_rules import contract_problems
from fa3_cute.contract.params import is_packed
from fa3_cute.contract.reference import to_bits
from fa3_cute.contract.status import Status

DENSE = BackwardCase(Case("bf16", 64, True, 6, 2, 70, 50, 2), has_dlse=True)
PACKED = next(case for case in backward_cases(64) if case.layout == "gaps" and case.used)
PLACES = {"contiguous": contiguous, "padded": padded, "heads_before_rows": heads_before_rows}


@pytest.fixture
def backward(gpu, monkeypatch):
    """Stands in for `backward`: the twin of what the addresses and strides of a call hold. At last `spoil(name, array)`
    is called with the memory of each gradient."""

    def at(address, shape, dtype, strides=None):
        buffer = gpu.buffers[address >> OFFSET_BITS].bytes
        size = np.dtype(dtype).itemsize
        strides = strides and [stride * size for stride in (*strides, 1)]
        return np.ndarray(shape, dtype, buffer, address & (1 << OFFSET_BITS) - 1, strides)

    def call(params, stream):
        assert contract_problems(params) == []
        p = plain_backward(params)
        kept = slice(1 if is_packed(p) else 0, None)
        element = np.float16 if p.dtype == 0 else np.uint16
        tensors = {
            name: at(getattr(p, name), (*sizes_of(p, name)[kept], p.head_dim), element, strides_of(p, name)[kept])
            for name in ("q", "k", "v", "dout", "out", *NAMES)
            if getattr(p, name)
        }
        batch, rows, heads = sizes_of(p, "q")
        lse, dlse = (
            at(address, (batch, heads, rows)[kept], np.float32) if address else None
            for address in (p.softmax_lse, p.dlse)
        )
        lengths = {
            name: at(address, (p.batch_size + (name[:2] == "cu"),), np.int32)
            for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
            if (address := getattr(p, name))
        }
        options = {"causal": p.is_causal, "window_size": (p.window_size_left, p.window_size_right)}
        dtype, saved = p.dtype.name.lower(), Saved(tensors["out"], lse, dlse)
        inputs = [tensors[name] for name in ("q", "k", "v", "dout")]
        for name, values in zip(NAMES, backward_twin(*inputs, dtype, saved, **options, **lengths), strict=True):
            if name in tensors:
                is_there = ~np.isnan(values)
                tensors[name][is_there] = to_bits(values, dtype)[is_there]
                call.spoil(name, tensors[name])
        return Status.OK

    call.spoil = lambda name, array: None
    monkeypatch.setattr(backward_problems, "call", call)
    return call


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("case", [DENSE, PACKED], ids=str)
def test_a_right_result_passes(backward, gpu, case, place):
    run_and_check(case, gpu.stream, place)


@pytest.mark.parametrize("wanted", ["dq", "dk", "dv", "dk dv"])
def test_what_is_not_wanted_must_be_untouched(backward, gpu, wanted):
    problem = BackwardProblem(DENSE)
    others = {name: None for name in NAMES if name not in wanted}
    results = problem.run(gpu.stream, **others)
    assert [got is None for got in results] == [name in others for name in NAMES]
    problem.check(*results)
    name = next(iter(others))
    problem.tensors[name].image.buffer.bytes[-1] = 0
    with pytest.raises(AssertionError, match=f"{name} is not wanted, and written"):
        problem.results(gpu.stream, *(name not in others for name in NAMES))


def test_every_case_is_a_call_that_is_served(gpu):
    for case in backward_cases(64)[::9] + backward_cases(128)[::11]:
        for place in PLACES.values():
            assert contract_problems(BackwardProblem(case, place).params(deterministic=True)) == [], case


@pytest.mark.parametrize(
    "case, name, index, words",
    [
        (DENSE, "dv", (1, 49, 1, 5), r"out \(dv\)"),
        (DENSE, "dq", (0, 3, 2, 1), "dq: 1 rows .* should be 0"),
        (PACKED, "dk", (1, 0, 0), "rows are written that no sequence uses|should be NaN"),
    ],
    ids=["value", "zero", "unused"],
)
def test_a_wrong_result_is_found(backward, gpu, case, name, index, words):
    def spoil(of, array):
        if of == name:
            array[index] = to_bits(1e-6 if "should be 0" in words else 9.0, case.forward.dtype)

    backward.spoil = spoil
    with pytest.raises(AssertionError, match=words):
        run_and_check(case, gpu.stream)


def test_a_nan_that_is_not_the_poison_of_before_is_found(backward, gpu):
    def spoil(name, array):
        if name == "dv":
            array[1] = to_bits(np.nan, PACKED.forward.dtype)

    backward.spoil = spoil
    with pytest.raises(AssertionError, match="dv: rows are written that no sequence uses"):
        run_and_check(PACKED, gpu.stream)


def test_a_write_outside_is_found(backward, gpu):
    problem = BackwardProblem(DENSE)
    problem.run(gpu.stream)
    problem.tensors["dk"].image.buffer.bytes[5] = 0
    with pytest.raises(AssertionError, match="1 bytes written outside the output"):
        problem.results(gpu.stream)


def test_a_problem_takes_other_inputs(backward, gpu):
    """As between the replays of a graph: what is judged is what it holds now."""
    problem = BackwardProblem(DENSE)
    before = problem.run(gpu.stream)
    problem.check(*before)
    problem.fill(inputs_of(DENSE, scale_of_q=3.0))
    problem.check(*problem.run(gpu.stream))
    with pytest.raises(AssertionError):
        problem.check(*before)


def test_scratch_memory_is_full_of_nan(gpu):
    problem = BackwardProblem(PACKED)
    fields, tensor = problem.workspace(1 << 12)
    assert contract_problems(problem.params(**fields)) == [] and tensor.is_untouched(gpu.stream)
    assert fields["workspace_bytes"] == 1 << 12
