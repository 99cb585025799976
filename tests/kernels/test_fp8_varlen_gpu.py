"""FP8 on the GPU over packed sequences and used lengths: layouts, isolation from NaN, graphs, repetition."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8_FEW, FP8_SOME, Layout, with_heads
from check import assert_same_bits, check, make_problem, packed_problem, run, run_and_check
from descales import per_batch_and_head
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import heads_before_rows, padded
from test_varlen_gpu import (
    ISOLATED,
    ISOLATED_USED,
    LAYOUTS,
    REPLAYED,
    USED,
    USED_LAYOUT,
    assert_isolated,
    captured,
    layouts,
    random_lengths,
    replay,
)

pytestmark = pytest.mark.gpu

WINDOWED = [replace(family, window=(50, 20), is_causal=False) for family in FP8_FEW]


# ---- against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index, name", list(enumerate(LAYOUTS)), ids=LAYOUTS.keys())
@pytest.mark.parametrize("number", range(5), ids=("d64", "d96", "d128", "d192", "d256"))
def test_layouts(number, index, name, stream):
    """With LSE in every second layout; causal in half of them."""
    family = replace(FP8_SOME[2 * number + (index // 2 + number) % 2], has_lse=index % 2 == 0)
    run_and_check(packed_problem(family, LAYOUTS[name], descale=per_batch_and_head), stream)


@pytest.mark.parametrize("window", [(0, 0), (50, 20), (100, -1)], ids=str)
@pytest.mark.parametrize("family", WINDOWED, ids=str)
def test_windows(family, window, stream):
    """Each sequence has its own diagonal, which its used keys move."""
    layout = Layout((300, 77, 129, 500), (420, 0, 1, 290), before=3, after=5)
    used = {"seqused_k": (400, 0, 1, 260)}
    case = replace(family, window=window, has_lse=window != (50, 20))
    run_and_check(packed_problem(case, layout, used=used, descale=per_batch_and_head), stream)


@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_many_tiles_per_cta(family, stream):
    """Hundreds of tiles of unlike length, some without a key; the same bits ten times."""
    layout = Layout(random_lengths(5, 80, 0, 400), random_lengths(6, 80, 0, 400))
    problem = packed_problem(with_heads(family, (16, 4)), layout, descale=per_batch_and_head)
    first = run(problem, stream)
    check(problem, *first)
    for _ in range(9):
        problem.poison_outputs(stream)
        assert_same_bits(run(problem, stream), first)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_strided(family, place, stream):
    """Gaps of the output untouched, inputs unchanged, with the gaps of K and V full of NaN."""
    problem = packed_problem(family, LAYOUTS["rows of none at both ends"], place, descale=per_batch_and_head)
    run_and_check(problem, stream)
    for tensor in (problem.q, problem.k, problem.v, *problem.descales.values()):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_random_layouts(family, stream):
    windows = st.just((-1, -1)) if family.is_causal else st.sampled_from(((-1, -1), (-1, -1), (40, 0), (100, 30)))

    @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(layouts(), windows, st.booleans())
    def test(layout_and_used, window, has_lse):
        layout, used = layout_and_used
        case = replace(family, window=window, has_lse=has_lse)
        run_and_check(packed_problem(case, layout, used=used, descale=per_batch_and_head), stream)

    test()


# ---- used lengths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["both", "more queries than keys", "none of k", "nothing"])
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_used_lengths_of_dense_sequences(family, used, stream):
    """Rows past seqused_q keep every bit in out and LSE; keys past seqused_k are NaN and invisible."""
    run_and_check(make_problem(family, lengths=USED[used], descale=per_batch_and_head), stream)


@pytest.mark.parametrize("used", USED.values(), ids=USED.keys())
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_used_lengths_of_packed_sequences(family, used, stream):
    run_and_check(packed_problem(family, USED_LAYOUT, used=used, descale=per_batch_and_head), stream)


# ---- isolation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["poison", np.nan], ids=str)
@pytest.mark.parametrize("family", FP8_SOME + WINDOWED, ids=str)
def test_packed_sequences_do_not_see_each_other(family, value, stream):
    """Every second sequence and every unused row, those before the first and after the last sequence too, hold NaN in
    Q, K and V: bytes of 0xFF, of 0x7F."""
    assert_isolated(packed_problem(family, ISOLATED, used=ISOLATED_USED, descale=per_batch_and_head), value, stream)


@pytest.mark.parametrize("value", ["poison", np.nan], ids=str)
@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_dense_sequences_do_not_see_each_other(family, value, stream):
    lengths = {"seqused_q": (300, 290, 1, 129), "seqused_k": (419, 65, 130, 420)}
    problem = make_problem(replace(family, batch=4), lengths=lengths, descale=per_batch_and_head)
    assert_isolated(problem, value, stream)


@pytest.mark.parametrize(
    "layout",
    [Layout((0, 0), (30, 40), after=50), Layout((5, 200), (0, 0)), Layout((5, 200), (0, 0), after=50)],
    ids=["no queries", "no key rows", "no keys"],
)
def test_only_empty_sequences(layout, stream):
    """Rows of no sequence stay untouched; queries without keys give 0 and -inf."""
    run_and_check(packed_problem(FP8_FEW[1], layout, descale=per_batch_and_head), stream)


# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FP8_FEW, ids=str)
def test_graph_replay_with_other_offsets(family, device):
    stream = device.create_stream()
    problem = packed_problem(family, REPLAYED[0], descale=per_batch_and_head)
    graph = captured(problem, stream)
    assert problem.out.is_untouched(stream)
    for layout in REPLAYED:
        replay(problem, graph, layout.cu_seqlens, stream)
