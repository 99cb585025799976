"""Ragged batches on the GPU: packed queries of all lengths, hints, splits, batch-invariant bits, padding."""

from dataclasses import replace

import pytest
from cases import FP8, Case, with_heads
from check import assert_same_bits
from ragged_problems import Ragged, RaggedProblem, run_and_check

from fa3_cute import explain

pytestmark = pytest.mark.gpu

CASE = Case("bf16", 128, True, 8, 2, 0, 0)
FULL, WINDOW = replace(CASE, is_causal=False), replace(CASE, is_causal=False, window=(60, 0))
FP8_CASE = Case(FP8, 128, True, 8, 2, 0, 0, out_dtype="bf16")
MASKS = {"causal": CASE, "full": FULL, "window": WINDOW, "fp8": FP8_CASE}
DECODES = Ragged(CASE, (1,) * 6, (1000, 1, 513, 0, 64, 2100), fields={"max_seqlen_q": 1})
MIXED = Ragged(CASE, (1, 300, 4, 129, 1, 0), (1000, 400, 20, 129, 2100, 50))
SPECULATIVE = Ragged(CASE, tuple(range(1, 17)), tuple(60 * n + 3 for n in range(16)), fields={"max_seqlen_q": 16})
BATCHES = {"decodes": DECODES, "mixed": MIXED, "speculative": SPECULATIVE}


def with_fields(ragged: Ragged, **fields) -> Ragged:
    return replace(ragged, fields=ragged.fields | fields)


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("ragged", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("page_size", [16, 0])
def test_masks(page_size, ragged, case, stream):
    """Decoding, speculative decoding, and chunks beside both; more queries than keys, and no keys, too."""
    run_and_check(replace(ragged, case=case, page_size=page_size), stream)


@pytest.mark.parametrize("heads", [(8, 1), (16, 1), (64, 1), (80, 1), (3, 3)], ids=str)
def test_speculative_decoding_of_many_heads(heads, stream):
    """From all sequences in one M tile each to none: of 80 heads over one no query fits."""
    run_and_check(replace(SPECULATIVE, case=with_heads(CASE, heads)), stream)


@pytest.mark.parametrize("hint", [0, 1, 2, 300, 5000])
@pytest.mark.parametrize("queries", [(4, 40, 3, 2), (1, 1, 1, 1), (300, 1, 70, 0)], ids=str)
def test_hints_of_the_longest_sequence(queries, hint, stream):
    """Right with any, also one that is too small."""
    run_and_check(Ragged(CASE, queries, (1000, 300, 77, 700), fields={"max_seqlen_q": hint}), stream)


@pytest.mark.parametrize("pack_gqa", [True, False])
def test_packing_that_is_asked_for(pack_gqa, stream):
    run_and_check(with_fields(MIXED, pack_gqa=pack_gqa), stream)
    run_and_check(with_fields(SPECULATIVE, pack_gqa=pack_gqa), stream)


@pytest.mark.parametrize("queries", [(0, 0, 0), (0, 5, 0), (1, 0, 200)], ids=str)
@pytest.mark.parametrize("keys", [(0, 0, 0), (0, 70, 300)], ids=str)
def test_empty_sequences(queries, keys, stream):
    """Rows of no sequence are untouched, rows without a key are 0 and -inf."""
    run_and_check(Ragged(CASE, queries, keys, capacity=320, total_q=sum(queries) + 9), stream)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 65, 300])
