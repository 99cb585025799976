"""FP8 forward on the GPU: lengths, masks, ratios and layouts of dense sequences, values at the edge of the format, and
sums of any length. Descales, packed sequences and decode have modules of their own."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, FP8_FAMILIES, FP8_FEW, FP8_GRID, FP8_HEAD_DIMS, FP8_MANY_TILES, FP8_OUT_DTYPES, FP8_SOME, Case
from check import assert_same_bits, check, make_problem, params_of, run, run_and_check
from descales import fixed, per_batch_and_head
from images import heads_before_rows, padded
from test_forward_gpu import set_values
from test_window_gpu import LENGTHS, WINDOWS

from fa3_cute import Status, forward
from fa3_cute.contract.reference import as_float, attention_reference, to_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", FP8_GRID, ids=str)
def test_grid(case, stream):
    """With descales, and without for one of the head ratios."""
    run_and_check(make_problem(case, descale=None if case.num_heads == 2 else per_batch_and_head), stream)


WINDOWED = [
    Case(
        FP8,
        head_dim,
        False,
        6,
        2,
        *LENGTHS[(i + j) % 3],
        batch=2,
        has_lse=(i + j) % 2 == 0,
        window=window,
        out_dtype=FP8_OUT_DTYPES[i // 2 % 2],
    )
    for j, head_dim in enumerate(FP8_HEAD_DIMS)
    for i, window in enumerate(WINDOWS[:9])
]


@pytest.mark.parametrize("case", WINDOWED, ids=str)
def test_windows(case, stream):
    run_and_check(make_problem(case, descale=per_batch_and_head), stream)


@pytest.mark.parametrize("case", FP8_MANY_TILES, ids=str)
def test_several_tiles_per_cta(case, stream):
    """More tiles than CTAs, so that the rings, V's transposed one too, are carried on; the same bits ten times."""
    problem = make_problem(case, descale=per_batch_and_head)
    first = run(problem, stream)
    check(problem, *first)
    for _ in range(9):
        problem.poison_outputs(stream)
        assert_same_bits(run(problem, stream), first)


@pytest.mark.parametrize("scale", [1e-3, 0.25, 1.0])
@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_softmax_scale(case, scale, stream):
    run_and_check(make_problem(case, softmax_scale=scale, descale=per_batch_and_head), stream)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_strided(case, place, stream):
    """Gaps of the output untouched, inputs unchanged, with the gaps of K and V full of NaN."""
    problem = make_problem(case, place, descale=per_batch_and_head)
    run_and_check(problem, stream)
    for tensor in (problem.q, problem.k, problem.v, *problem.descales.values()):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


def test_bf16_is_the_default_of_out(stream):
    problem = make_problem(FP8_FAMILIES[0])
    expected = run(problem, stream)
    problem.poison_outputs(stream)
    assert_same_bits(run(problem, stream, out_dtype=None), expected)


@pytest.mark.parametrize("head_dim", [136, 248])
def test_head_dims_without_a_kernel_are_refused(head_dim, stream):
    problem = make_problem(replace(FP8_FAMILIES[0], head_dim=head_dim))
    assert forward(params_of(problem), stream) == Status.FP8_HEAD_DIM
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)


# ---- the ends of the format ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs, is_descaled", [("random", True), ("random", False), ("alike", False)])
@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_saturated_values(case, signs, is_descaled, stream):
    """All of Q, K and V are 448 or -448: scores of up to 448 * 448 * head_dim before they are scaled."""
    one = 1 / 448
    scale, descale = (None, fixed(q=one, k=one, v=one)) if is_descaled else (one**2 / case.head_dim**0.5, None)
    problem = make_problem(case, softmax_scale=scale, descale=descale)
    rng = np.random.default_rng(1)
    choices = (448.0,) if signs == "alike" else (448.0, -448.0)
    values = {name: rng.choice(choices, getattr(problem, name).array.shape) for name in "qkv"}
    run_and_check(set_values(problem, **values), stream)


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_zeros(case, name, stream):
    """One of Q, K and V is all zeros of both signs. Without scores O is the mean of V, whose values sum up exactly."""
    problem = replace(make_problem(case, descale=per_batch_and_head), exact_scores=name != "v")
    rng = np.random.default_rng(2)
    values = {"v": rng.integers(-4, 5, problem.v.array.shape) / 4}
    values[name] = rng.choice((0.0, -0.0), getattr(problem, name).array.shape)
    run_and_check(set_values(problem, **values), stream)


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_subnormal_values(case, stream):
    """All values are up to 7 times 2^-9 and the descales bring them back: nothing may flush them to zero."""
    problem = make_problem(case, descale=fixed(q=2.0**7, k=2.0**8, v=2.0**9))
    rng = np.random.default_rng(3)
    values = {
        name: rng.choice((-1, 1), getattr(problem, name).array.shape)
        * 2.0**-9
        * rng.integers(1, 8, getattr(problem, name).array.shape)
        for name in "qkv"
    }
    # Dot products are integers of 13 bits, times 2^-18.
    run_and_check(set_values(replace(problem, exact_scores=True), **values), stream)


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_heads_of_unlike_size(case, stream):
    """One KV head's values, and its query heads', reach 448, the other's are 1e-3, a step or two above zero."""
    problem = make_problem(case, softmax_scale=1 / (150**2 * case.head_dim**0.5))
    values = {name: as_float(getattr(problem, name).array) for name in "qkv"}
    for array in values.values():
        heads = array.shape[2] // 2
        array[:, :, :heads] *= 150
        array[:, :, heads:] *= 1e-3
    run_and_check(set_values(problem, **values), stream)


# ---- scores and weights --------------------------------------------------------------------------------------------


