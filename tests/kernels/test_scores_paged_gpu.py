"""Score options of ragged batches on the GPU: softcap, sinks, ALiBi and chunks over pages and over rows of a cache, in
decoding and beside prompts."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, Case
from check import assert_same_bits
from descales import per_batch_and_head
from ragged_problems import Ragged, RaggedProblem, run_and_check

pytestmark = pytest.mark.gpu

CASE = Case("bf16", 128, True, 8, 2, 0, 0)
SINKS = {"sinks": (2.0, -1.0, 0.5, 6.0)}
# {name: fields of the case}: a kernel of its own each, but for sinks.
OPTIONS = {
    "softcap": {"softcap": 15.0, **SINKS},
    "alibi": {"alibi": "sequences"},
    "chunk": {"attention_chunk": 100},
}
KEYS = (1000, 1, 513, 0, 64, 2100)
DECODES = Ragged(CASE, (1,) * 6, KEYS, fields={"max_seqlen_q": 1})
# Both kernels: sequences of up to 16 queries are the decode kernel's. More queries than keys, and no keys, too.
MIXED = Ragged(CASE, (1, 300, 4, 129, 1, 0), (1000, 400, 20, 129, 2100, 50))
WINDOW = replace(CASE, is_causal=False, window=(60, 0))
every_option = pytest.mark.parametrize("option", OPTIONS)


def with_option(ragged: Ragged, option: str, **changes) -> Ragged:
    return replace(ragged, case=replace(ragged.case, **OPTIONS[option], **changes))


@every_option
@pytest.mark.parametrize("ragged", [DECODES, MIXED], ids=["decodes", "mixed"])
def test_options(ragged, option, stream):
    run_and_check(with_option(ragged, option), stream)


@pytest.mark.parametrize("option", ["softcap", "chunk"])
def test_fp8(option, stream):
    """With descales, which a softcap does not undo."""
    run_and_check(with_option(MIXED, option, dtype=FP8, out_dtype="bf16"), stream, per_batch_and_head)


@pytest.mark.parametrize("case", [CASE, WINDOW], ids=["causal", "window"])
def test_sinks_join_once(case, stream):
    """However a sequence is split, and where it sees no key: O is 0 there, and the LSE is the sink."""
    case = replace(case, **SINKS)
    for fields in ({}, {"num_splits": 6}, {"fixed_split_size": 256}):
        ragged = replace(DECODES, case=case, fields=DECODES.fields | fields)
        problem = RaggedProblem(ragged)
        out, lse = problem.run(stream)
        problem.check(out, lse)
        assert not out[3].any() and np.array_equal(lse[:, 3], np.resize(np.float32(SINKS["sinks"]), 8))


@every_option
def test_rows_of_the_cache(option, stream):
    """Sequences of one row have slopes of their own."""
    run_and_check(replace(with_option(MIXED, option), page_size=0, rows=(4, 0, 7, 1, 1, 2)), stream)


@every_option
def test_pages_give_the_bits_of_the_cache(option, stream):
    base = replace(with_option(MIXED, option), capacity=2304)
    expected = RaggedProblem(replace(base, page_size=0))
    wanted = expected.run(stream)
    expected.check(*wanted)
    assert_same_bits(RaggedProblem(base).run(stream), wanted)


@pytest.mark.parametrize("queries", [(1, 1, 1, 1), (5, 1, 200, 70)], ids=["decodes", "mixed"])
def test_pages_left_of_a_chunk_hold_nan(queries, stream):
    """All of them one page that holds nothing but NaN, and so do rows of the first that is seen."""
    ragged = Ragged(replace(CASE, attention_chunk=100), queries, (1000, 77, 900, 333))
    run_and_check(ragged, stream, is_evicted=True)


@pytest.mark.parametrize("queries", [(1, 1, 1), (200, 100, 0)], ids=str)
def test_dense_queries(queries, stream):
    """In a batch dimension, with options that compute nothing for the rows that are not used."""
    ragged = Ragged(replace(CASE, **OPTIONS["alibi"], **SINKS), queries, (400, 300, 5), is_packed=False)
    run_and_check(ragged, stream)
