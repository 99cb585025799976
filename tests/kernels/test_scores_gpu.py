"""softcap, attention sinks, ALiBi, attn_mask and attention_chunk on the GPU: each feature with every head_dim and mask
in turn, in the prefill and the decode kernel, and what they do to one another."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from cases import FP8, Case, Layout
from check import check, make_problem, packed_problem, poison_of, run, run_and_check, run_each_and_check

from fa3_cute.contract.reference import as_float

pytestmark = pytest.mark.gpu

WINDOW = (90, 30)
# Every head_dim and mask, both 16-bit types.
ROWS = [
    Case("bf16", 64, True, 4, 2, 300, 420, batch=2),
    Case("fp16", 96, False, 4, 2, 300, 420, batch=2),
    Case("bf16", 128, False, 4, 2, 300, 420, batch=2),
    Case("fp16", 128, True, 4, 2, 420, 300, batch=2),
    Case("bf16", 192, False, 4, 2, 300, 420, batch=2, window=WINDOW),
    Case("fp16", 256, True, 4, 2, 300, 420, batch=2),
]
FP8_ROWS = [
    Case(FP8, 128, True, 4, 2, 300, 420, batch=2, out_dtype="bf16"),
    Case(FP8, 64, False, 4, 2, 300, 420, batch=2, out_dtype="fp16", window=WINDOW),
]
SINKS = (-np.inf, -5.0, 0.0, 5.0, 60.0, 1e4)
# {name: fields of the case}
FEATURES = {
    "softcap": {"softcap": 15.0},
    "alibi": {"alibi": "sequences"},
    "bias": {"attn_mask": "bf16"},
    "bias32": {"attn_mask": "fp32", "mask_dims": "hk", "mask_gap": 3},
    "hidden": {"attn_mask": "bool", "mask_dims": "qk"},
    "chunk": {"attention_chunk": 100},
}
TOGETHER = {
    "capped, then biased": {"softcap": 3.0, "alibi": "heads", "sinks": (1.0,)},
    "bias and hidden keys": {"alibi": "heads", "attn_mask": "fp16", "mask_dims": "bhqk", "mask_gap": 1},
    "chunks and sinks": {"attention_chunk": 64, "sinks": (0.5, -1.0), "sink_dtype": "bf16"},
}


def with_feature(case: Case, feature: str) -> Case:
    return replace(case, **(FEATURES | TOGETHER)[feature])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("case", ROWS + FP8_ROWS, ids=str)
def test_features(case, feature, stream):
    run_and_check(make_problem(with_feature(case, feature)), stream)


@pytest.mark.parametrize("feature", TOGETHER)
@pytest.mark.parametrize("case", ROWS[2:4] + FP8_ROWS[:1], ids=str)
def test_together(case, feature, stream):
    run_and_check(make_problem(with_feature(case, feature)), stream)


@pytest.mark.parametrize("feature", ("softcap", "alibi", "bias", "hidden", "chunk"))
@pytest.mark.parametrize("case", [ROWS[0], ROWS[3], FP8_ROWS[0]], ids=str)
def test_several_tiles_per_cta(case, feature, stream):
    """More tiles than CTAs: what belongs to a tile of O is read anew for each."""
    case = replace(case, seqlen_q=1900, seqlen_k=1500, num_heads=16, num_heads_k=4)
    run_and_check(make_problem(with_feature(case, feature)), stream)


@pytest.mark.parametrize("lengths", [(1, 1), (239, 1), (799, 3), (128, 128), (64, 2000)], ids=str)
@pytest.mark.parametrize("feature", ("softcap", "bias", "hidden", "chunk"))
def test_unusual_lengths(feature, lengths, stream):
    """One row, one key, rows and tiles without keys, whole tiles."""
    case = replace(ROWS[3], seqlen_q=lengths[0], seqlen_k=lengths[1])
    run_and_check(make_problem(with_feature(case, feature)), stream)


@pytest.mark.parametrize("feature", ("softcap", "alibi", "bias", "hidden", "chunk", "capped, then biased"))
@pytest.mark.parametrize(
    "case",
    [
        Case("bf16", 128, False, 16, 2, 1, 700, batch=2),
        Case("fp16", 64, True, 6, 2, 5, 385, batch=2),
        Case(FP8, 128, False, 6, 2, 1, 385, batch=2, out_dtype="bf16"),
    ],
    ids=str,
)
def test_decode(case, feature, stream):
    run_each_and_check(make_problem(with_feature(case, feature)), stream, [{"num_splits": n} for n in (0, 1, 3, 32)])


@pytest.mark.parametrize("feature", ("softcap", "alibi", "chunk"))
@pytest.mark.parametrize("case", ROWS[1:4:2], ids=str)
def test_packed(case, feature, stream):
    layout = Layout((300, 77, 129, 200), (420, 0, 1, 290), before=3, after=5)
    run_and_check(packed_problem(with_feature(case, feature), layout, used={"seqused_k": (400, 0, 1, 260)}), stream)


@pytest.mark.parametrize("mask_dims", ("bhqk", "qk", "bk", "hk", "k", "bqk"))
@pytest.mark.parametrize("kind", ("bool", "bf16"))
def test_masks_are_broadcast(kind, mask_dims, stream):
    case = replace(ROWS[3], attn_mask=kind, mask_dims=mask_dims, mask_gap=len(mask_dims) % 2)
    run_and_check(make_problem(case), stream)


@pytest.mark.parametrize("chunk", (1, 7, 128, 300, 2**31 - 1))
@pytest.mark.parametrize("case", [ROWS[0], ROWS[2], replace(ROWS[4], window=(50, -1))], ids=str)
def test_chunks(case, chunk, stream):
    """Of one key, of sizes unlike tiles, and of all keys; with fewer keys than queries the first rows have none."""
    for lengths in ((300, 420), (420, 300)):
        sized = replace(case, attention_chunk=chunk, seqlen_q=lengths[0], seqlen_k=lengths[1])
        run_and_check(make_problem(sized), stream)


# ---- sinks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", SINKS, ids=str)
@pytest.mark.parametrize("case", [ROWS[0], ROWS[2], ROWS[4], FP8_ROWS[0]], ids=str)
def test_sinks(case, sink, stream):
    run_and_check(make_problem(replace(case, sinks=(sink,))), stream)


@pytest.mark.parametrize("sink_dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("splits", (1, 3, 32))
def test_a_sink_joins_once_however_many_splits(splits, sink_dtype, stream):
    case = Case("bf16", 128, False, 16, 2, 1, 700, batch=2, sinks=(2.0, 5.0, -1.0, 0.25, 6.0), sink_dtype=sink_dtype)
    run_each_and_check(make_problem(case), stream, [{"num_splits": splits}])


@pytest.mark.parametrize("case", [replace(ROWS[3], seqlen_q=799, seqlen_k=3), replace(ROWS[2], seqlen_q=1)], ids=str)
def test_rows_without_keys_have_the_sink(case, stream):
    """Rows, whole tiles, and sequences of no key: O = 0, LSE is the sink."""
    lengths = {"seqused_k": (0, case.seqlen_k)}
    problem = make_problem(replace(case, sinks=(0.5, -3.0, 7.0)), lengths=lengths)
    out, lse = run(problem, stream)
    assert not out[0].any()
    assert (lse[0] == np.resize(np.float32((0.5, -3.0, 7.0)), case.num_heads)[:, None]).all()
    check(problem, out, lse)


@pytest.mark.parametrize("splits", (1, 3))
@pytest.mark.parametrize("case", [ROWS[0], FP8_ROWS[0], Case("bf16", 128, False, 16, 2, 1, 700, batch=2)], ids=str)
def test_a_sink_above_every_score_is_all(case, splits, stream):
    """O = 0 and LSE is the sink where that is +inf, or would be in units of log2(e): of rows with keys and without."""
    sinks = 3e38, np.inf
    problem = make_problem(replace(case, sinks=sinks), lengths={"seqused_k": (0, case.seqlen_k)})
    out, lse = run(problem, stream, num_splits=splits)
    assert not as_float(out, np.float32).any()
    assert (lse == np.resize(np.float32(sinks), case.num_heads)[:, None]).all()


@pytest.mark.parametrize("splits", (1, 3, 32))
def test_decode_without_keys_has_the_sink(splits, stream):
    case = Case("bf16", 128, False, 16, 2, 1, 700, batch=2, sinks=(2.0, 5.0, -1.0))
    problem = make_problem(case, lengths={"seqused_k": (0, 700)})
    run_each_and_check(problem, stream, [{"num_splits": splits}])


def test_no_sink_is_none(stream):
    """-inf for every head gives the bits of a null pointer."""
    problem = make_problem(replace(ROWS[3], sinks=(-np.inf,)))
    with_pointer = run(problem, stream)
    problem.upload()
    for a, b in zip(with_pointer, run(problem, stream, s_aux=None), strict=True):
        assert a.tobytes() == b.tobytes()


# ---- softcap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (1e-3, 0.5, 30.0, 50.0, 1e6))
@pytest.mark.parametrize("case", [ROWS[0], ROWS[2], FP8_ROWS[1]], ids=str)
def test_softcaps(case, softcap, stream):
    """Far below the scores, about as large, far above."""
    run_and_check(make_problem(replace(case, softcap=softcap)), stream)


@pytest.mark.parametrize("case", [ROWS[2], Case("bf16", 128, False, 16, 2, 1, 700, batch=2)], ids=str)
def test_huge_scores_are_capped(case, stream):
    problem = make_problem(replace(case, softcap=20.0), softmax_scale=1000.0)
    run_and_check(problem, stream)


@pytest.mark.parametrize("feature", ("softcap", "alibi", "bias", "hidden"))
def test_nan_in_unused_keys_is_not_seen(feature, stream):
    case = with_feature(ROWS[2], feature)
    problem = make_problem(case, lengths={"seqused_k": (123, 420)})
    assert (problem.k.array[0, 123:] == poison_of(problem.k.array.dtype)).all()
    run_and_check(problem, stream)


@pytest.mark.parametrize(("feature", "index"), list(product(("softcap", "alibi", "bias"), (0, 1))))
def test_a_nan_query_gives_nan(feature, index, stream):
    """In its own row alone."""
    problem = make_problem(with_feature(ROWS[2 + index], feature))
    problem.q.array[0, 207, 1] = poison_of(problem.q.array.dtype)
    problem.upload()
    _, lse = run(problem, stream)
    assert np.isnan(lse[0, 1, 207]) and not np.isnan(np.delete(lse[0, 1], 207)).any()


@pytest.mark.parametrize("kind", ("bf16", "fp32"))
@pytest.mark.parametrize("case", [ROWS[2], ROWS[3], Case("bf16", 128, False, 16, 2, 1, 700, batch=2)], ids=str)
def test_the_lowest_number_hides(case, kind, stream):
    """What many masks hold instead of -inf: whole tiles of it, the first that are visited among them."""
    problem = make_problem(replace(case, attn_mask=kind))
    mask = problem.scores["attn_mask"].array
    lowest = {"bf16": np.uint16(0xFF7F), "fp32": np.finfo(np.float32).min}[kind]
    mask[..., mask.shape[-1] // 3 :] = lowest
    problem.upload()
    out, lse = run(problem, stream)
    mask[mask == lowest] = {"bf16": np.uint16(0xFF80), "fp32": -np.inf}[kind]
    check(problem, out, lse)
