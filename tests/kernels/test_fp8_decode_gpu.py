"""The FP8 decode kernel on the GPU: splits, contexts, masks, head ratios, used lengths, the same bits every time."""

from dataclasses import replace

import numpy as np
import pytest
from cases import FP8, FP8_DECODE, FP8_DECODE_SOME, FP8_SPLITS, MORE_SPLITS, Case, with_heads
from check import assert_same_bits, check, check_all, make_problem, params_of, run, run_each_and_check
from descales import per_batch_and_head
from images import heads_before_rows, padded
from test_decode_gpu import LAST, MASKS, USED, alone, check_splits, set_bits
from test_decode_graph_gpu import captured, give_lengths
from test_fp8_gpu import score_problem

from fa3_cute import AttentionMode, warmup

pytestmark = pytest.mark.gpu


def descaled(case, **options):
    return make_problem(case, descale=per_batch_and_head, **options)


# ---- lengths and masks ---------------------------------------------------------------------------------------------

CONTEXTS = (1, 2, 64, 65, 128, 129, 1000, 4097)
LONG = [
    Case(FP8, 64, False, 8, 1, 1, 131_072, out_dtype="bf16"),
    Case(FP8, 128, True, 16, 2, 2, 65_537, out_dtype="fp16"),
]


@pytest.mark.parametrize("index, seqlen_k", list(enumerate(CONTEXTS)))
@pytest.mark.parametrize("number", range(5), ids=("d64", "d96", "d128", "d192", "d256"))
def test_contexts(number, index, seqlen_k, stream):
    """With LSE in every second one, both element types of O."""
    case = replace(FP8_DECODE[2 * number + index // 2 % 2], seqlen_k=seqlen_k, has_lse=index % 2 == 0)
    check_splits(descaled(case), stream, FP8_SPLITS)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_contexts(case, stream):
    check_splits(descaled(case), stream, (*FP8_SPLITS, 24, 256))


@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_every_kind_of_cluster(family, stream):
    """2 to 16 CTAs in a cluster, up to 251 clusters; splits with several K/V tiles, with one and with none."""
    check_splits(descaled(replace(family, seqlen_q=2, seqlen_k=1500)), stream, MORE_SPLITS)


@pytest.mark.parametrize("window", [(-1, -1), (100, 0)], ids=str)
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_every_remainder_of_the_last_tile(family, window, stream):
    """Used lengths from 0 past the first K/V tile, and all remainders behind some tiles, each of a batch entry."""
    lengths = (*range(130), *range(255, 386))
    case = replace(with_heads(family, (4, 1)), batch=len(lengths), window=window)
    check_splits(descaled(case, lengths={"seqused_k": lengths}), stream, FP8_SPLITS)


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, mask",
    [
        (2, 1029, "causal"),
        (3, 300, "narrow"),
        (4, 70, "left"),
        (5, 1029, "bounded"),
        (6, 300, "right"),
        (7, 3, "causal"),
        (8, 1029, "full"),
        (1, 300, "diagonal"),
    ],
)
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_masks(family, seqlen_q, seqlen_k, mask, stream):
    """Also more queries than keys: the first ones see none, in every split."""
    case = replace(with_heads(family, (8, 2)), seqlen_q=seqlen_q, seqlen_k=seqlen_k, **MASKS[mask])
    check_splits(descaled(case), stream, FP8_SPLITS)


@pytest.mark.parametrize("heads", [(4, 4), (16, 2), (5, 1), (64, 1), (128, 1)], ids=str)
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_head_ratios(family, heads, stream):
    """Packed into however many M tiles it takes, and every query head by itself."""
    variants = [
        {"num_splits": n, "pack_gqa": pack, "mode": AttentionMode.DECODE} for n in FP8_SPLITS for pack in (None, False)
    ]
    run_each_and_check(descaled(with_heads(family, heads)), stream, variants)


@pytest.mark.parametrize("used", ["k", "q", "both", "nothing"])
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_used_lengths(family, used, stream):
    """Rows at or past seqused_q keep every bit; keys past seqused_k are NaN and invisible."""
    check_splits(descaled(replace(family, batch=8), lengths=USED[used]), stream, FP8_SPLITS)


@pytest.mark.parametrize("mask", ["causal", "narrow"])
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_used_lengths_of_several_queries(family, mask, stream):
    """The used lengths move the diagonal: also above the first key, where rows without any key are 0 and -inf."""
    used = {"seqused_q": (5, 3, 2, 1, 0, 5, 5, 4), "seqused_k": (385, 300, 64, 1, 65, 0, 2, 129)}
    case = replace(with_heads(family, (8, 2)), batch=8, seqlen_q=5, **MASKS[mask])
    check_splits(descaled(case, lengths=used), stream, FP8_SPLITS)


@pytest.mark.parametrize("place", [padded, heads_before_rows], ids=lambda place: place.__name__)
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_strided(family, place, stream):
    """Gaps of the output untouched, inputs unchanged, with the gaps of K and V full of NaN."""
    problem = descaled(replace(family, seqlen_q=4, is_causal=True), place=place, lengths={"seqused_k": (200, 385)})
    check_splits(problem, stream, FP8_SPLITS)
    for tensor in (problem.q, problem.k, problem.v, *problem.descales.values()):
        assert np.array_equal(tensor.image.download(stream), tensor.image.host), "an input was written to"


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.125, -0.125, 48.0])
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_scores_that_rise_and_fall_along_the_keys(family, slope, stream):
    """The splits' maxima differ much, or so much that all but one weigh nothing."""
    case = replace(family, seqlen_q=2, seqlen_k=420)
    problem = score_problem(case, (slope, 0.125), np.arange(420) - 210)
    check_splits(problem, stream, (*FP8_SPLITS, 24), lse_rtol=1e-6)


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_nan_stays_where_it_reaches(family, name, stream):
    """In q its row, in k the rows of its KV head, in v its column; through every merge."""
    problem = descaled(replace(family, seqlen_q=4))
    set_bits(problem, name, (1, 2, 1, 5) if name == "q" else (1, LAST, 1, 5), np.nan)
    problem.upload()
    check_splits(problem, stream, (*FP8_SPLITS, 128))


