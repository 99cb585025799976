"""Backward problems as GPU tests make them, with device memory on the host: addresses, strides, and what is found."""

import backward_problems
import numpy as np
import pytest
from backward_calls import serve_all
from backward_cases import MASKED, NAMES, BackwardCase, backward_cases, feature_cases, inputs_of
from backward_problems import BackwardProblem, run_and_check
from backward_rows import config_of, rows_of
from cases import Case
from fake_gpu import OFFSET_BITS
from images import contiguous, heads_before_rows, padded

from fa3_cute.contract.backward_params import grad_dtype_of, plain_backward, sizes_of, strides_of
from fa3_cute.contract.backward_reference import Saved, backward_twin
from fa3_cute.contract.backward_rules import contract_problems
from fa3_cute.contract.head_dims import columns_of
from fa3_cute.contract.params import DataType, is_packed
from fa3_cute.contract.reference import to_bits
from fa3_cute.contract.status import Status
from fa3_cute.planning.backward_launch import BackwardShape, workspace_bytes
from fa3_cute.planning.backward_tables import SHORT_QUERIES

DENSE = BackwardCase(Case("bf16", 64, True, 6, 2, 70, 50, 2), has_dlse=True)
PACKED = next(case for case in backward_cases(64) if case.layout == "gaps" and case.used)
# Of s_aux, attn_mask and gradients, by the field that names it; BF16 as bits.
ELEMENTS = {None: np.float32, DataType.FP32: np.float32, DataType.FP16: np.float16, DataType.BF16: np.uint16}
PLACES = {"contiguous": contiguous, "padded": padded, "heads_before_rows": heads_before_rows}


def of_mask(p, heads, rows):
    """(shape, strides) of the mask, of one entry where the stride is 0."""
    strides = [getattr(p, f"attn_mask_{dim}_stride") for dim in ("batch", "head", "row")]
    sizes = zip((p.batch_size, heads, rows), strides, strict=True)
    return (*(size if stride else 1 for size, stride in sizes), p.seqlen_k), strides


