"""Backward on the GPU: its cases against the reference, what is not wanted, NaN, bits that repeat, graphs.

Kernels are those of backward_rows.KERNELS, most of which other tests compile as well.
"""

from dataclasses import replace

import numpy as np
import pytest
from backward_cases import LAYOUTS, NAMES, BackwardCase, backward_cases, inputs_of
from backward_problems import BackwardProblem
from backward_rows import KERNELS, as_if_long, config_of, mask_of, rows_of
from cases import Case
from images import POISON, contiguous, heads_before_rows, padded

from fa3_cute import backward, backward_workspace_size, warmup
from fa3_cute.contract.formats import HEAD_DIMS
from fa3_cute.contract.reference import as_float
from fa3_cute.planning.backward import BackwardConfig
from fa3_cute.planning.backward_launch import Stage
from fa3_cute.planning.one_side import OneSidePass

pytestmark = pytest.mark.gpu

ALIGNMENT = 16
REPEATS = 20
counts_of = Stage.counts
WANTED = (("dq",), ("dk",), ("dv",), ("dk", "dv"), ("dq", "dv"))
HARD = {"peaky rows": {"scale_of_q": 8.0}, "D cancels": {"mean_of_v": 10.0}}


def of_dtype(case: BackwardCase, dtype: str) -> BackwardCase:
    return replace(case, forward=replace(case.forward, dtype=dtype))


def in_turn(cases: list[BackwardCase], number: int) -> list[BackwardCase]:
    """Every other of each mask, dense and with lengths; the next mask and the next head_dim have the others."""
    groups: dict[tuple[str, bool], list[BackwardCase]] = {}
    for case in cases:
        groups.setdefault((mask_of(case), bool(case.lengths)), []).append(case)
    turns = {"full": 0, "causal": 1, "local": 0}
    return [case for (mask, _), own in groups.items() for case in own[(turns[mask] + number) % 2 :: 2]]


def served(cases) -> list[BackwardCase]:
    return [case for case in cases if config_of(case) in KERNELS]


EVERY = [case for head_dim in HEAD_DIMS for case in backward_cases(head_dim)]
BF16 = served(of_dtype(case, "bf16") for case in EVERY)
# At head_dim 96 every other one of those: its kernel is that of 64 and 128 but for dQ.
CHOSEN = [
    case
    for number, head_dim in enumerate(HEAD_DIMS)
    for case in in_turn([case for case in BF16 if case.forward.head_dim == head_dim], number)[:: 1 + (head_dim == 96)]
]
FP16 = served(case for case in EVERY if case.forward.dtype == "fp16")[::3]
# Many tiles add to each of dQ.
LONG = served(
    BackwardCase(Case("bf16", head_dim, is_causal, 2, 1, 2048, 2048, 1))
    for head_dim in HEAD_DIMS
    for is_causal in (False, True)
)
SHARED = served(
    BackwardCase(Case("bf16", head_dim, False, 12, 12, 1100, 1500)) for head_dim in HEAD_DIMS if head_dim <= 192
)
# A pass without sums has no order to keep.
DETERMINISTIC = [case for case in BF16 if config_of(case).has_sums and config_of(case, True) in KERNELS]


def one_per_config(cases, is_deterministic: bool = False) -> list[BackwardCase]:
    """Of each config the case of the most elements: several tiles in both directions, more than one sequence."""
    chosen: dict[BackwardConfig | OneSidePass, BackwardCase] = {}
    for case in sorted(cases, key=lambda case: -case.forward.seqlen_q * case.forward.seqlen_k):
        if case.forward.batch > 1:
            chosen.setdefault(config_of(case, is_deterministic), case)
    return list(chosen.values())


