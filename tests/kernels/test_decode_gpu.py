"""The decode kernel on the GPU: every number of splits over contexts, masks, head ratios, used lengths and layouts."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cases import DECODE, MORE_SPLITS, SPLITS, Case, in_turn, with_heads
from check import assert_same_bits, check, check_all, make_problem, params_of, run, run_each_and_check
from images import heads_before_rows, padded

from fa3_cute import AttentionMode, forward
from fa3_cute.contract.reference import as_float, to_bits

pytestmark = pytest.mark.gpu

# Fields of a case. A window of (100, 0) is a causal mask with a bound.
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "diagonal": {"window": (0, 0)},
    "narrow": {"window": (5, 3)},
    "bounded": {"window": (100, 0)},
    "left": {"window": (64, -1)},
    "right": {"window": (-1, 2)},
}
SOME = DECODE[::2]  # every head_dim, both dtypes


def check_splits(problem, stream, splits=SPLITS, lse_rtol=0.0, **overrides) -> None:
    """Each number of splits gives a right result; together they agree within the tolerance."""
    run_each_and_check(problem, stream, [{"num_splits": n, **overrides} for n in splits], lse_rtol)


def set_bits(problem, name, index, value):
    """Write a value into an input on the host; upload afterwards."""
    getattr(problem, name).array[index] = to_bits(value, problem.case.dtype)


# ---- lengths -------------------------------------------------------------------------------------------------------

CONTEXTS = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000, 4097)
LONG = [
    Case("fp16", 64, False, 4, 1, 1, 131_072),
    Case("bf16", 128, False, 8, 1, 1, 131_072),
    Case("bf16", 128, False, 4, 1, 2, 131_071, window=(5000, 0)),
    Case("bf16", 128, True, 4, 1, 5, 65_537),
    Case("bf16", 256, False, 2, 1, 1, 65_536),
    Case("fp16", 96, False, 6, 2, 1, 40_001),
    Case("bf16", 192, True, 3, 1, 3, 33_333),
]


@pytest.mark.parametrize("seqlen_k", CONTEXTS)
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_contexts(family, seqlen_k, stream):
    """With LSE in every second one."""
    has_lse = (CONTEXTS.index(seqlen_k) + DECODE.index(family)) % 2 == 0
    check_splits(make_problem(replace(family, seqlen_k=seqlen_k, has_lse=has_lse)), stream)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_contexts(case, stream):
    check_splits(make_problem(case), stream, (*SPLITS, 24, 256))


@pytest.mark.parametrize("family", DECODE, ids=str)
def test_every_kind_of_cluster(family, stream):
    """2 to 16 CTAs in a cluster, up to 251 clusters; splits with several K/V tiles, with one and with none."""
    check_splits(make_problem(replace(family, seqlen_q=2, seqlen_k=1500)), stream, MORE_SPLITS)


@pytest.mark.parametrize("window", [(-1, -1), (100, 0)], ids=str)
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_every_remainder_of_the_last_tile(family, window, stream):
    """Used lengths from 0 past the first K/V tile, and all remainders behind some tiles, each of a batch entry."""
    lengths = (*range(130), *range(255, 386))
    case = replace(with_heads(family, (16, 1)), batch=len(lengths), window=window)
    check_splits(make_problem(case, lengths={"seqused_k": lengths}), stream)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("family, seqlen_q", in_turn(DECODE, range(1, 9)), ids=str)
def test_several_queries(family, seqlen_q, name, stream):
    """Also more queries than keys: the first ones see none, in every split."""
    seqlen_k = (3, 70, 300, 1029)[(seqlen_q + list(MASKS).index(name)) % 4]
    case = replace(with_heads(family, (8, 2)), seqlen_q=seqlen_q, seqlen_k=seqlen_k, **MASKS[name])
    check_splits(make_problem(case), stream)


@pytest.mark.parametrize("batch", [1, 2, 3, 31, 64, 132, 133, 256])
@pytest.mark.parametrize("family", [DECODE[2], DECODE[9]], ids=str)
def test_batch_sizes(family, batch, stream):
    """Of unlike used lengths."""
    lengths = np.random.default_rng(batch).integers(0, 201, batch).tolist()
    case = replace(with_heads(family, (8, 2)), batch=batch, seqlen_k=200)
    check_splits(make_problem(case, lengths={"seqused_k": lengths}), stream)


# ---- heads ---------------------------------------------------------------------------------------------------------

# (query heads, KV heads): groups of 1, 2, 3, 4, 8, 16; of 64, a whole M tile; of 96 and 128, two of them.
RATIOS = ((1, 1), (3, 3), (4, 2), (6, 2), (4, 1), (40, 5), (32, 2), (64, 1), (96, 1), (128, 1))
HEAD_CHOICES = [{"num_splits": n, "pack_gqa": pack} for n, pack in product((0, 1, 3, 128), (None, True, False))]


@pytest.mark.parametrize("seqlen_q, mask", [(1, "full"), (3, "causal"), (7, "narrow")])
@pytest.mark.parametrize("heads", RATIOS, ids=str)
@pytest.mark.parametrize("family", SOME, ids=str)
def test_head_ratios(family, heads, seqlen_q, mask, stream):
    """Packed automatically, packed into however many M tiles it takes, and every query head by itself."""
    case = replace(with_heads(family, heads), seqlen_q=seqlen_q, seqlen_k=333, batch=1, **MASKS[mask])
    mode = AttentionMode.DECODE if seqlen_q == 1 else AttentionMode.PREFILL
    run_each_and_check(make_problem(case), stream, [{**choice, "mode": mode} for choice in HEAD_CHOICES])


@pytest.mark.parametrize(
    "lengths", [None, {"seqused_q": (57, 0, 1), "seqused_k": (333, 200, 65)}], ids=["whole", "used"]
)
@pytest.mark.parametrize("mask", ["full", "causal", "bounded"])
@pytest.mark.parametrize("seqlen_q", [100, 200])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_several_m_tiles(family, seqlen_q, mask, lengths, stream):
    """Three heads of a query may lie in two M tiles; past seqused_q there are M tiles without a row."""
    case = replace(family, batch=3, seqlen_q=seqlen_q, seqlen_k=333, **MASKS[mask])
    run_each_and_check(
        make_problem(case, lengths=lengths),
        stream,
        [{"num_splits": n, "pack_gqa": pack} for n, pack in product((0, 1, 3, 24), (None, True, False))],
    )


@pytest.mark.parametrize("splits", [0, 1, 3, 24])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_one_query_has_one_meaning(family, splits, stream):
    """The same bits in both modes, and with a causal mask, which hides no key from the last query."""
    problem = make_problem(family)
    first = run(problem, stream, num_splits=splits, mode=AttentionMode.DECODE)
    check(problem, *first)
    for overrides in (
        {"mode": AttentionMode.PREFILL},
        {"is_causal": True},
        {"window_size_right": 0},
        {"mode": AttentionMode.DECODE, "is_causal": True},
    ):
        problem.poison_outputs(stream)
        assert_same_bits(run(problem, stream, num_splits=splits, **overrides), first)


# ---- used lengths --------------------------------------------------------------------------------------------------

USED_K = (0, 1, 63, 64, 65, 128, 129, 385)
USED_Q = (1, 0, 1, 1, 0, 1, 1, 0)
USED = {
    "k": {"seqused_k": USED_K},
    "q": {"seqused_q": USED_Q},
    "both": {"seqused_q": USED_Q, "seqused_k": USED_K},
    "no keys": {"seqused_k": (0,) * 8},
    "no queries": {"seqused_q": (0,) * 8},
    "nothing": {"seqused_q": (0,) * 8, "seqused_k": (0,) * 8},
}


@pytest.mark.parametrize("used", USED.values(), ids=USED.keys())
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_used_lengths(family, used, stream):
    """Rows at or past seqused_q keep every bit; keys past seqused_k are NaN and invisible."""
    check_splits(make_problem(replace(family, batch=8), lengths=used), stream)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_used_lengths_of_several_queries(family, mask, stream):
    """The used lengths move the diagonal: also above the first key, where rows without any key are 0 and -inf."""
    used = {"seqused_q": (5, 3, 2, 1, 0, 5, 5, 4), "seqused_k": (385, 300, 64, 1, 65, 0, 2, 129)}
    case = replace(with_heads(family, (8, 2)), batch=8, seqlen_q=5, **mask)
    check_splits(make_problem(case, lengths=used), stream)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("family", SOME, ids=str)
def test_rows_without_a_key_are_zero(family, splits, stream):
    problem = make_problem(replace(family, batch=3, seqlen_q=4, is_causal=True), lengths={"seqused_k": (0, 2, 385)})
    out, lse = run(problem, stream, num_splits=splits)
    for batch, num_empty in ((0, 4), (1, 2), (2, 0)):
        assert not out[batch, :num_empty].view(np.uint16).any()
        assert (lse[batch, :, :num_empty] == -np.inf).all() and np.isfinite(lse[batch, :, num_empty:]).all()


# ---- the same bits every time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [{}, {"seqlen_q": 4, "is_causal": True}], ids=["one query", "causal"])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_twenty_runs_agree_bit_for_bit(family, mask, stream):
    problem = make_problem(replace(with_heads(family, (16, 2)), seqlen_k=3000, **mask))
    first = {}
    for splits in (0, 1, 3, 24, 128):
        problem.poison_outputs(stream)
        first[splits] = run(problem, stream, num_splits=splits)
        for _ in range(19):
            problem.poison_outputs(stream)
            assert_same_bits(run(problem, stream, num_splits=splits), first[splits])
    check_all(problem, {f"num_splits={splits}": pair for splits, pair in first.items()})


def alone(problem, index) -> dict:
    """Overrides that make a call of one batch entry of a contiguous problem."""
    tensors = [
        ("q", problem.q),
        ("k", problem.k),
        ("v", problem.v),
        ("out", problem.out),
        ("softmax_lse", problem.lse),
        *problem.lengths.items(),
    ]
    return {"batch_size": 1, **{name: tensor.address + index * tensor.array.strides[0] for name, tensor in tensors}}


@pytest.mark.parametrize(
    "mask",
    [{}, {"seqlen_q": 4, "is_causal": True}, {"seqlen_q": 4, "window": (100, 3)}],
    ids=["one query", "causal", "window"],
)
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_without_splits_an_entry_gives_the_same_bits_in_any_company(family, mask, stream):
    """Alone, among others, and among the same with other used lengths."""
    lengths = (700, 64, 1, 0, 129, 333)
    case = replace(family, batch=len(lengths), seqlen_k=700, **mask)
    problem = make_problem(case, lengths={"seqused_k": (700,) * len(lengths)})
    used = problem.lengths["seqused_k"].array
    used[...] = lengths
    problem.upload()
    out, lse = run(problem, stream, num_splits=1)
    check(problem, out, lse)
    for b in range(len(lengths)):
        used[...] = np.random.default_rng(b).integers(0, 701, len(lengths))
        used[b] = lengths[b]
        problem.upload()
        other_out, other_lse = run(problem, stream, num_splits=1)
        assert_same_bits((other_out[b], other_lse[b]), (out[b], lse[b]))
        problem.poison_outputs(stream)
        own_out, own_lse = run(problem, stream, num_splits=1, **alone(problem, b))
        assert_same_bits((own_out[b], own_lse[b]), (out[b], lse[b]))
        others = np.arange(len(lengths)) != b
        assert (own_out[others].view(np.uint16) == 0xFFFF).all(), "rows of another batch entry written"


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [None, {"seqused_q": (3, 1), "seqused_k": (200, 385)}], ids=["whole", "used"])
@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_strided(family, seqlen_q, place, used, stream):
    """Gaps of the output untouched, inputs unchanged, with the gaps of K and V full of NaN."""
    lengths = used and {**used, "seqused_q": tuple(min(n, seqlen_q) for n in used["seqused_q"])}
    problem = make_problem(replace(family, seqlen_q=seqlen_q, is_causal=seqlen_q > 1), place, lengths=lengths)
    check_splits(problem, stream)
    for tensor in (problem.q, problem.k, problem.v):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


@pytest.mark.parametrize("splits", [1, 3, 128])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_absent_lse_is_not_written(family, splits, stream):
    problem = make_problem(family)
    expected, _ = run(problem, stream, num_splits=splits)
    problem.poison_outputs(stream)
    forward(params_of(problem, num_splits=splits, softmax_lse=None), stream).check()
    assert problem.out.read(stream).tobytes() == expected.tobytes()
    assert problem.lse.is_untouched(stream)


# ---- extreme scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_softmax_scale(family, scale, stream):
    check_splits(make_problem(family, softmax_scale=scale), stream)


@pytest.mark.parametrize("order", ["shuffled", "rising", "falling"])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_scores_of_ten_thousand(family, order, stream):
    """Scores from -10000 to 10000 in steps of 50: one split has the key that a row picks, the others weigh nothing."""
    problem = make_problem(replace(family, seqlen_q=2, seqlen_k=400), softmax_scale=1.0)
    scores = 0.5 * (np.arange(400) - 200)
    keys = {"shuffled": np.random.default_rng(1).permutation(scores), "rising": scores, "falling": -scores}[order]
    for name in "qk":
        getattr(problem, name).array[...] = 0
    set_bits(problem, "q", np.s_[:, 0, :, 0], 100.0)
    set_bits(problem, "q", np.s_[:, 1, :, 0], -100.0)
    set_bits(problem, "k", np.s_[:, :, :, 0], keys[:, None])
    problem.upload()
    check_splits(problem, stream, (*SPLITS, 24), lse_rtol=1e-6)


# ---- NaN and infinity ----------------------------------------------------------------------------------------------

LAST = DECODE[0].seqlen_k - 1  # alone in its K/V tile: with many splits alone in its split


@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_nan_and_inf_in_q_stay_in_their_rows(family, value, seqlen_q, stream):
    """One head of one query: O and LSE of that row are NaN, the other rows of its M tile as ever."""
    problem = make_problem(replace(family, seqlen_q=seqlen_q))
    set_bits(problem, "q", (0, 0, 1, 0), value)
    set_bits(problem, "q", (1, seqlen_q - 1, 5, family.head_dim - 1), value)
    problem.upload()
    check_splits(problem, stream)


@pytest.mark.parametrize("seqlen_q, mask", [(1, "full"), (4, "full"), (4, "causal"), (4, "narrow")])
@pytest.mark.parametrize("key", [0, 200, LAST])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_nan_in_k_reaches_the_rows_that_see_it(family, key, seqlen_q, mask, stream):
    """All query heads of its KV head, no other; NaN stays NaN through every merge."""
    problem = make_problem(replace(family, seqlen_q=seqlen_q, **MASKS[mask]))
    set_bits(problem, "k", (0, key, 1, 3), np.nan)
    problem.upload()
    out, lse = run(problem, stream, num_splits=128)
    if mask == "full":
        assert np.isnan(lse[0, 3:]).all() and np.isnan(as_float(out[0, :, 3:])).all()
    assert np.isfinite(lse[1]).all() and np.isfinite(lse[0, :3]).all()
    check_splits(problem, stream)


@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [0, 200, LAST])
@pytest.mark.parametrize("family", DECODE, ids=str)
def test_nan_and_inf_in_v_reach_their_column_only(family, key, value, seqlen_q, stream):
    """As what they are: a sum of finite numbers and an infinity is that infinity."""
    problem = make_problem(replace(family, seqlen_q=seqlen_q))
    set_bits(problem, "v", (1, key, 0, 5), value)
    problem.upload()
    check_splits(problem, stream)


@pytest.mark.parametrize("key", [200, LAST])
@pytest.mark.parametrize("family", SOME, ids=str)
def test_an_infinite_key(family, key, stream):
    """Scores of -inf weigh nothing, also where they are all that a split has; scores of +inf give NaN."""
    problem = make_problem(replace(family, seqlen_q=2))
    problem.q.array[:, 0, :, 0] = to_bits(-1.0, family.dtype)
    problem.q.array[:, 1, :, 0] = to_bits(1.0, family.dtype)
    set_bits(problem, "k", (slice(None), key, 0, 0), np.inf)
    problem.upload()
    check_splits(problem, stream)