def of_scores(at, p, heads, rows):
    """The reference's options."""
    found: dict = {"softcap": p.softcap, "attention_chunk": p.attention_chunk, "p_dropout": p.p_dropout}
    if p.s_aux:
        found["s_aux"] = at(p.s_aux, (heads,), ELEMENTS[p.s_aux_dtype])
    if p.alibi_slopes:
        found["alibi_slopes"] = at(p.alibi_slopes, (p.batch_size, heads)[not p.alibi_batch_stride :], np.float32)
    if p.attn_mask:
        element = np.uint8 if p.attn_mask_dtype is None else ELEMENTS[p.attn_mask_dtype]
        shape, strides = of_mask(p, heads, rows)
        found["attn_mask"] = at(p.attn_mask, shape, element, strides)
    if p.rng_state:
        found["rng_state"] = at(p.rng_state, (2,), np.uint64)
    return found


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
        of_gradients = grad_dtype_of(p)
        elements = dict.fromkeys(NAMES, ELEMENTS[of_gradients])
        tensors = {
            name: at(
                getattr(p, name),
                (*sizes_of(p, name)[kept], columns_of(p, name)),
                elements.get(name, ELEMENTS[p.dtype]),
                strides_of(p, name)[kept],
            )
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
        before = {name: tensors[name].copy() for name in ("dk", "dv") if p.accumulate_dkv}
        dtype, saved = p.dtype.name.lower(), Saved(tensors["out"], lse, dlse, **before)
        inputs = [tensors[name] for name in ("q", "k", "v", "dout")]
        scores, grad_dtype = of_scores(at, p, heads, rows), of_gradients.name.lower()
        found = backward_twin(*inputs, dtype, saved, grad_dtype=grad_dtype, **options, **lengths, **scores)
        for name, values in zip(NAMES, found, strict=True):
            if name in tensors:
                is_there = ~np.isnan(values)
                tensors[name][is_there] = to_bits(values, grad_dtype)[is_there]
                call.spoil(name, tensors[name])
        if p.d_s_aux:
            at(p.d_s_aux, (heads,), np.float32)[...] = found.d_s_aux
        if p.d_bias:
            shape, strides = of_mask(p, heads, rows)
            at(p.d_bias, shape, np.float32, strides)[...] = found.d_bias
            call.spoil("d_bias", at(p.d_bias, shape, np.float32, strides))
        return Status.OK

    call.spoil = lambda name, array: None
    monkeypatch.setattr(backward_problems, "call", call)
    return call


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("case", [DENSE, PACKED], ids=str)
def test_a_right_result_passes(backward, gpu, case, place):
    run_and_check(case, gpu.stream, place)


@pytest.fixture
def served(monkeypatch):
    serve_all(monkeypatch)


SMALL = {"dtype": "fp16", "head_dim": 64, "is_causal": True, "num_heads": 4, "num_heads_k": 2, "batch": 2}
EVERY_FEATURE = BackwardCase(
    Case(
        **SMALL, seqlen_q=40, seqlen_k=70, **MASKED["all"] | {"mask_gap": 3, "alibi": "sequences", "sink_dtype": "bf16"}
    ),
    has_dlse=True,
    grad_dtype="fp32",
    accumulates=True,
)
BOOLEAN = BackwardCase(Case(**SMALL, seqlen_q=40, seqlen_k=70, attn_mask="bool", attention_chunk=30))


@pytest.mark.parametrize("place", [contiguous, padded], ids=lambda place: place.__name__)
@pytest.mark.parametrize("case", [EVERY_FEATURE, BOOLEAN], ids=str)
def test_a_right_result_with_features_passes(backward, served, gpu, case, place):
    run_and_check(case, gpu.stream, place)


def test_a_wrong_gradient_of_a_bias_is_found(backward, served, gpu):
    def spoil(name, array):
        if name == "d_bias":
            array[0, 1, 30, 7] += 1

    backward.spoil = spoil
    with pytest.raises(AssertionError, match=r"out \(d_bias\)"):
        run_and_check(EVERY_FEATURE, gpu.stream)


def test_a_write_between_the_rows_of_a_bias_is_found(backward, served, gpu):
    problem = BackwardProblem(EVERY_FEATURE)
    problem.run(gpu.stream)
    tensor = problem.score_gradients["d_bias"]
    tensor.image.buffer.bytes[tensor.offset + 70 * 4] = 0  # behind the first row
    with pytest.raises(AssertionError, match="1 bytes written outside the output"):
        problem.score_results(gpu.stream)


def test_every_case_of_a_feature_is_a_good_call(served, gpu):
    for case in feature_cases(64)[::17]:
        assert contract_problems(BackwardProblem(case).params()) == [], case


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


# Of each of head_dim 128 one, in BF16, of short sequences and of those that are run as if they were long.
OF_EACH_CONFIG = {
    config_of(case): case
    for case in backward_cases(128)
    if case.forward.dtype == "bf16" and case.forward.seqlen_q < 700
}


@pytest.mark.parametrize("case", OF_EACH_CONFIG.values(), ids=str)
def test_kernels_are_those_that_tests_expect(case, gpu):
    """Asked as the GPU tests ask; before and afterwards a call is planned by its length."""
    params = BackwardProblem(case).params()
    shape = BackwardShape.of(plain_backward(params))
    of_itself = shape.config, workspace_bytes(params)
    with rows_of(case):
        assert shape.config == config_of(case)
        tiles = {config.tile_m for config in (of_itself[0], config_of(case))}
        assert (workspace_bytes(params) == of_itself[1]) == (len(tiles) == 1)
    assert (shape.config, workspace_bytes(params)) == of_itself and of_itself[0].tile_m == 64


def test_cases_have_every_row_of_128_columns():
    assert SHORT_QUERIES > 700
    found = {(cfg.mask, cfg.tile_m) for cfg in OF_EACH_CONFIG}
    assert found >= {("full", 64), ("full", 80), ("causal", 64), ("local", 64)}
