"""Packed sequences and used lengths on the GPU: fixed and random layouts, isolation, graphs, repetition."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FAMILIES, HEADS, Layout, in_turn, with_heads
from check import check, make_problem, packed_problem, params_of, poison_of, results, run, run_and_check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import heads_before_rows, padded

from fa3_cute import Status, forward, warmup
from fa3_cute.contract.reference import to_bits

pytestmark = pytest.mark.gpu


def random_lengths(seed: int, count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(low, high, count).tolist())


LAYOUTS = {
    "256,512,128": Layout((256, 512, 128), (256, 512, 128)),
    "one sequence": Layout((333,), (444,)),
    "one row each": Layout((1,) * 5, (1,) * 5),
    "no queries in some": Layout((0, 200, 0, 0, 130, 0), (77, 210, 1, 300, 130, 20)),
    "no keys in some": Layout((50, 200, 1, 300, 20), (0, 210, 0, 300, 0)),
    "nothing in some": Layout((0, 0, 150, 0, 129, 0), (0, 64, 150, 0, 0, 0)),
    "one holds everything": Layout((0, 0, 700, 0), (0, 0, 650, 0)),
    "more queries than keys": Layout((300, 129, 400, 64), (150, 1, 128, 63)),
    "fewer queries than keys": Layout((150, 1, 128, 63), (300, 129, 400, 64)),
    "rows of none at both ends": Layout((100, 257), (130, 200), before=37, after=150),
    "skewed": Layout((900, *random_lengths(1, 30, 1, 50)), (1100, *random_lengths(2, 30, 1, 50))),
    "skewed, long one last": Layout((*random_lengths(3, 30, 1, 50), 900), (*random_lengths(3, 30, 1, 50), 900)),
}
BATCH_SIZES = (1, 2, 31, 32, 33, 64, 65, 300)


def assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


# ---- against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, name", in_turn(FAMILIES, LAYOUTS), ids=str)
def test_layouts(family, name, stream):
    """Every sequence within tolerance, rows of none untouched; what lies around a sequence is another's, or NaN.

    With LSE in two layouts, then without in two, and the other way round for the next head_dim.
    """
    has_lse = (list(LAYOUTS).index(name) // 2 + FAMILIES.index(family) // 2) % 2 == 0
    run_and_check(packed_problem(family, LAYOUTS[name], has_lse=has_lse), stream)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("layout", ["no keys in some", "fewer queries than keys", "rows of none at both ends"])
@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_head_ratios(family, layout, heads, stream):
    run_and_check(packed_problem(with_heads(family, heads), LAYOUTS[layout]), stream)


@pytest.mark.parametrize("batch", BATCH_SIZES)
@pytest.mark.parametrize("family", FAMILIES[::5], ids=str)
def test_batch_sizes(family, batch, stream):
    layout = Layout(random_lengths(batch, batch, 0, 90), random_lengths(batch + 1, batch, 0, 90))
    run_and_check(packed_problem(with_heads(family, (2, 1)), layout), stream)


@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[15]], ids=str)
def test_ten_thousand_short_sequences(family, stream):
    lengths = random_lengths(0, 10_000, 1, 41)
    run_and_check(packed_problem(with_heads(family, (1, 1)), Layout(lengths, lengths)), stream)


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_many_tiles_per_cta(family, stream):
    """Hundreds of tiles of unlike length, some without a key: rings and barriers are carried from each to the next."""
    layout = Layout(random_lengths(5, 80, 0, 400), random_lengths(6, 80, 0, 400))
    run_and_check(packed_problem(with_heads(family, (16, 4)), layout), stream)


@pytest.mark.parametrize("family", FAMILIES[4:8], ids=str)
def test_one_long_sequence_among_many_short_ones(family, stream):
    lengths = (*random_lengths(7, 32, 1, 64), 4096, *random_lengths(8, 32, 1, 64))
    run_and_check(packed_problem(with_heads(family, (2, 1)), Layout(lengths, lengths)), stream)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_strided(family, place, stream):
    """Gaps of the output untouched, inputs unchanged, with the gaps of K and V full of NaN."""
    problem = packed_problem(family, LAYOUTS["rows of none at both ends"], place)
    run_and_check(problem, stream)
    for tensor in (problem.q, problem.k, problem.v):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


@st.composite
def layouts(draw) -> tuple[Layout, dict[str, list[int]]]:
    """A layout of up to 40 sequences, few of them long, and used lengths for it."""
    batch = draw(st.sampled_from((1, 2, 3, 5, 8, 33, 40)))
    length = st.integers(0, 60) if batch > 8 else st.one_of(st.integers(0, 2), st.integers(0, 130), st.integers(0, 600))
    lengths_q, lengths_k = (tuple(draw(st.lists(length, min_size=batch, max_size=batch))) for _ in "qk")
    used = {
        name: [draw(st.integers(0, n)) for n in lengths]
        for name, lengths in (("seqused_q", lengths_q), ("seqused_k", lengths_k))
        if draw(st.booleans())
    }
    # One query row at least: calls without any have a test of their own.
    layout = Layout((*lengths_q, 1), (*lengths_k, 1), draw(st.integers(0, 3)), draw(st.sampled_from((0, 1, 200))))
    return layout, {name: [*values, 1] for name, values in used.items()}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_random_layouts(family, stream):
    windows = st.just((-1, -1)) if family.is_causal else st.sampled_from(((-1, -1), (-1, -1), (40, 0), (100, 30)))

    @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(layouts(), st.sampled_from(list(HEADS.values())), windows, st.booleans())
    def test(layout_and_used, heads, window, has_lse):
        layout, used = layout_and_used
        case = replace(with_heads(family, heads), window=window, has_lse=has_lse)
        run_and_check(packed_problem(case, layout, used=used), stream)

    test()


# ---- used lengths --------------------------------------------------------------------------------------------------

# For sequences of up to 300 queries and 420 keys (two dense ones, or the packed ones of USED_LAYOUT).
USED_LAYOUT = Layout((300, 64), (420, 128), before=2, after=100)
USED = {
    "q": {"seqused_q": (150, 64)},
    "k": {"seqused_k": (217, 127)},
    "both": {"seqused_q": (299, 1), "seqused_k": (1, 128)},
    "more queries than keys": {"seqused_q": (300, 64), "seqused_k": (128, 3)},
    "none of q": {"seqused_q": (0, 60), "seqused_k": (400, 100)},
    "none of k": {"seqused_q": (100, 64), "seqused_k": (300, 0)},
    "nothing": {"seqused_q": (0, 0), "seqused_k": (0, 0)},
    "all": {"seqused_q": (300, 64), "seqused_k": (420, 128)},
}


@pytest.mark.parametrize("family, name", in_turn(FAMILIES, USED), ids=str)
def test_used_lengths_of_dense_sequences(family, name, stream):
    """Rows past seqused_q keep every bit in out and LSE; keys past seqused_k are NaN and invisible."""
    run_and_check(make_problem(family, lengths=USED[name]), stream)


@pytest.mark.parametrize("family, name", in_turn(FAMILIES, USED, turn=1), ids=str)
def test_used_lengths_of_packed_sequences(family, name, stream):
    """What the dense sequences of the same family leave out."""
    run_and_check(packed_problem(family, USED_LAYOUT, used=USED[name]), stream)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_used_lengths_of_strided_tensors(family, place, stream):
    run_and_check(make_problem(family, place, lengths=USED["both"]), stream)


# ---- isolation -----------------------------------------------------------------------------------------------------

ISOLATED = Layout((100, 70, 0, 129, 200, 33, 64), (190, 33, 40, 129, 100, 128, 300), before=9, after=20)
WINDOWED = [replace(family, window=(50, 20)) for family in FAMILIES if not family.is_causal]
ISOLATED_USED = {"seqused_k": (150, 33, 40, 128, 100, 1, 290), "seqused_q": (90, 70, 0, 129, 199, 33, 60)}


def soil(problem, value, spared) -> None:
    """Set all of Q, K and V but the used rows of the spared sequences to a value, and upload."""
    for tensor, side in ((problem.q, "q"), (problem.k, "k"), (problem.v, "k")):
        mask = np.full(tensor.array.shape[:-2], True)
        sequences = problem.sequences(side)
        for b in spared:
            mask[sequences[b]] = False
        tensor.array[mask] = poison_of(tensor.array.dtype) if value == "poison" else to_bits(value, problem.case.dtype)
    problem.upload()


def sequence_results(problem, b, out, lse):
    """Rows of out and LSE that a sequence uses."""
    *outer, rows = problem.sequences("q")[b]
    return out[*outer, rows], lse[*outer, :, rows]


def assert_isolated(problem, value, stream) -> None:
    """Whether a sequence's surroundings are clean or soiled, it gives the same bits."""
    count = problem.case.batch
    soil(problem, 0.0, range(count))
    clean = run(problem, stream)
    check(problem, *clean)
    inputs = [array.copy() for array in problem.inputs]
    for parity in (0, 1):
        for array, original in zip(problem.inputs, inputs, strict=True):
            array[...] = original
        spared = range(parity, count, 2)
        soil(problem, value, spared)
        soiled = run(problem, stream)
        for b in spared:
            assert_same_bits(sequence_results(problem, b, *soiled), sequence_results(problem, b, *clean))


