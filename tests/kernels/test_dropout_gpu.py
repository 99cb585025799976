"""Dropout on the GPU: against the reference, which draws the same bits; what is kept, counted; and on average."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cases import DECODE, DTYPES, FAMILIES, FP8_DECODE_SOME, FP8_SOME, HEAD_DIMS, Case, Layout
from check import check, check_all, make_problem, packed_problem, run, run_and_check, run_each_and_check
from descales import per_batch_and_head

from fa3_cute.contract.dropout import effective_p, num_dropped
from fa3_cute.contract.philox import keep_mask
from fa3_cute.contract.reference import as_float, attention_reference, to_bits

pytestmark = pytest.mark.gpu

PROBABILITIES = (0.1, 0.5, 0.85)
WINDOWED = [
    Case(dtype, head_dim, False, 6, 2, 300, 420, batch=2, window=(100, 9))
    for dtype, head_dim in (("bf16", 64), ("fp16", 96), ("bf16", 128), ("fp16", 192), ("bf16", 256))
]


@pytest.mark.parametrize(
    ("case", "p_dropout"),
    [(case, PROBABILITIES[i % 3]) for i, case in enumerate([*FAMILIES, *WINDOWED])],
    ids=str,
)
def test_every_kernel(case, p_dropout, stream):
    """Every dtype, head_dim and mask; several tiles in both directions, each cut somewhere."""
    run_and_check(make_problem(replace(case, p_dropout=p_dropout)), stream)


@pytest.mark.parametrize("case", FP8_SOME, ids=str)
def test_fp8(case, stream):
    """The factor of what is kept joins v_descale."""
    run_and_check(make_problem(replace(case, p_dropout=0.3), descale=per_batch_and_head), stream)


@pytest.mark.parametrize("case", FAMILIES[2::5], ids=str)
def test_packed_sequences(case, stream):
    """Queries and keys are counted from each sequence's own first one; lengths that are used in part, or not at all."""
    layout = Layout((150, 0, 77, 300), (200, 5, 0, 290), before=3, after=5)
    used = {"seqused_k": (170, 5, 0, 263)}
    run_and_check(packed_problem(case, layout, used=used, p_dropout=0.2), stream)


@pytest.mark.parametrize("case", [*DECODE[::3], *FP8_DECODE_SOME], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_decode(case, seqlen_q, stream):
    """Any number of splits; rows of a thread that are other heads of a query, and other queries."""
    problem = make_problem(replace(case, seqlen_q=seqlen_q, p_dropout=0.4))
    run_each_and_check(problem, stream, [{"num_splits": splits} for splits in (0, 1, 3, 7)])


@pytest.mark.parametrize("case", FP8_DECODE_SOME, ids=str)
def test_rows_that_do_not_exist_decide_nothing(case, stream):
    """The rows of Q that a tile lacks are, in shared memory, what the kernel before this one has left there."""
    many, few = (make_problem(replace(case, seqlen_q=queries, p_dropout=0.4)) for queries in (20, 1))
    results = {}
    for i in range(8):
        run(many, stream)
        results[f"run {i}"] = run(few, stream)
    check_all(few, results)


@pytest.mark.parametrize("p_dropout", [1e-9, 0.002, 0.996, 0.9999])
def test_nearly_nothing_and_nearly_all(p_dropout, stream):
    """At least 1 and at most 255 of 256 are dropped."""
    assert num_dropped(p_dropout) in (1, 255)
    run_and_check(make_problem(Case("bf16", 128, True, 2, 1, 200, 300, p_dropout=p_dropout)), stream)


# ---- without a tolerance: what is kept, counted --------------------------------------------------------------------


def counts_of(problem, out: np.ndarray, p_dropout: float) -> np.ndarray:
    """How many probabilities, all alike, were kept for each element of out."""
    found = as_float(out, np.float64) * problem.case.seqlen_k * (1 - effective_p(p_dropout))
    assert np.abs(found - np.rint(found)).max() < 0.1
    return np.rint(found).astype(int)


@pytest.mark.parametrize("is_decode", [False, True], ids=["forward", "decode"])
@pytest.mark.parametrize(("dtype", "head_dim"), list(product(DTYPES, HEAD_DIMS)))
def test_what_is_kept_is_the_references(dtype, head_dim, is_decode, stream):
    """K is 0, so that probabilities are alike, and V tells keys apart but for head_dim: column c of O counts the kept
    ones among the keys c, c + head_dim, ..."""
    case = Case(dtype, head_dim, False, 4, 2, 13 if is_decode else 200, 4 * head_dim, batch=2, p_dropout=0.3)
    problem = make_problem(case)
    problem.k.array[...] = 0
    one_hot = np.eye(head_dim, dtype=np.float32)[np.arange(case.seqlen_k) % head_dim]
    problem.v.array[...] = to_bits(one_hot, dtype)[None, :, None, :]
    problem.upload()
    out, lse = run(problem, stream, num_splits=3 if is_decode else 0)
    counts = counts_of(problem, out, 0.3)
    seed, offset = map(int, problem.scores["rng_state"].array)
    for batch, head in product(range(2), range(4)):
        kept = keep_mask(0.3, seed, offset, batch, head, range(case.seqlen_q), range(case.seqlen_k))
        assert np.array_equal(counts[batch, :, head], kept.reshape(case.seqlen_q, 4, head_dim).sum(axis=1))
    assert np.allclose(lse, np.log(case.seqlen_k), atol=1e-4)  # of all keys, dropped or not


def test_states_are_read_at_every_call_and_average_to_no_dropout(stream):
    """O of 64 offsets: each right, no two alike, and as far from O without dropout as chance has it."""
    case = Case("bf16", 64, False, 2, 2, 64, 256, p_dropout=0.25)
    problem = make_problem(case)
    state, outs = problem.scores["rng_state"], []
    for offset in range(64):
        state.array[1] = offset
        problem.upload()
        out, lse = run(problem, stream)
        outs.append(as_float(out, np.float64))
        if offset % 21 == 0:
            check(problem, out, lse)
    outs = np.stack(outs)
    assert len({out.tobytes() for out in outs}) == 64
    exact, _ = attention_reference(*problem.inputs)
    z_scores = (outs.mean(axis=0) - exact) / (outs.std(axis=0, ddof=1) / 8)
    assert abs(z_scores.mean()) < 0.1 and 0.9 < z_scores.std() < 1.15


@pytest.mark.parametrize("case", [FAMILIES[5], DECODE[2]], ids=str)
def test_runs_agree_bit_for_bit(case, stream):
    problem = make_problem(replace(case, p_dropout=0.1))
    first = run(problem, stream)
    for _ in range(5):
        problem.poison_outputs(stream)
        for a, b in zip(first, run(problem, stream), strict=True):
            assert a.tobytes() == b.tobytes()
