"""Forward on the GPU: every kernel over the grid of lengths and head ratios, and inputs at the edge of arithmetic."""

import numpy as np
import pytest
from cases import FAMILIES, GRID, MANY_TILES
from check import check, make_problem, run, run_and_check

from fa3_cute.contract.reference import as_float, to_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, stream):
    """Output and LSE within tolerance, every element written, nothing written around them."""
    run_and_check(make_problem(case), stream)


@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_several_tiles_per_cta(case, stream):
    """Rings, barriers and shared memory carried from one tile to the next; with a causal mask, empty tiles between."""
    run_and_check(make_problem(case), stream)


@pytest.mark.parametrize("scale", [1e-3, 0.25, 1.0])
@pytest.mark.parametrize("case", FAMILIES[::3], ids=str)
def test_softmax_scale(case, scale, stream):
    run_and_check(make_problem(case, softmax_scale=scale), stream)


# ---- extreme scores ------------------------------------------------------------------------------------------------


def set_values(problem, **values):
    """Overwrite inputs (rounded to the problem's dtype; shapes broadcast) and upload again."""
    for name, value in values.items():
        getattr(problem, name).array[...] = to_bits(np.asarray(value, np.float32), problem.case.dtype)
    problem.upload()
    return problem


def along_first_dimension(values, head_dim):
    """[rows] -> [rows, 1, head_dim] with the values in dimension 0 and zeros elsewhere."""
    return np.pad(np.asarray(values, np.float32)[:, None, None], [(0, 0), (0, 0), (0, head_dim - 1)])


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_scores_of_ten_thousand(case, stream):
    """Scores from -10500 to 10500 in steps of 50, exact in every format: each row picks one key, whose value is O.

    The LSE is as large as the scores, so its tolerance is relative: FP32 has 24 bits.
    """
    rng = np.random.default_rng(1)
    rows = along_first_dimension(rng.choice([-100.0, 100.0], case.seqlen_q), case.head_dim)
    keys = along_first_dimension(0.5 * rng.permutation(np.arange(case.seqlen_k) - case.seqlen_k // 2), case.head_dim)
    problem = set_values(make_problem(case, softmax_scale=1.0), q=rows, k=keys)
    run_and_check(problem, stream, lse_rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_all_scores_equal(case, offset, stream):
    """The output is the mean of the values seen."""
    ones = along_first_dimension([1.0], case.head_dim)
    run_and_check(set_values(make_problem(case, softmax_scale=1.0), q=ones, k=offset * ones), stream)


@pytest.mark.parametrize("slope", [0.125, -0.125])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_scores_that_rise_and_fall_along_the_keys(case, slope, stream):
    """One slope raises the row maximum in every key tile, so every tile rescales; the other in none after the first."""
    keys = along_first_dimension(slope * np.arange(case.seqlen_k), case.head_dim)
    problem = set_values(make_problem(case, softmax_scale=1.0), q=along_first_dimension([1.0], case.head_dim), k=keys)
    run_and_check(problem, stream, lse_rtol=1e-6)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_rows_whose_maximum_turns_positive_late(case, stream):
    """Those of every second warp, half way through the keys: until then its warpgroup takes maxima as floats."""
    rows = along_first_dimension(np.where(np.arange(case.seqlen_q) // 16 % 2, 0.125, -0.125), case.head_dim)
    keys = along_first_dimension(np.arange(case.seqlen_k) - case.seqlen_k // 2, case.head_dim)
    run_and_check(set_values(make_problem(case, softmax_scale=1.0), q=rows, k=keys), stream, lse_rtol=1e-6)


# ---- NaN and infinity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_nan_and_inf_in_q_stay_in_their_rows(case, value, stream):
    """O and LSE of those rows are NaN, never 0 or -inf; the other rows of the same tile are as ever."""
    problem = make_problem(case)
    bits = to_bits(value, case.dtype)
    for batch, row, head, dim in ((0, 0, 0, 0), (0, 77, 3, 5), (1, case.seqlen_q - 1, 5, case.head_dim - 1)):
        problem.q.array[batch, row, head, dim] = bits
    problem.upload()
    out, lse = run(problem, stream)
    check(problem, out, lse)
    assert np.isnan(lse[0, 3, 77])


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_nan_in_k_reaches_the_rows_that_see_it(case, stream):
    problem = make_problem(case)
    problem.k.array[0, 200, 1, 3] = problem.k.array[1, case.seqlen_k - 1, 0, 0] = to_bits(np.nan, case.dtype)
    problem.upload()
    run_and_check(problem, stream)


@pytest.mark.parametrize("case", [case for case in FAMILIES if not case.is_causal], ids=str)
def test_nan_in_v_reaches_its_column_only(case, stream):
    problem = make_problem(case)
    problem.v.array[0, 200, 1, 3] = to_bits(np.nan, case.dtype)
    problem.upload()
    run_and_check(problem, stream)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_rows_whose_scores_are_all_minus_infinity_give_no_number(case, stream):
    """They read as empty (0 and -inf) or as undefined (NaN and NaN); either way they leave the other rows alone."""
    problem = make_problem(case)
    problem.k.array[..., 0] = to_bits(-1.0, case.dtype)
    problem.q.array[:, 5::50, :, 0] = to_bits(np.inf, case.dtype)
    problem.upload()
    out, lse = run(problem, stream)
    is_undefined = np.isnan(lse)
    assert np.isin(np.argwhere(is_undefined)[:, 2], np.arange(5, case.seqlen_q, 50)).all()
    rows = is_undefined.transpose(0, 2, 1)
    assert np.isnan(as_float(out[rows])).all()
    out[rows], lse[is_undefined] = 0, -np.inf
    check(problem, out, lse)