FAMILIES = one_per_config(BF16)
ONE_SIDE = [case for case in FAMILIES if not config_of(case).has_sums]
WITH_SUMS = [case for case in FAMILIES if config_of(case).has_sums]
ORDERED = one_per_config(DETERMINISTIC, True)
# Packed ones, of each head_dim one.
IN_PLACE = list({case.forward.head_dim: case for case in BF16 if case.layout == "of lanes"}.values())
# Of each head_dim one dense and one with lengths.
LAUNCHES = list({(case.forward.head_dim, bool(case.lengths)): case for case in FAMILIES}.values())


def pairs(cases, values) -> list[tuple]:
    """(case, value): the next value for the next case of a head_dim, whose first cases begin with different ones."""
    counts: dict[int, int] = {}
    found = []
    for case in cases:
        turn = counts.setdefault(case.forward.head_dim, len(counts))
        counts[case.forward.head_dim] += 1
        found.append((case, values[turn % len(values)]))
    return found


def named(value) -> str:
    """The id of a case, of a place, or of words."""
    return getattr(value, "__name__", "") or ("-".join(value) if isinstance(value, tuple) else str(value))


def workspace_of(problem: BackwardProblem, **overrides):
    """(fields, memory): a workspace full of NaN behind 16 bytes that are not its own; None where none is needed."""
    nbytes = backward_workspace_size(problem.params(**overrides))
    if not nbytes:
        return {}, None
    given, memory = problem.workspace(ALIGNMENT + nbytes)
    return {"workspace": given["workspace"] + ALIGNMENT, "workspace_bytes": nbytes}, memory


def run(problem: BackwardProblem, stream, **overrides):
    """The gradients; asserts that nothing around them and around the workspace is written."""
    given, memory = workspace_of(problem, **overrides)
    found = problem.run(stream, **given, **overrides)
    if memory is not None:
        assert (memory.read(stream)[:ALIGNMENT] == POISON).all(), "bytes before the workspace are written"
    return found


def run_and_check(case: BackwardCase, stream, place=contiguous, inputs=None, **overrides) -> None:
    problem = BackwardProblem(case, place, inputs)
    problem.check(*run(problem, stream, **overrides))


def assert_same_bits(found, expected) -> None:
    for name, got, wanted in zip(NAMES, found, expected, strict=True):
        if got is not None:
            differ = np.argwhere(got.view(np.uint16) != wanted.view(np.uint16))
            assert not len(differ), f"{name}: {len(differ)} elements differ, first {differ[:4].tolist()}"


@pytest.fixture(autouse=True)
def planned(request):
    """Of a test of a case, as config_of says."""
    given = getattr(request.node, "callspec", None)
    if given is None or "case" not in given.params:
        yield
        return
    with rows_of(given.params["case"]):
        yield


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CHOSEN, *FP16, *LONG], ids=str)
def test_cases(case, stream):
    run_and_check(case, stream)


@pytest.mark.parametrize("case", DETERMINISTIC[::4], ids=str)
def test_deterministic_cases(case, stream):
    run_and_check(case, stream, deterministic=True)


@pytest.mark.parametrize("case, place", pairs(FAMILIES, (padded, heads_before_rows)), ids=named)
def test_layouts(case, place, stream):
    """Gaps between rows and heads stay as they are; what lies there is NaN."""
    run_and_check(case, stream, place)


@pytest.mark.parametrize("case, hard", pairs(FAMILIES, tuple(HARD)), ids=named)
def test_hard_values(case, hard, stream):
    run_and_check(case, stream, inputs=inputs_of(case, **HARD[hard]))


@pytest.mark.parametrize("case, wanted", pairs(FAMILIES, WANTED), ids=named)
def test_only_what_is_wanted_is_written(case, wanted, stream):
    problem = BackwardProblem(case)
    found = run(problem, stream, **{name: None for name in NAMES if name not in wanted})
    assert [name for name, gradient in zip(NAMES, found, strict=True) if gradient is not None] == list(wanted)
    problem.check(*found)