@pytest.mark.parametrize("value", ["poison", np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("family", FAMILIES + WINDOWED, ids=str)
def test_packed_sequences_do_not_see_each_other(family, value, stream):
    """Every second sequence and every unused row hold NaN or Inf, in Q, K and V."""
    assert_isolated(packed_problem(family, ISOLATED, used=ISOLATED_USED), value, stream)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_dense_sequences_do_not_see_each_other(family, value, stream):
    case = replace(family, batch=4)
    lengths = {"seqused_q": (300, 290, 1, 129), "seqused_k": (419, 65, 130, 420)}
    assert_isolated(make_problem(case, lengths=lengths), value, stream)


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_a_sequence_gives_the_same_bits_in_any_company(family, stream):
    """Alone or among others, wherever it lies."""
    layout = LAYOUTS["fewer queries than keys"]
    together = packed_problem(family, layout)
    expected = run(together, stream)
    for b, (n_q, n_k) in enumerate(zip(layout.q, layout.k, strict=True)):
        alone = packed_problem(family, Layout((n_q,), (n_k,), before=b))
        for tensor, source, side in zip((alone.q, alone.k, alone.v), together.inputs, "qkk", strict=True):
            tensor.array[alone.sequences(side)[0]] = source[together.sequences(side)[b]]
        alone.upload()
        assert_same_bits(sequence_results(alone, 0, *run(alone, stream)), sequence_results(together, b, *expected))


# ---- nothing to do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_no_query_rows_at_all(family, stream):
    problem = packed_problem(family, Layout((0, 0, 0), (5, 0, 100)))
    assert forward(params_of(problem), stream) == Status.OK
    assert problem.out.is_untouched(stream) and problem.lse.is_untouched(stream)


@pytest.mark.parametrize(
    "layout",
    [Layout((0, 0), (30, 40), after=50), Layout((5, 200), (0, 0)), Layout((5, 200), (0, 0), after=50)],
    ids=["no queries", "no key rows", "no keys"],
)
@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_only_empty_sequences(family, layout, stream):
    """Rows of no sequence stay untouched; queries without keys give 0 and -inf."""
    run_and_check(packed_problem(family, layout), stream)


# ---- graphs and repetition -----------------------------------------------------------------------------------------


def captured(problem, stream):
    """`forward` of the problem as a graph."""
    warmup(params_of(problem), stream).check()
    builder = stream.create_graph_builder().begin_building()
    forward(params_of(problem), builder).check()
    return builder.end_building().complete()


def replay(problem, graph, lengths: dict, stream) -> None:
    """Give the problem other lengths, replay and check."""
    for name, values in lengths.items():
        problem.lengths[name].array[...] = values
    problem.upload()
    graph.launch(stream)
    check(problem, *results(problem, stream))


REPLAYED = (
    Layout((300, 100, 0, 200), (0, 250, 400, 50)),
    Layout((150, 150, 150, 150), (175, 175, 175, 175)),  # the same totals
    Layout((0, 600, 0, 0), (0, 700, 0, 0)),
    Layout((1, 2, 3, 4), (4, 3, 2, 1), before=30),  # fewer rows
    Layout((0, 0, 0, 0), (0, 0, 0, 0)),
    Layout((200, 200, 100, 100), (300, 0, 200, 200)),
)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_graph_replay_with_other_offsets(family, device):
    """Every decision of the host depends on the totals: a graph serves all layouts that they hold."""
    stream = device.create_stream()
    problem = packed_problem(family, REPLAYED[0])
    graph = captured(problem, stream)
    assert problem.out.is_untouched(stream)
    for layout in REPLAYED:
        replay(problem, graph, layout.cu_seqlens, stream)


@pytest.mark.parametrize("family", FAMILIES[::3], ids=str)
def test_graph_replay_with_other_used_lengths(family, device):
    """Dense and packed; longer and shorter than at the capture."""
    stream = device.create_stream()
    whole = {"seqused_q": (300, 64), "seqused_k": (420, 128)}
    for problem in (
        make_problem(family, lengths={**whole, "seqused_q": (300, 300), "seqused_k": (420, 420)}),
        packed_problem(family, USED_LAYOUT, used=whole),
    ):
        graph = captured(problem, stream)
        for used in USED.values():
            replay(problem, graph, {**whole, **used}, stream)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_runs_agree_bit_for_bit(family, stream):
    """20 runs, with more tiles than SMs."""
    layout = Layout(random_lengths(10, 40, 0, 500), random_lengths(11, 40, 0, 500))
    problem = packed_problem(with_heads(family, (8, 2)), layout)
    first = run(problem, stream)
    check(problem, *first)
    for _ in range(19):
        problem.out.poison(stream)
        problem.lse.poison(stream)
        assert_same_bits(run(problem, stream), first)


def test_lengths_and_offsets_alternate_on_one_config(stream):
    """Calls of one kernel with offsets, with used lengths and with both, in turn: no pointer of the last call stays."""
    family = FAMILIES[4]
    problems = [
        make_problem(family, lengths=USED["k"]),
        packed_problem(family, USED_LAYOUT),
        packed_problem(family, USED_LAYOUT, used=USED["q"]),
        make_problem(family, lengths=USED["q"]),
        packed_problem(family, USED_LAYOUT, used=USED["both"]),
        make_problem(family),
    ]
    for _ in range(2):
        for problem in problems:
            problem.upload()
            forward(params_of(problem), stream).check()
    for problem in problems:
        check(problem, *results(problem, stream))