def along_two_dimensions(numbers, head_dim) -> np.ndarray:
    """[rows] -> [rows, 1, head_dim]: integers from -224 to 224 as sums of two E4M3 numbers, and zeros."""
    coarse, fine = np.divmod(numbers, 16)
    return np.pad(np.stack([16.0 * coarse, fine], axis=-1)[:, None], [(0, 0), (0, 0), (0, head_dim - 2)])


def score_problem(case, rows, numbers):
    """A problem with the scores rows[i] * numbers[j], exactly."""
    ones = np.pad([[[1.0, 1.0]]], [(0, 0), (0, 0), (0, case.head_dim - 2)])
    problem = replace(make_problem(case, softmax_scale=1.0), exact_scores=True)
    return set_values(problem, q=np.asarray(rows)[:, None, None] * ones, k=along_two_dimensions(numbers, case.head_dim))


@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_scores_of_a_thousand(case, stream):
    """Scores from -1260 to 1260 in steps of 6: each row picks one key, whose value is O.

    Ten times as large, and the exponents, which FP32 then holds in steps of 2^-10, would show in an FP16 O.
    """
    rng = np.random.default_rng(1)
    numbers = rng.permutation(np.arange(case.seqlen_k) - case.seqlen_k // 2)
    problem = score_problem(case, rng.choice([-6.0, 6.0], case.seqlen_q), numbers)
    run_and_check(problem, stream, lse_rtol=1e-6)


@pytest.mark.parametrize("slope", [0.125, -0.125])
@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_scores_that_rise_and_fall_along_the_keys(case, slope, stream):
    """One slope raises the row maximum in every key tile, so every tile rescales; the other in none after the first."""
    problem = score_problem(case, np.full(case.seqlen_q, slope), np.arange(case.seqlen_k) - case.seqlen_k // 2)
    run_and_check(problem, stream, lse_rtol=1e-6)


@pytest.mark.parametrize("case", FP8_FEW, ids=str)
def test_rows_whose_maximum_turns_positive_late(case, stream):
    """Those of every second warp, half way through the keys: until then its warpgroup takes maxima as floats."""
    rows = np.where(np.arange(case.seqlen_q) // 16 % 2, 0.125, -0.125)
    problem = score_problem(case, rows, np.arange(case.seqlen_k) - case.seqlen_k // 2)
    run_and_check(problem, stream, lse_rtol=1e-6)


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_small_weights_count(case, stream):
    """One key stands 8 above all others. Their weights, 3e-4, are less than E4M3 has, and together a tenth of O."""
    problem = replace(make_problem(case), exact_scores=True)
    rng = np.random.default_rng(5)
    q = rng.choice((-1.0, 1.0), problem.q.array.shape)
    k = rng.choice((-1.0, -0.5, 0.5, 1.0), problem.k.array.shape)
    v = as_float(problem.v.array) + 1
    q[..., 0], k[..., 0] = 4, 0
    k[:, 100, :, 0], v[:, 100] = 2 * case.head_dim**0.5, 0
    run_and_check(set_values(problem, q=q, k=k, v=v), stream)


# ---- sums of any length --------------------------------------------------------------------------------------------


def relative_rmse(problem, out) -> float:
    ref, _ = attention_reference(*problem.inputs, **problem.options)
    return float(np.sqrt(np.mean((as_float(out, np.float64) - ref) ** 2) / np.mean(ref**2)))


@pytest.mark.parametrize("seqlen_k", [8192, 32768])
@pytest.mark.parametrize("seqlen_q, heads", [(128, 1), (1, 16)], ids=["prefill", "decode"])
@pytest.mark.parametrize("head_dim", FP8_HEAD_DIMS)
def test_sums_of_values_of_one_sign(head_dim, seqlen_q, heads, seqlen_k, stream):
    """V is uniform in [0, 1). A sum of them that stays in WGMMA's accumulator, which keeps 14 bits, takes in less and
    less of what is added to it: the relative error of these lengths is then 0.137 and 0.363."""
    case = Case(FP8, head_dim, False, heads, 1, seqlen_q, seqlen_k, has_lse=False, out_dtype="fp16")
    problem = make_problem(case)
    problem = set_values(problem, v=np.random.default_rng(4).random(problem.v.array.shape, np.float32))
    out, _ = run(problem, stream, num_splits=1)
    rmse = relative_rmse(problem, out)
    assert rmse <= 0.02, f"relative RMSE {rmse:.4f}"


# ---- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_nan_in_q_stays_in_its_rows(case, stream):
    problem = make_problem(case, descale=per_batch_and_head)
    for batch, row, head, dim in ((0, 0, 0, 0), (0, 77, 3, 5), (1, case.seqlen_q - 1, 5, case.head_dim - 1)):
        problem.q.array[batch, row, head, dim] = to_bits(np.nan, FP8)
    problem.upload()
    out, lse = run(problem, stream)
    check(problem, out, lse)
    assert np.isnan(lse[0, 3, 77])


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_nan_in_k_reaches_the_rows_that_see_it(case, stream):
    problem = make_problem(case, descale=per_batch_and_head)
    problem.k.array[0, 200, 1, 3] = problem.k.array[1, case.seqlen_k - 1, 0, 0] = to_bits(np.nan, FP8)
    problem.upload()
    run_and_check(problem, stream)


@pytest.mark.parametrize("dim", [5, 63])
@pytest.mark.parametrize("case", [case for case in FP8_SOME if not case.is_causal], ids=str)
def test_nan_in_v_reaches_its_column_only(case, dim, stream):
    problem = make_problem(case, descale=per_batch_and_head)
    problem.v.array[0, 200, 1, dim] = to_bits(np.nan, FP8)
    problem.upload()
    run_and_check(problem, stream)