# ---- the same bits every time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_twenty_runs_agree_bit_for_bit(family, stream):
    problem = descaled(replace(with_heads(family, (16, 2)), seqlen_k=3000))
    first = {}
    for splits in (0, 1, 3, 24, 128):
        problem.poison_outputs(stream)
        first[splits] = run(problem, stream, num_splits=splits)
        for _ in range(19):
            problem.poison_outputs(stream)
            assert_same_bits(run(problem, stream, num_splits=splits), first[splits])
    check_all(problem, {f"num_splits={splits}": pair for splits, pair in first.items()})


@pytest.mark.parametrize("mask", [{}, {"seqlen_q": 4, "is_causal": True}], ids=["one query", "causal"])
@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_without_splits_an_entry_gives_the_same_bits_in_any_company(family, mask, stream):
    """Alone, among others, and among the same with other used lengths."""
    lengths = (700, 64, 1, 0, 129, 333)
    case = replace(family, batch=len(lengths), seqlen_k=700, **mask)
    problem = descaled(case, lengths={"seqused_k": (700,) * len(lengths)})
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
        own_descales = {
            f"{name}_ptr": tensor.address + b * tensor.array.strides[0] for name, tensor in problem.descales.items()
        }
        own_out, own_lse = run(problem, stream, num_splits=1, **alone(problem, b), **own_descales)
        assert_same_bits((own_out[b], own_lse[b]), (out[b], lse[b]))


@pytest.mark.parametrize("family", FP8_DECODE_SOME, ids=str)
def test_one_query_has_one_meaning(family, stream):
    """The same bits in both modes, and with a causal mask, which hides no key from the last query."""
    problem = descaled(family)
    first = run(problem, stream, num_splits=3, mode=AttentionMode.DECODE)
    check(problem, *first)
    for overrides in ({"mode": AttentionMode.PREFILL}, {"is_causal": True}):
        problem.poison_outputs(stream)
        assert_same_bits(run(problem, stream, num_splits=3, **overrides), first)


@pytest.mark.parametrize("splits", [0, 3, 24])
def test_graph_replay_with_other_used_lengths(splits, device):
    """Captured once, replayed for caches that grow and shrink."""
    stream = device.create_stream()
    problem = descaled(replace(FP8_DECODE[4], batch=3, seqlen_k=700), lengths={"seqused_k": (700,) * 3})
    inputs = [array.copy() for array in problem.inputs]
    params = params_of(problem, num_splits=splits)
    warmup(params, stream).check()
    graph = captured(stream, params)
    for lengths in ((700, 700, 700), (1, 64, 65), (0, 699, 0), (300, 128, 641), (0, 0, 0)):
        give_lengths(problem, inputs, lengths)
        graph.launch(stream)
        check(problem, problem.out.read(stream), problem.lse.read(stream))