@pytest.mark.parametrize("absent", ["q", "k"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_no_row_of_one_side(head_dim, absent, stream):
    """Packed tensors without a row, which have no address: the gradients of the other side are 0."""
    of_gaps = [case for case in BF16 if case.forward.head_dim == head_dim and case.layout == "gaps" and not case.used]
    case = max(of_gaps, key=lambda case: case.forward.is_causal)
    problem = BackwardProblem(case)
    none = ("q", "out", "dout", "softmax_lse", "dlse", "dq") if absent == "q" else ("k", "v", "dk", "dv")
    problem.lengths[f"cu_seqlens_{absent}"].array[...] = 0
    problem.lengths[f"cu_seqlens_{absent}"].image.upload()
    found = run(problem, stream, **{f"total_{absent}": 0}, **dict.fromkeys(none))
    is_used = case.is_used("k" if absent == "q" else "q")
    for gradient in (gradient for gradient in found if gradient is not None):
        assert not as_float(gradient[is_used]).any() and (gradient[~is_used].view(np.uint8) == POISON).all()


# ---- NaN and bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ORDERED + ONE_SIDE, ids=str)
def test_nan_stays_in_its_sequence_and_heads(case, stream):
    """All of the first KV head of one sequence, and its query heads, is NaN: the rest has the same bits."""
    problem = BackwardProblem(case)
    clean = run(problem, stream, deterministic=True)
    group = case.forward.num_heads // case.forward.num_heads_k
    rows_q, rows_k = np.zeros_like(case.is_used("q")), np.zeros_like(case.is_used("k"))
    for side, rows in (("q", rows_q), ("k", rows_k)):
        bounds = case.lengths.get(f"cu_seqlens_{side}")
        rows[1 if bounds is None else slice(bounds[-2], bounds[-1])] = True
    inputs = problem.inputs
    spoilt = {}
    for name, rows, heads in (
        *((name, rows_q, slice(group)) for name in ("q", "out", "dout")),
        *((name, rows_k, slice(1)) for name in ("k", "v")),
    ):
        array = getattr(inputs, name).copy()
        array[..., heads, :][rows] = np.frombuffer(bytes([POISON]) * array.itemsize, array.dtype)[0]
        spoilt[name] = array
    problem.fill(inputs._replace(**spoilt))
    found = run(problem, stream, deterministic=True)
    for name, got, wanted in zip(NAMES, found, clean, strict=True):
        rows, heads = (rows_q, slice(group)) if name == "dq" else (rows_k, slice(1))
        is_spoilt = np.zeros(got.shape[:-1], bool)
        is_spoilt[..., heads][rows] = True
        assert np.array_equal(got[~is_spoilt].view(np.uint16), wanted[~is_spoilt].view(np.uint16)), name


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_deterministic_bits(case, stream):
    problem = BackwardProblem(case)
    first = run(problem, stream, deterministic=True)
    problem.check(*first)
    for _ in range(REPEATS - 1):
        assert_same_bits(run(problem, stream, deterministic=True), first)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_with_more_ctas_than_run_at_a_time(head_dim, stream, monkeypatch):
    """As where others hold SMs: a CTA that runs must not wait for one that has not started."""
    problem = BackwardProblem(BackwardCase(Case("bf16", head_dim, True, 16, 16, 520, 520, 8)))
    with as_if_long():
        expected = run(problem, stream, deterministic=True)
    monkeypatch.setattr(Stage, "counts", lambda stage, num_sms: counts_of(stage, 4 * num_sms))
    with as_if_long():
        assert_same_bits(run(problem, stream, deterministic=True), expected)


@pytest.mark.parametrize("case", WITH_SUMS, ids=str)
def test_dk_and_dv_have_the_same_bits_in_every_call(case, stream):
    problem = BackwardProblem(case)
    given, _ = workspace_of(problem)
    first = problem.run(stream, **given)
    for _ in range(REPEATS - 1):
        dq, dk, dv = problem.run(stream, **given)
        assert_same_bits((None, dk, dv), first)
    problem.check(dq, dk, dv)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_tiles(case, stream):
    """144 of them: CTAs share the last 12, whose parts begin and end within tiles."""
    problem = BackwardProblem(case)
    given, _ = workspace_of(problem)
    first = problem.run(stream, **given)
    problem.check(*first)
    for _ in range(REPEATS - 1):
        _, dk, dv = problem.run(stream, **given)
        assert_same_bits((None, dk, dv), first)


@pytest.mark.parametrize("case", ONE_SIDE, ids=str)
def test_one_gradient_at_a_time_has_the_same_bits_in_every_call(case, stream):
    """Of dq too, and whether they are asked for or not."""
    problem = BackwardProblem(case)
    given, _ = workspace_of(problem)
    first = problem.run(stream, **given)
    for number in range(REPEATS - 1):
        assert_same_bits(problem.run(stream, **given, deterministic=number % 2 == 0), first)
    problem.check(*first)


def test_calls_of_several_shapes_in_turn(stream):
    """One behind the other, over one workspace, without a wait: each has the arguments of its own."""
    with as_if_long():
        run_in_turn(stream)


def run_in_turn(stream) -> None:
    problems = [BackwardProblem(case) for case in FAMILIES]
    nbytes = max(backward_workspace_size(problem.params()) for problem in problems)
    given, _ = problems[0].workspace(nbytes)
    for problem in problems:
        problem.poison(stream)
    for problem in problems * 3:
        backward(problem.params(**given), stream).check()
    for problem in problems:
        problem.check(*problem.results(stream))


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_lengths_change_in_place(case, stream):
    """Between calls, on their stream: no kernel that starts early has those of the call before."""
    problem = BackwardProblem(case)
    layout = LAYOUTS[case.layout]
    both = [layout, replace(layout, q=layout.q[::-1], k=layout.k[::-1])]
    copies = [{name: contiguous(name, (len(of),), "int32") for name, of in each.cu_seqlens.items()} for each in both]
    for each, own in zip(both, copies, strict=True):
        for name, tensor in own.items():
            tensor.array[...] = each.cu_seqlens[name]
            tensor.image.upload()
    given, _ = workspace_of(problem)

    def results(*turns: int):
        for turn in turns:
            for name, tensor in copies[turn].items():
                problem.lengths[name].image.buffer.copy_from(tensor.image.buffer, stream=stream)
            backward(problem.params(**given), stream).check()
        return problem.results(stream)

    expected = [results(turn) for turn in range(2)]
    assert all((got != wanted).any() for got, wanted in zip(*expected, strict=True)), "the lengths make no difference"
    for number in range(REPEATS):
        turns = (0, 1) if number % 2 else (1, 0)
        dq, *of_keys = results(*turns)
        found, wanted = as_float(dq), as_float(expected[turns[1]][0])
        assert np.array_equal(np.isnan(found), np.isnan(wanted))
        assert np.nanmax(abs(found - wanted)) <= 2e-2 * np.nanmax(abs(wanted))
        assert_same_bits((None, *of_keys), expected[turns[1]])


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_a_captured_call_is_replayed(case, device):
    """With other values each time; the last time on another stream."""
    stream, other = device.create_stream(), device.create_stream()
    problem = BackwardProblem(case)
    given, _ = workspace_of(problem)
    params = problem.params(**given)
    warmup(params, stream).check()
    builder = stream.create_graph_builder().begin_building()
    backward(params, builder).check()
    graph = builder.end_building().complete()
    assert all(problem.tensors[name].is_untouched(stream) for name in NAMES), "the capture launched something"
    for scale_of_q, own in ((1.0, stream), (2.0, stream), (0.5, other)):
        problem.fill(inputs_of(case, scale_of_q))
        graph.launch(own)
        problem.check(*problem.results(own))