def test_batch_sizes(count, stream):
    """Fewer sequences than a warp looks at together, as many, and more; one far longer than the others."""
    keys = [(37 * n) % 90 for n in range(count)]
    keys[count // 2] = 5000
    case = with_heads(CASE, (4, 1))
    run_and_check(Ragged(case, (1,) * count, tuple(keys), page_size=64, fields={"max_seqlen_q": 1}), stream)
    queries = tuple(20 if n % 7 == 3 else 1 for n in range(count))
    run_and_check(Ragged(case, queries, tuple(keys), page_size=0), stream)


@pytest.mark.parametrize("page_size", [16, 0])
@pytest.mark.parametrize("queries", [(1, 1, 1), (5, 5, 2), (200, 100, 0)], ids=str)
def test_dense_queries(queries, page_size, stream):
    """In a batch dimension, of which seqused_q says how many are used."""
    rows = (2, 0, 3)
    run_and_check(Ragged(CASE, queries, (400, 300, 5), page_size, rows=rows, is_packed=False), stream)


# ---- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", [1, 70, 513])
@pytest.mark.parametrize("ragged", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("case", [CASE, FP8_CASE], ids=["bf16", "fp8"])
def test_zero_padding(case, ragged, rest, stream):
    """Rows behind the last sequence are 0 and -inf; without it they are untouched. 513 are the forward kernel's."""
    padded = replace(ragged, case=case, total_q=sum(ragged.queries) + rest)
    run_and_check(padded, stream)
    run_and_check(with_fields(padded, zero_padding=True), stream)


def test_nothing_but_padding(stream):
    run_and_check(Ragged(CASE, (0, 0), (5, 0), total_q=30, fields={"zero_padding": True}), stream)


# ---- splits --------------------------------------------------------------------------------------------------------

SPLITS = (
    {"num_splits": 1},
    {"num_splits": 6},
    {"num_splits": 32},
    {"max_num_splits": 1},
    {"max_num_splits": 3},
    {"fixed_split_size": 64},
    {"fixed_split_size": 1000},
)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("ragged", BATCHES.values(), ids=BATCHES.keys())
def test_splits(ragged, splits, stream):
    run_and_check(with_fields(ragged, **splits), stream)
    run_and_check(with_fields(replace(ragged, case=WINDOW), **splits), stream)


def test_splits_of_fp8(stream):
    for splits in SPLITS:
        run_and_check(with_fields(replace(SPECULATIVE, case=FP8_CASE), **splits), stream)


@pytest.mark.parametrize("where", [0, 35, 39])
def test_a_long_sequence_is_shared(where, stream):
    """By many clusters, beside sequences of a tile or two."""
    keys = [100] * 40
    keys[where] = 20_000
    run_and_check(Ragged(CASE, (1,) * 40, tuple(keys), page_size=64, fields={"max_seqlen_q": 1}), stream)


INVARIANT = ({"num_splits": 1}, {"num_splits": 6}, {"num_splits": 32}, {"fixed_split_size": 256})


@pytest.mark.parametrize("splits", INVARIANT, ids=str)
@pytest.mark.parametrize("case", [CASE, WINDOW, FP8_CASE], ids=["causal", "window", "fp8"])
def test_a_sequence_gives_the_same_bits_in_any_company(case, splits, stream):
    """Alone or among others, whatever their lengths."""
    queries, keys = (1, 4, 2, 1, 3, 1), (3000, 1000, 70, 0, 257, 256)
    ragged = Ragged(case, queries, keys, fields={"max_seqlen_q": 4, **splits})
    together = RaggedProblem(ragged)
    expected = together.run(stream)
    together.check(*expected)
    for b in range(len(queries)):
        alone = together.alone(b)
        assert_same_bits(alone.run(stream), together.sequence(b, *expected))


@pytest.mark.parametrize("splits", [{}, {"fixed_split_size": 256}], ids=str)
def test_runs_agree_bit_for_bit(splits, stream):
    """Whoever merges last: 20 runs of a batch whose long sequences are split."""
    ragged = Ragged(CASE, (1, 300, 4, 1) * 3, (9000, 400, 2000, 5) * 3, page_size=64, fields=splits)
    problem = RaggedProblem(ragged)
    first = problem.run(stream)
    problem.check(*first)
    for _ in range(19):
        assert_same_bits(problem.run(stream), first)


def test_calls_of_one_kernel_alternate(stream):
    """With and without kv_batch_idx, padding and offsets: no pointer of the last call stays."""
    calls = [
        replace(MIXED, page_size=0),
        replace(MIXED, page_size=0, rows=(4, 0, 7, 1, 1, 2)),
        Ragged(CASE, (4, 4, 2), (400, 300, 5), 0, rows=(2, 0, 3), is_packed=False),
        with_fields(replace(MIXED, page_size=0, total_q=500), zero_padding=True),
    ]
    problems = [RaggedProblem(ragged) for ragged in calls]
    for _ in range(2):
        results = [problem.run(stream) for problem in problems]
    for problem, result in zip(problems, results, strict=True):
        assert explain(problem.params()) == []
        problem.check(*result)
